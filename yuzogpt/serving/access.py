"""Who may ask, how often, and how much: decided from a request's head, before its body is read.

In: an ASGI app. Out: the same app behind a gate. Serve's proxy has no such limits of its own.
"""

import asyncio
import hmac
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from ipaddress import ip_address
from pathlib import Path

from prometheus_client import Counter
from starlette._utils import get_route_path
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from yuzogpt.config import LimitSettings
from yuzogpt.errors import UserError
from yuzogpt.serving.errors import APIError
from yuzogpt.serving.sparing import sparing_logger
from yuzogpt.storage.atomic_files import check_not_public
from yuzogpt.storage.untrusted import read_file

COUNTED = "/v1/completions"
# Everything else needs a key, where there are keys. The router's "" leads to "/".
OPEN = ("", "/", "/page.js", "/page.css", "/healthz", "/metrics")
SHORTEST_KEY = 16  # characters
STRANGERS = (401, 403)
MOST_OF_A_PATH = 100  # characters in the log
MOST_OF_KEYS = 2**20  # bytes
UPLOADED_WITHIN = 30.0  # seconds, and within the deadline: a body, which holds a place meanwhile
DIGITS = 20  # of a length; Python refuses to read thousands
CLIENT_WENT = 499  # nginx's status for it, in metrics only
OUTCOME = "yuzogpt.outcome"  # in a request's scope
# With it, Serve's proxy does not tell when a client has gone, whose slot would stay taken.
DEAF = "x-request-disconnect-disabled"

log = sparing_logger(__name__)


def read_keys(file: str) -> tuple[bytes, ...]:
    """Return the SHA-256 of each key in a file; UserError if it is open to others, or has none."""
    if not file:
        return ()
    path = Path(file)
    check_not_public(path, "api_keys_file")
    try:
        lines = read_file(path, MOST_OF_KEYS).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"--api_keys_file={file}: not UTF-8; one key a line") from None
    keys = []
    for number, line in enumerate(lines, 1):
        key = line.strip()
        if not key or key.startswith("#"):
            continue
        wrong = ""
        if not (key.isascii() and key.isprintable()):  # nothing else arrives in a header as it is
            wrong = "has characters that are not ASCII, or no characters"
        elif len(key) < SHORTEST_KEY:
            wrong = f"is shorter than {SHORTEST_KEY} characters"
        if wrong:
            raise UserError(
                f"--api_keys_file={file}: line {number}: the key {wrong}; make one: "
                "openssl rand -hex 32"
            )
        keys.append(sha256(key.encode()).digest())
    if not keys:
        raise UserError(f"--api_keys_file={file}: no key in it; one a line")
    return tuple(keys)


def is_loopback(host: str) -> bool:
    """Tell whether an address or name is this machine's alone."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


@dataclass
class TokenBucket:
    """A key's requests: as many at once as a minute allows, and then as they come back."""

    per_minute: float
    left: float
    since: float = field(default_factory=time.monotonic)

    def take(self) -> float:
        """Take one; return 0, or the seconds until there is one."""
        now = time.monotonic()
        per_second = self.per_minute / 60
        # A share below one must be able to grow to one.
        self.left = min(max(1.0, self.per_minute), self.left + (now - self.since) * per_second)
        self.since = now
        if self.left < 1:
            return (1 - self.left) / per_second
        self.left -= 1
        return 0.0


@dataclass
class Outcome:
    """How a request ended, for the metrics; a stream that fails has sent its status before."""

    status: int = CLIENT_WENT
    went_early: bool = False  # before all of the body was here: whatever is answered, nobody hears


