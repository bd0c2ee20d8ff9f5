"""Checks of every request before its route is looked up: host, origin, rate and token."""

import dataclasses
import hmac
import ipaddress
import json
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sparsecbm_jax.app.schemas import ApiError, Problem

COOKIE = "sparsecbm_token"
# Paths that need no token: the answer shows only that the server runs.
OPEN_PATHS = ("/healthz",)
MAX_CLIENTS = 1024
HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
# Content-security policy of all answers but the page, which has its own.
POLICY = "default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"


@dataclasses.dataclass(frozen=True)
class Limits:
    """The limits of a server.

    Attributes:
        max_body: Most bytes of a request.
        max_text: Most characters of a text.
        max_waiting: Most requests for the model that are running or waiting.
        rate, burst: Most requests of one address per second in the long run, and at once.
        read_seconds: Most seconds that a request may take to arrive.
    """

    max_body: int = 65_536
    max_text: int = 10_000
    max_waiting: int = 16
    rate: float = 20.0
    burst: int = 40
    read_seconds: float = 10.0


class Rates:
    """The requests that each address may still make: a bucket that fills with time, for the most recent addresses."""

    def __init__(self, rate: float, burst: int, now: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._burst, self._now = rate, burst, now
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait(self, address: str) -> float:
        """Takes one request from the bucket and returns 0, or returns the seconds until there is one."""
        now = self._now()
        left, then = self._buckets.pop(address, (float(self._burst), now))
        left = min(float(self._burst), left + self._rate * (now - then))
        is_free = left >= 1
        self._buckets[address] = (left - is_free, now)
        if len(self._buckets) > MAX_CLIENTS:
            self._buckets.popitem(last=False)
        return 0.0 if is_free else (1 - left) / self._rate


class Guard:
    """Middleware that passes on requests that name this server, come from its own page or none, and have its token.

    A page of another site can make a browser send requests here, under a name of its own that it points at this machine
    (DNS rebinding), or across sites. The Host header shows the first, Origin and Sec-Fetch-Site show the second.
    """

    def __init__(self, app: ASGIApp, *, token: str | None, host_names: Collection[str], limits: Limits) -> None:
        """Wraps the app.

        Args:
            app: The app.
            token: Token that requests need; None for none.
            host_names: Names of the server, in addition to 'localhost' and any IP address.
            limits: The server's limits.
        """
        self._app, self._token = app, token
        self._names = {"localhost", *(name.lower() for name in host_names)}
        self._rates = Rates(limits.rate, limits.burst)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuses a request or passes it on; adds strict security headers to every answer."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_strictly(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in {**HEADERS, "Content-Security-Policy": POLICY}.items():
                    headers.setdefault(name, value)
            await send(message)

        answer: ASGIApp = self._app
        try:
            answer = self._checked(Request(scope)) or self._app
        except ApiError as refusal:
            answer = error_response(refusal)
        await answer(scope, receive, send_strictly)

    def _checked(self, request: Request) -> Response | None:
        """Checks a request; returns None, or the answer that gives a browser its cookie.

        Raises:
            ApiError: The request is refused.
        """
        host = request.headers.get("host", "")
        if not self._is_known(host):
            raise ApiError(403, f"Host is {host!r}, which is not a name of this server; --allowed_hosts adds names")
        origin = request.headers.get("origin")
        if origin is not None and origin not in (f"http://{host}", f"https://{host}"):
            raise ApiError(403, f"Origin is {origin!r}; expected this server's own page")
        if request.method not in ("GET", "HEAD"):
            if request.headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
                raise ApiError(403, "the request comes from a page of another site")
            kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json":
                raise ApiError(415, f"Content-Type is {kind!r}; expected 'application/json'")
        path = request.scope["path"]
        if path in OPEN_PATHS:
            return None
        if seconds := self._rates.wait(request.client.host if request.client else ""):
            raise too_many("too many requests from this address", seconds)
        if self._token is None:
            return None
        if path == "/" and "token" in request.query_params:
            if not self._is_token(request.query_params["token"]):
                raise ApiError(401, "the token is wrong; expected the one printed when the server was started")
            # Moves the token from the address bar into a cookie that scripts cannot read and other sites do not send.
            answer = RedirectResponse("/", 303)
            answer.set_cookie(COOKIE, self._token, httponly=True, samesite="strict", path="/")
            return answer
        scheme, _, shown = request.headers.get("authorization", "").partition(" ")
        shown = shown.strip() if scheme.lower() == "bearer" else request.cookies.get(COOKIE, "")
        if not self._is_token(shown):
            how = "open the address that was printed when the server was started, or send 'Authorization: Bearer …'"
            raise ApiError(401, f"a token is needed: {how}", headers={"WWW-Authenticate": "Bearer"})
        return None

    def _is_token(self, shown: str) -> bool:
        assert self._token is not None
        return hmac.compare_digest(shown.encode("utf-8", "surrogateescape"), self._token.encode())

    def _is_known(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        # An address, unlike a name, cannot be pointed to another machine.
        return name in self._names or _is_address(name)


def as_json(answer: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Returns a dataclass as JSON in ASCII, whatever characters a request may have put into it."""
    return Response(json.dumps(dataclasses.asdict(answer), allow_nan=False), status, headers, "application/json")


def error_response(refusal: ApiError) -> Response:
    """Turns an error into an answer."""
    return as_json(Problem(str(refusal), refusal.field), refusal.status, refusal.headers)


def too_many(message: str, seconds: float) -> ApiError:
    """Makes an error 429, with the whole seconds after which to try again."""
    return ApiError(429, f"{message}; try again later", headers={"Retry-After": str(max(1, round(seconds)))})


def is_loopback(host: str) -> bool:
    """Returns True where only this machine reaches a server that is bound to a host.

    >>> [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "::", "example.org")]
    [True, True, True, False, False, False]
    """
    return host == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
