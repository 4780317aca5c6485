"""API keys, rate limits and body limits: checked on a request's head, before its body is read.

Ray Serve's proxy has no such limits of its own.
"""

import asyncio
import hmac
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from ipaddress import ip_address
from pathlib import Path

from prometheus_client import Counter
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from yuzogpt.config import LimitSettings
from yuzogpt.errors import UserError
from yuzogpt.serving.errors import APIError
from yuzogpt.serving.rate_limited_log import rate_limited_logger
from yuzogpt.storage.atomic_files import check_not_public
from yuzogpt.storage.untrusted import read_file

try:  # private, but what the router itself uses: both must see the same path
    from starlette._utils import get_route_path
except ImportError:

    def get_route_path(scope: Scope) -> str:
        """Return a request's path without `root_path`, the prefix of a reverse proxy."""
        path, root = str(scope["path"]), str(scope.get("root_path", ""))
        is_below = root and (path == root or path.startswith(f"{root}/"))
        return path[len(root) :] if is_below else path


COMPLETIONS_PATH = "/v1/completions"
# If there are API keys, all other paths need one. The router's "" leads to "/".
PUBLIC_PATHS = ("", "/", "/page.js", "/page.css", "/healthz", "/metrics")
MIN_KEY_LENGTH = 16
LOGGED_STATUSES = (401, 403)
MAX_LOGGED_LENGTH = 100  # of a method and path
MAX_KEYS_FILE_BYTES = 2**20
UPLOAD_TIMEOUT_S = 30.0  # of a body, which takes up capacity; the deadline counts, too
MAX_LENGTH_DIGITS = 20  # of Content-Length; int() raises above some thousand
CLIENT_CLOSED_REQUEST = 499  # nginx's status, in metrics only
OUTCOME_KEY = "yuzogpt.outcome"  # in a request's scope
# With it, Serve's proxy would not report disconnects, and the request would keep its slot.
DISCONNECT_DISABLED_HEADER = "x-request-disconnect-disabled"

log = rate_limited_logger(__name__)


def read_keys(file: str) -> tuple[bytes, ...]:
    """Return the SHA-256 of each key in a file; UserError if it has none or others may read it."""
    if not file:
        return ()
    path = Path(file)
    check_not_public(path, "api_keys_file")
    try:
        lines = read_file(path, MAX_KEYS_FILE_BYTES).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"--api_keys_file={file}: not UTF-8; one key a line") from None
    keys = []
    for number, line in enumerate(lines, 1):
        key = line.strip()
        if not key or key.startswith("#"):
            continue
        mistake = ""
        if not (key.isascii() and key.isprintable()):  # headers change other characters
            mistake = "has characters that are not printable ASCII"
        elif len(key) < MIN_KEY_LENGTH:
            mistake = f"is shorter than {MIN_KEY_LENGTH} characters"
        if mistake:
            raise UserError(
                f"--api_keys_file={file}: line {number}: the key {mistake}; make one: "
                "openssl rand -hex 32"
            )
        keys.append(sha256(key.encode()).digest())
    if not keys:
        raise UserError(f"--api_keys_file={file}: no key in it; one a line")
    return tuple(keys)


