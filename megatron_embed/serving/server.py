"""The HTTP server around the application: its socket, and its end on a request to stop."""

import asyncio
import contextlib
import logging
import signal
import socket
import threading
from collections.abc import Generator
from types import FrameType

import uvicorn
from fastapi import FastAPI

from megatron_embed.errors import ConfigError
from megatron_embed.platform import stop_signal as stop
from megatron_embed.serving.guard import ServerState
from megatron_embed.serving.models import ServedModels

logger = logging.getLogger(__name__)

LISTEN_SECONDS = 0.5
"""After a request to stop, how long requests that are on their way are still accepted."""
ANSWER_SECONDS = 18
"""After a request to stop, how long accepted requests are computed; what is left then is answered 503."""
CLOSE_SECONDS = 3
"""Then, how long clients have to read their answers."""
THREAD_SECONDS = 1
"""At last, how long the batch under way may take."""
BACKLOG = 2048
KEEP_ALIVE_SECONDS = 75


def bind(host: str, port: int) -> socket.socket:
    """A socket at that address, not yet listening. Raises ConfigError if that cannot be."""
    try:
        (family, kind, protocol, _, address), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM,
                                                                      flags=socket.AI_PASSIVE)
    except OSError as error:
        raise ConfigError(f"--host {host}: {error.strerror or error}; give an address of this machine, such as "
                          "127.0.0.1, or 0.0.0.0 for all of its addresses", key="--host") from None
    bound = socket.socket(family, kind, protocol)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise ConfigError(f"--host {host} --port {port}: {error.strerror or error}; give another --port, or stop the "
                          "program that uses it", key="--port") from None
    return bound


def address_of(bound: socket.socket) -> str:
    """http://HOST:PORT."""
    host, port = bound.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


class _Server(uvicorn.Server):
    """uvicorn without signal handlers of its own: platform/stop_signal.py has them."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


class Stopper:
    """Ends the server: `ask` may be called in any thread, before the server runs and more than once."""

    def __init__(self, models: ServedModels, state: ServerState) -> None:
        self._models, self._state = models, state
        self._asked = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._wake = asyncio.Event()

    def ask(self) -> None:
        """Begin to stop."""
        self._asked.set()
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self._wake.set)

    async def run(self, server: uvicorn.Server) -> None:
        """Wait until asked; then let the server finish, and answer what is left once the time is over."""
        self._loop = asyncio.get_running_loop()
        if self._asked.is_set():
            self._wake.set()
        await self._wake.wait()
        self._state.stopping = True
        logger.info("asked to stop (%s): %d texts are waiting", stop.reason() or "Ctrl-C",
                    self._models.queue.waiting_texts)
        await asyncio.sleep(LISTEN_SECONDS)
        server.should_exit = True
        await asyncio.sleep(ANSWER_SECONDS - LISTEN_SECONDS)
        self._models.queue.batcher.close(0)


def serve(app: FastAPI, models: ServedModels, bound: socket.socket, state: ServerState, stopper: Stopper) -> bool:
    """Answer requests until `stopper` is asked, or Ctrl-C. Returns whether the thread that computes has ended, too."""
    config = uvicorn.Config(app, log_config=None, access_log=False, server_header=False, lifespan="off", ws="none",
                            loop="asyncio", backlog=BACKLOG, timeout_keep_alive=KEEP_ALIVE_SECONDS,
                            timeout_graceful_shutdown=ANSWER_SECONDS + CLOSE_SECONDS)
    config.load()  # imports, which on a busy machine take seconds: a client that connects is not to wait for them
    bound.listen(BACKLOG)  # from here on a client can connect, and is answered once the loop runs
    logger.info("listening at %s", address_of(bound))
    server = _Server(config)

    async def run() -> None:
        stopping = asyncio.ensure_future(stopper.run(server))
        await server.serve(sockets=[bound])
        stopping.cancel()

    def interrupted(signum: int, frame: FrameType | None) -> None:
        if state.stopping:
            raise KeyboardInterrupt
        stopper.ask()

    before = signal.signal(signal.SIGINT, interrupted)
    try:
        asyncio.run(run())
    finally:
        signal.signal(signal.SIGINT, before)
    return models.queue.batcher.close(THREAD_SECONDS)
