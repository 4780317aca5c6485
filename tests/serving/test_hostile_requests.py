"""Hundreds of hostile bodies and heads, at every path: each is refused in words, nothing breaks."""

import json
import random
import re
import socket
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import psutil
import pytest

from tests.serving.services import Service, service, write_checkpoint

pytestmark = pytest.mark.slow

PATHS = (
    "/v1/completions", "/v1/chat/completions", "/v1/models", "/v1/models/run", "/v1/run", "/",
    "/page.js", "/healthz", "/metrics", "/nothing",
)  # fmt: skip
FIELDS = (
    "model", "prompt", "max_tokens", "n", "stream", "stream_options", "echo", "logprobs", "stop",
    "seed", "temperature", "top_p", "user", "top_k", "min_p", "repetition_penalty", "ignore_eos",
    "best_of", "suffix", "frequency_penalty", "logit_bias", "unknown",
)  # fmt: skip
# Values as JSON's text: much of it json.dumps would not write.
VALUES = (
    "null", "true", "-1", "0", "1.5", "1e999", "-1e999", "NaN", "-Infinity", "9" * 30, "9" * 400,
    "-" + "9" * 400, "9" * 5000, '""', '"a"', '"\\ud800"', '"\\udfff\\ud800"', '"\\u0000"',
    '"' + "a" * 3000 + '"', "[]", "[[]]", "[null]", '[""]', '["a", 1]', "[1, -1]", "[1e300]",
    "[" + "9" * 30 + "]", "[[1], [2.5]]", "[true]", "{}", '{"a": null}', '{"include_usage": 7}',
    '{"": {"": {}}}', "[" * 500 + "]" * 500, "[" * 100_000, '{"a":' * 500 + "1" + "}" * 500,
)  # fmt: skip
BODIES = (
    b"",
    b"\x00",
    b"\xff\xfe{\x00}\x00",
    b"{",
    b"[]",
    b"5",
    b'"a"',
    b"null",
    b"{}{}",
    b"[" * 200_000,
    b'{"a":' * 100_000,
    b"9" * 100_000,
    b'{"model": "run", "prompt": "\xed\xa0\x80"}',
    b'{"model": "run", "model": 5}',
    b'\xef\xbb\xbf{"model": "run", "max_tokens": 1}',
    json.dumps({str(n): None for n in range(50_000)}).encode(),
)
HEADERS = (
    b"Content-Length: " + b"9" * 5000,
    b"Content-Length: -1",
    b"Content-Length: +5",
    b"Content-Length: 1\r\nContent-Length: 2",
    b"Transfer-Encoding: gzip",
    b"Content-Length: \xb2",
    b"Transfer-Encoding: chunked\r\nContent-Length: 3",
    b"a" * 70_000 + b": b",
    b"a: " + b"b" * 70_000,
    b"\x00: a",
    b"a\xff: b",
    b"a: \xff\xfe",
    b"a: \x00",
    b": a",
    b" a: b",
    b"a b",
    b"Host: \xff",
    b"Host: [",
    b"Host: ]:",
    b"Host:",
    b"Host: localhost:x\r\nHost: b",
    b"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: a",
    b"Upgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: ",
    b"Expect: 100-continue",
    b"Authorization: Bearer \xff",
    b"Authorization: \x80 \x80",
    b"Content-Type: application/json; charset=\xff",
    b"Content-Type: ;",
    b"X-Request-ID: \xff\xff",
    b"Origin: \xff",
    b"Range: bytes=9-1,-,,",
    b"Cookie: \xff",
    b"If-None-Match: \xff",
    b"X-Forwarded-For: \xff",
    b"X-Forwarded-Proto: \x80",
)
STARTS = (
    b"GET /%ff%00 HTTP/1.1",
    b"GET /v1/models/%ed%a0%80 HTTP/1.1",
    b"GET /\xff HTTP/1.1",
    b"GET * HTTP/1.1",
    b"GET http://[/ HTTP/1.1",
    b"GET //evil.example/ HTTP/1.1",
    b"OPTIONS * HTTP/1.1",
    b"CONNECT a:1 HTTP/1.1",
    b"PRI * HTTP/2.0",
    b"GET / HTTP/9.9",
    b"GET /",
    b"\x16\x03\x01\x02\x00\x01",
    b"",
    b"GET  HTTP/1.1",
    b"GET /?" + b"a=b&" * 10_000 + b" HTTP/1.1",
    b"X" * 300 + b" / HTTP/1.1",
    b"get / HTTP/1.1",
    b"GET /\r / HTTP/1.1",
)
CHUNKS = (
    b"0\r\n\r\n", b"ffffffffffffffffffff\r\n", b"-1\r\n\r\n", b"5\r\nabc", b"1;" + b"a" * 70_000,
    b"1\r\na\r\n0\r\n" + b"a: b\r\n" * 20_000, b"zz\r\n\r\n", b"2\r\n{}\r\n0\r\n\r\n",
)  # fmt: skip
JSON_TYPE = b"Content-Type: application/json"