def is_loopback(host: str) -> bool:
    """Return True if an address or name is this machine's loopback."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


class TokenBucket:
    """The request rate of one key: a full bucket allows a burst of one minute's requests."""

    def __init__(self, per_minute: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.per_second = per_minute / 60
        # A replica's share of the rate may be below 1; its bucket must still hold one request.
        self.capacity = max(1.0, per_minute)
        self.tokens = self.capacity
        self.clock = clock
        self.updated = clock()

    def take(self) -> float:
        """Take a token and return 0, or return the seconds until there is one."""
        now = self.clock()
        self.tokens = min(self.capacity, self.tokens + (now - self.updated) * self.per_second)
        self.updated = now
        if self.tokens < 1:
            return (1 - self.tokens) / self.per_second
        self.tokens -= 1
        return 0.0


@dataclass
class Outcome:
    """How a request ended, for the metrics: a stream that fails has already sent status 200."""

    status: int = CLIENT_CLOSED_REQUEST
    left_during_upload: bool = False  # no status that is sent now reaches the client


class AuthMiddleware:
    """ASGI middleware: API keys, rate and size limits, and a count of requests by their outcome."""

    def __init__(
        self,
        app: ASGIApp,
        keys: Sequence[bytes],
        limits: LimitSettings,
        replicas: int,
        request_counter: Counter,
    ) -> None:
        """`keys`: SHA-256 digests; none: requests from this machine. `replicas` share the rate."""
        self.app = app
        self.keys = keys
        self.limits = limits
        self.per_minute = limits.requests_per_minute / max(1, replicas)
        self.request_counter = request_counter
        self.buckets: dict[bytes, TokenBucket] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse a request, or pass it on with its body limited."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = get_route_path(scope)
        scope[OUTCOME_KEY] = outcome = Outcome()

        async def recording_send(message: Message) -> None:
            if message["type"] == "http.response.start" and not outcome.left_during_upload:
                outcome.status = message["status"]
            await send(message)

        try:
            self._admit(path, scope)
            await self.app(scope, self._limited(receive, outcome), recording_send)
        except APIError as refusal:
            if refusal.status_code in LOGGED_STATUSES:
                line = ascii(f"{scope['method']} {path}"[:MAX_LOGGED_LENGTH])
                log.warning("%d for %s: %s", refusal.status_code, client_address(scope), line)
            await refusal.response()(scope, receive, recording_send)
        except Exception:
            outcome.status = 500
            raise
        finally:
            if path == COMPLETIONS_PATH:
                self.request_counter.labels(str(outcome.status)).inc()

    def _admit(self, path: str, scope: Scope) -> None:
        headers = Headers(scope=scope)
        if not self.keys and not (
            is_loopback(requested_host(headers)) and is_loopback(client_address(scope))
        ):
            # DNS rebinding: a foreign page whose host name resolves to this machine. Or a reverse
            # proxy that is open to other machines.
            raise APIError(403, "without keys, only requests to localhost are answered")
        if path not in PUBLIC_PATHS:
            key = self._authorize(headers)
            if path == COMPLETIONS_PATH:
                self._check_rate(key)
        if DISCONNECT_DISABLED_HEADER in headers:
            raise APIError(400, f"{DISCONNECT_DISABLED_HEADER}: not allowed here")
        check_content_length(headers, self.limits.max_body_bytes)

    def _authorize(self, headers: Headers) -> bytes:
        """Return the digest of the request's key, compared with all keys in constant time."""
        if not self.keys:
            return b""
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise APIError(401, "no API key; send the header Authorization: Bearer YOUR_KEY")
        given = sha256(key.strip().encode()).digest()
        if not any([hmac.compare_digest(given, known) for known in self.keys]):  # noqa: C419
            raise APIError(401, "unknown API key", code="invalid_api_key")
        return given

    def _check_rate(self, key: bytes) -> None:
        if not self.limits.requests_per_minute:
            return
        if wait := self.buckets.setdefault(key, TokenBucket(self.per_minute)).take():
            raise APIError(
                429,
                f"more than {self.limits.requests_per_minute} requests in a minute with this key",
                code="rate_limit_exceeded",
                retry_after=wait,
            )

    def _limited(self, receive: Receive, outcome: Outcome) -> Receive:
        """Wrap `receive` so that it refuses a body that is too large or too slow."""
        num_bytes, timeout = 0, min(UPLOAD_TIMEOUT_S, self.limits.deadline)
        deadline: float | None = asyncio.get_running_loop().time() + timeout

        async def limited() -> Message:
            nonlocal num_bytes, deadline
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise APIError(408, f"the body did not come within {timeout:g} s") from None
            if message["type"] == "http.disconnect" and deadline is not None:
                outcome.left_during_upload = True
            if not message.get("more_body"):
                deadline = None  # the body is complete; only a disconnect can follow
            num_bytes += len(message.get("body", b""))
            if num_bytes > self.limits.max_body_bytes:
                raise body_too_large(self.limits.max_body_bytes)
            return message

        return limited


def check_content_length(headers: Headers, max_bytes: int) -> None:
    """Raise APIError if Content-Length is above the limit."""
    length = headers.get("content-length", "0")
    if length.isdecimal() and (len(length) > MAX_LENGTH_DIGITS or int(length) > max_bytes):
        raise body_too_large(max_bytes)


def body_too_large(max_bytes: int) -> APIError:
    """Return the error for a body above the limit."""
    return APIError(413, f"the body has more than {max_bytes} bytes")


def requested_host(headers: Headers) -> str:
    """Return the host of a request's Host header, without its port."""
    host = headers.get("host", "")
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def client_address(scope: Scope) -> str:
    """Return the address that a request came from; empty if unknown."""
    return str((scope.get("client") or ("", 0))[0])
