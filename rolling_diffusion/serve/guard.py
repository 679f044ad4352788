"""The guard at the door: who may come in, with how much, and what is written down of it."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import logging
import time
from collections.abc import Collection
from contextlib import suppress
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import Refusal
from .metrics import Metrics

log = logging.getLogger("rolling_diffusion.serve")
JSON_BYTES = 2**20
SECONDS = 60.0  # in which a body has to be there


def is_loopback(host: str) -> bool:
    """Whether it is this machine, and nobody else can reach it."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Guard:
    """An ASGI application around another.

    key: that every request has to bring, but those for `open_paths`; None: only this machine is served, under its own
    names, so that no page from elsewhere can have a browser ask in its place. upload: most bytes of a form.
    """

    def __init__(
        self, app: ASGIApp, *, key: str | None, open_paths: Collection[str], upload: int, metrics: Metrics
    ) -> None:
        self.app, self.key, self.open_paths, self.upload, self.metrics = app, key, open_paths, upload, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        started, status = time.monotonic(), 499  # as nginx calls a request whose caller has gone

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        body = Body(receive, JSON_BYTES)
        try:
            headers = Headers(scope=scope)
            self.check(scope["path"], headers)
            if headers.get("content-type", "").startswith("multipart/"):
                body.most = self.upload
            body.announced(headers.get("content-length"))
            await self.app(scope, body.receive, noted)
        except Refusal as refusal:
            with suppress(HTTPException):
                await body.drain()
            await refusal.response(scope, receive, noted)
        finally:
            self.note(scope, status, time.monotonic() - started)

    def check(self, path: str, headers: Headers) -> None:
        """Refusal of whoever may not come in."""
        host = headers.get("host", "")
        if self.key is None and not is_loopback(place(f"//{host}")[1]):
            raise Refusal("Without a key this server answers to localhost alone.", 403, code="wrong_host")
        origin = headers.get("origin")
        if origin is not None and place(origin)[0] != host:
            raise Refusal("Pages from elsewhere may not ask this server.", 403, code="wrong_origin")
        if self.key is None or path in self.open_paths:
            return
        kind, _, given = headers.get("authorization", "").partition(" ")
        if not given or kind.lower() != "bearer":
            raise Refusal("You didn't provide an API key: send it as a Bearer token.", 401)
        if not hmac.compare_digest(given.strip().encode("latin-1"), self.key.encode()):  # as headers are decoded
            raise Refusal("Incorrect API key provided.", 401, code="invalid_api_key")

    def note(self, scope: Scope, status: int, seconds: float) -> None:
        """One line: neither queries, nor headers, nor bodies are in it, so no key and no prompt."""
        route = getattr(scope.get("route"), "path", "other")
        self.metrics.requests.labels(route, status).inc()
        if route != "/health":
            log.info("%s %s %d %.2f s", scope["method"][:10], ascii(scope["path"][:100])[1:-1], status, seconds)


def place(url: str) -> tuple[str, str]:
    """Host and port of a URL, and the host alone; nothing where it is none."""
    try:
        parts = urlsplit(url)
        return parts.netloc, parts.hostname or ""
    except ValueError:
        return "", ""


class Body:
    """What a request brings, counted, and timed until it is there."""

    def __init__(self, receive: Receive, most: int) -> None:
        self.source, self.most = receive, most
        self.read, self.whole = 0, False
        self.until = time.monotonic() + SECONDS

    def announced(self, length: str | None) -> None:
        if length is not None and (not length.isascii() or not length.isdigit() or int(length[:20]) > self.most):
            raise self.refusal()

    def refusal(self) -> Refusal:
        return Refusal(f"The request is larger than {self.most:,} bytes.", 413, code="request_too_large")

    async def receive(self) -> Message:
        if self.whole:
            return await self.source()
        try:
            message = await asyncio.wait_for(self.source(), max(0.0, self.until - time.monotonic()))
        except asyncio.TimeoutError:
            raise HTTPException(408, "The request did not come within a minute.") from None
        self.read += len(message.get("body", b""))
        self.whole = message["type"] != "http.request" or not message.get("more_body", False)
        if self.read > self.most:  # an HTTPException: FastAPI passes it on where it would explain others away
            raise HTTPException(413, str(self.refusal()))
        return message

    async def drain(self) -> None:
        """Takes the rest of a moderate body, so that a client that is still sending reads the answer."""
        self.most = max(self.most, 2**26)
        self.until = min(self.until, time.monotonic() + 5)
        while not self.whole:
            await self.receive()