class AuthMiddleware:
    """ASGI middleware that refuses what need not be looked at, and counts how requests end."""

    def __init__(
        self,
        app: ASGIApp,
        keys: Sequence[bytes],
        limits: LimitSettings,
        replicas: int,
        requests: Counter,
    ) -> None:
        """`keys`: their SHA-256; none: everybody on this machine. `replicas` share out the rate."""
        self.app = app
        self.keys = keys
        self.limits = limits
        self.per_minute = limits.requests_per_minute / max(1, replicas)
        self.requests = requests
        self.allowances: dict[bytes, TokenBucket] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse, or pass on with a body that ends at its limit."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = get_route_path(scope)  # what the router goes by: without the prefix of a proxy
        scope[OUTCOME] = outcome = Outcome()

        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start" and not outcome.went_early:
                outcome.status = message["status"]
            await send(message)

        try:
            self._admit(path, scope)
            await self.app(scope, self._limited(receive, outcome), noted)
        except APIError as refusal:
            if refusal.status_code in STRANGERS:
                asked = ascii(f"{scope['method']} {path}"[:MOST_OF_A_PATH])
                log.warning("%d for %s: %s", refusal.status_code, peer_of(scope), asked)
            await refusal.response()(scope, receive, noted)
        except Exception:
            outcome.status = 500
            raise
        finally:
            if path == COUNTED:
                self.requests.labels(str(outcome.status)).inc()

    def _admit(self, path: str, scope: Scope) -> None:
        headers = Headers(scope=scope)
        if not self.keys and not (is_loopback(host_of(headers)) and is_loopback(peer_of(scope))):
            # A page from elsewhere whose name was made to lead here (DNS rebinding); or a proxy in
            # front that listens to more than it was told to.
            raise APIError(403, "without keys, only requests to localhost are answered")
        if path not in OPEN:
            key = self._authorize(headers)
            if path == COUNTED:
                self._count(key)
        if DEAF in headers:
            raise APIError(400, f"{DEAF}: not allowed here")
        check_length(headers, self.limits.max_body_bytes)

    def _authorize(self, headers: Headers) -> bytes:
        """Return the digest of the caller's key; all are compared, in constant time."""
        if not self.keys:
            return b""
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise APIError(401, "no API key; send the header Authorization: Bearer YOUR_KEY")
        given = sha256(key.strip().encode()).digest()
        if not any([hmac.compare_digest(given, known) for known in self.keys]):  # noqa: C419
            raise APIError(401, "this API key is not known here", code="invalid_api_key")
        return given

    def _count(self, key: bytes) -> None:
        if not self.limits.requests_per_minute:
            return
        full = TokenBucket(self.per_minute, max(1.0, self.per_minute))
        wait = self.allowances.setdefault(key, full).take()
        if wait:
            raise APIError(
                429,
                f"more than {self.limits.requests_per_minute} requests in a minute with this key",
                code="rate_limit_exceeded",
                retry_after=wait,
            )

    def _limited(self, receive: Receive, outcome: Outcome) -> Receive:
        """Return `receive` that refuses a body past its limits, whatever its head said."""
        seen, patience = 0, min(UPLOADED_WITHIN, self.limits.deadline)
        until: float | None = asyncio.get_running_loop().time() + patience

        async def limited() -> Message:
            nonlocal seen, until
            try:
                async with asyncio.timeout_at(until):
                    message = await receive()
            except TimeoutError:
                raise APIError(408, f"the body did not come within {patience:g} s") from None
            if message["type"] == "http.disconnect" and until is not None:
                outcome.went_early = True
            if not message.get("more_body"):
                until = None  # what comes now is that the client goes
            seen += len(message.get("body", b""))
            if seen > self.limits.max_body_bytes:
                raise too_large(self.limits.max_body_bytes)
            return message

        return limited


def check_length(headers: Headers, most: int) -> None:
    """Refuse a body whose head says that it is too large."""
    length = headers.get("content-length", "0")
    if length.isdecimal() and (len(length) > DIGITS or int(length) > most):
        raise too_large(most)


def too_large(most: int) -> APIError:
    """Return the refusal of a body."""
    return APIError(413, f"the body has more than {most} bytes")


def host_of(headers: Headers) -> str:
    """Return the name or address that a client called, without its port."""
    host = headers.get("host", "")
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def peer_of(scope: Scope) -> str:
    """Return the address that a request came from; empty if that is not known."""
    return str((scope.get("client") or ("", 0))[0])