def requests() -> list[bytes]:
    """Return requests as they go over the wire, the same each time."""
    chance = random.Random(1)
    bodies = [*BODIES]
    for _ in range(200):
        fields = {"model": '"run"', "max_tokens": "1"}
        for _ in range(chance.randrange(1, 4)):
            fields[chance.choice(FIELDS)] = chance.choice(VALUES)
        text = ", ".join(f'"{name}": {value}' for name, value in fields.items())
        bodies.append(f"{{{text}}}".encode())
    for _ in range(40):
        body = bytearray(b'{"model": "run", "prompt": "bead", "max_tokens": 1, "stop": ["a"]}')
        for _ in range(chance.randrange(1, 5)):
            body[chance.randrange(len(body))] = chance.randrange(256)
        bodies.append(bytes(body))
    found = []
    for number, body in enumerate(bodies):
        path = "/v1/completions" if number % 4 else chance.choice(PATHS)
        length = b"Content-Length: %d" % len(body)
        found.append(request(f"POST {path} HTTP/1.1".encode(), JSON_TYPE, length) + body)
    for header in HEADERS:
        path = chance.choice(PATHS).encode()
        found += [request(b"GET " + path + b" HTTP/1.1", header)]
        found += [request(b"POST /v1/completions HTTP/1.1", JSON_TYPE, header) + b"{}"]
    found += [request(start) for start in STARTS]
    for chunk in CHUNKS:
        head = request(b"POST /v1/completions HTTP/1.1", JSON_TYPE, b"Transfer-Encoding: chunked")
        found.append(head + chunk)
    for path in PATHS:
        for method in (b"GET", b"HEAD", b"PUT", b"DELETE", b"OPTIONS", b"TRACE", b"PATCH", b"FOO"):
            found.append(request(method + b" " + path.encode() + b" HTTP/1.1"))
    return found


def request(start: bytes, *headers: bytes) -> bytes:
    """Return a request's head."""
    host = [] if any(header.startswith(b"Host") for header in headers) else [b"Host: localhost"]
    return b"\r\n".join([start, *host, b"Connection: close", *headers, b"", b""])


def answers(served: Service, content: bytes) -> list[int]:
    """Send what may be a request, and nothing more; return the statuses until it is closed."""
    address = urlsplit(served.url)
    with socket.create_connection((address.hostname, address.port), timeout=30) as connection:
        found = b""
        try:
            connection.sendall(content)
            while piece := connection.recv(2**16):
                found += piece
        except ConnectionError:  # it was closed while we still sent
            pass
    return [int(status) for status in re.findall(rb"^HTTP/1.1 (\d{3}) ", found, re.MULTILINE)]


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Service:
    directory = tmp_path_factory.mktemp("hostile") / "run"
    write_checkpoint(directory, 20, 2.0)
    flags = ("--num_replicas=0", "--threads=1", "--head_timeout=1", "--deadline=2")
    with service(directory, *flags) as running:
        yield running


def test_nothing_that_is_sent_breaks_anything(served):
    process = psutil.Process(served.process.pid)
    assert served.post(max_tokens=2).status_code == 200
    before = process.memory_info().rss
    seen, sent = set(), requests()
    with ThreadPoolExecutor(16) as pool:
        statuses = list(pool.map(lambda content: answers(served, content), sent))
    for content, found in zip(sent, statuses, strict=True):
        assert all(status < 500 or status == 503 for status in found), (found, content[:300])
        seen.update(found)
    assert {200, 400, 404, 405} <= seen
    assert served.post(max_tokens=2).status_code == 200
    assert served.gauge("running_requests") == 0
    assert process.memory_info().rss - before < 100 * 2**20
    assert not any("Traceback" in line for line in served.printed), "".join(served.printed)
    assert len(served.printed) < 100
