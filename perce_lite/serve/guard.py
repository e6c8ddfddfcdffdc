"""What is asked of every request before it is looked at: its host, its origin, its size, its key."""

import ipaddress
import json
import re
from collections.abc import Iterable
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from perce_lite.serve.keys import Keys
from perce_lite.serve.wire import RequestError

MAX_BODY = 2**20
"""Bytes of a request."""

PAGE = {"/": "index.html", "/page.css": "page.css", "/page.js": "page.js"}
"""Paths that need no key, and their files: they say nothing of anybody."""

_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::\d{1,5})?")
"""A `Host` header, with its name or address apart from the port."""

_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
]


class Hosts:
    """Names by which the server may be called. An address that is bound to other than loopback may be called by any IP.

    A page of another site that has its name resolved to this machine (DNS rebinding) still sends that name as `Host`.
    """

    def __init__(self, bound: str, names: Iterable[str] = ()) -> None:
        self._loopback_only = is_loopback(bound)
        self._names = {"localhost", bound.lower(), *(name.lower() for name in names)}

    def allows(self, header: str | None) -> bool:
        """Whether a request with this `Host` header may come in."""
        called = _HOST.fullmatch((header or "").lower())
        if called is None:
            return False
        name = called[1].strip("[]")
        if name in self._names:
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return address.is_loopback or not self._loopback_only


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


class Guard:
    """Lets a request through to `app` with its caller in `scope["state"]`, its body read and within `MAX_BODY`."""

    def __init__(self, app: ASGIApp, hosts: Hosts, keys: Keys) -> None:
        self._app, self._hosts, self._keys = app, hosts, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # the server's start and end
            await self._app(scope, receive, send)
            return
        try:
            self._check(scope)
            body = await _read(Headers(scope=scope), receive)
        except RequestError as error:
            refusal = JSONResponse(error.body(), error.status, error.headers)
            await refusal(scope, receive, _with_headers(send))
            return
        given = False

        async def replay() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, replay, _with_headers(send))

    def _check(self, scope: Scope) -> None:
        """Raises RequestError: the host, the origin, the kind of content or the key is wrong."""
        headers = Headers(scope=scope)
        host, origin = headers.get("host"), headers.get("origin")
        if len(headers.getlist("host")) != 1 or not self._hosts.allows(host):
            raise RequestError(403, "host", "This server is not called by that name; see --allow-host.")
        if origin is not None and origin.lower() not in (f"{kind}://{host}".lower() for kind in ("http", "https")):
            raise RequestError(403, "origin", "Pages of other sites may not ask this server.")
        document = scope["method"] == "GET" and scope["path"] == "/"
        if headers.get("sec-fetch-site", "none") not in ("none", "same-origin") and not document:
            raise RequestError(403, "origin", "Pages of other sites may not ask this server.")
        kind = headers.get("content-type", "").partition(";")[0].strip()
        if scope["method"] == "POST" and kind != "application/json":
            raise RequestError(415, "content_type", "The body has to be application/json.")
        caller = self._keys.caller(headers.get("authorization"))
        if caller is None and scope["path"] not in PAGE:
            raise RequestError(401, "invalid_api_key", "A key is needed: Authorization: Bearer KEY.")
        scope.setdefault("state", {})["caller"] = caller


async def _read(headers: Headers, receive: Receive) -> bytes:
    """The body; raises RequestError where it is larger than `MAX_BODY`, before more of it is read."""
    too_large = RequestError(413, "too_large", f"A request may have {MAX_BODY:,} bytes.")
    length = headers.get("content-length", "0")
    if length.isdigit() and int(length) > MAX_BODY:
        raise too_large
    body = bytearray()
    while True:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > MAX_BODY:
            raise too_large
        if not message.get("more_body", False):
            return bytes(body)


def _with_headers(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", []), *_HEADERS]}
        await send(message)

    return sending


def parsed(body: bytes) -> Any:
    """The JSON of a body.

    Raises:
        RequestError: it is none, or nested too deeply.
    """
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(400, "invalid_json", "The body is no JSON.") from error
