"""What every request passes before a route sees it: host, API key, size of the body; and what is counted of it."""

import asyncio
import hmac
import time
from collections.abc import Sequence
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from megatron_embed.serving.errors import RequestError, error_response
from megatron_embed.serving.metrics import Metrics
from megatron_embed.serving.models import Limits
from megatron_embed.serving.page import PUBLIC_PAGE_PATHS

PUBLIC_PATHS = PUBLIC_PAGE_PATHS | {"/health"}
"""Paths that need no API key: nothing of the model is behind them."""
DISCARDED = 4
"""Times the largest body: how much of a larger one is read on, so that its client reads the answer."""
HELD = 8
"""Times the largest body: bytes of all requests at once."""


@dataclass(kw_only=True)
class ServerState:
    """What the guard, the routes and the server share."""

    stopping: bool = False
    """Whether the server was asked to stop: every connection is closed after its answer."""


class Guard:
    """ASGI middleware. A request whose client has gone is cancelled, so that its texts leave the queue."""

    def __init__(self, app: ASGIApp, *, limits: Limits, metrics: Metrics, state: ServerState,
                 api_keys: Sequence[str] = (), hosts: Sequence[str] = ()) -> None:
        """
        Args:
            api_keys: of which a request needs one; empty: none is needed.
            hosts: names that a request may give the server; empty: any.
        """
        self._app, self._limits, self._metrics, self._state = app, limits, metrics, state
        self._keys = [key.encode() for key in api_keys]
        self._hosts = frozenset(hosts)
        self._held_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.perf_counter(), 0

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if self._state.stopping:
                    message["headers"] = [*message.get("headers", ()), (b"connection", b"close")]
            await send(message)

        parts: list[bytes] = []
        try:
            self._check(scope)
            await self._read(receive, parts)
            await self._answer(scope, b"".join(parts), receive, watched)
        except RequestError as error:
            await error_response(scope["path"], error)(scope, receive, watched)
        finally:
            self._held_bytes -= sum(map(len, parts))
            self._metrics.answered(scope, status, time.perf_counter() - start)

    def _check(self, scope: Scope) -> None:
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1")
        name = host.rpartition(":")[0] if ":" in host and not host.endswith("]") else host
        if self._hosts and name.lower() not in self._hosts:
            raise RequestError(403, f"Host is {host!r}, and this server answers to {', '.join(sorted(self._hosts))}; "
                               "start it with an API key to be reached by another name", code="wrong_host")
        if not self._keys or scope["path"] in PUBLIC_PATHS:
            return
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() != b"bearer" or not any(hmac.compare_digest(given.strip(), key) for key in self._keys):
            raise RequestError(401, "a valid API key is needed; send the header `Authorization: Bearer KEY`",
                               code="invalid_api_key")

    async def _read(self, receive: Receive, parts: list[bytes]) -> None:
        """Append the parts of the body, and count them in `_held_bytes`.

        Raises RequestError: it is too large (413), all bodies together are (429), or it does not arrive in time (408).
        """
        limit, size, full = self._limits.max_bytes, 0, False
        try:
            async with asyncio.timeout(self._limits.timeout_seconds):
                while True:
                    message = await receive()
                    part = message.get("body", b"")
                    size += len(part)
                    full = full or self._held_bytes + len(part) > HELD * limit
                    if size <= limit and not full:
                        parts.append(part)
                        self._held_bytes += len(part)
                    if size > DISCARDED * limit or not message.get("more_body", False):
                        break
        except TimeoutError:
            raise RequestError(408, f"the body did not arrive within {self._limits.timeout_seconds:g} s",
                               code="timeout") from None
        if size > limit:
            raise RequestError(413, f"the body has more than {limit} bytes; divide the texts among several requests, "
                               "or start the server with a larger --max-mib", code="body_too_large")
        if full:
            raise RequestError(429, "requests of too many bytes are waiting; send the request again later",
                               code="overloaded", retry_after=1)

    async def _answer(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        """The application's answer, unless the client closes the connection first."""
        gone = asyncio.Event()
        given = False

        async def receive_body() -> Message:
            nonlocal given
            if not given:
                given = True
                return {"type": "http.request", "body": body, "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def wait_for_client() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            gone.set()

        answer = asyncio.ensure_future(self._app(scope, receive_body, send))
        client = asyncio.ensure_future(wait_for_client())
        try:
            await asyncio.wait({answer, client}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            left = not answer.done()
            answer.cancel()
            client.cancel()
            await asyncio.gather(answer, client, return_exceptions=True)
        if not left:
            answer.result()
