"""Ports for servers that a test or a tool starts."""

import random
import socket

FIRST, LAST = 20000, 32000
"""Below the ports that Linux gives to outgoing connections, which any process may open at any moment."""


def free_port() -> int:
    """A port on which no process listens at the moment; a server that starts at once can take it.

    Asking the kernel for any port (bind to 0) would return one that it also gives to outgoing connections: on a busy
    machine one of them may take it before the server does.
    """
    while True:
        port = random.SystemRandom().randrange(FIRST, LAST)
        with socket.socket() as listener:
            try:
                listener.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
