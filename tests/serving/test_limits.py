"""What the service refuses, and for whom: in OpenAI's JSON, and without harm to other requests."""

import contextlib
import json
import re
import socket
import threading
import time
from urllib.parse import urlsplit

import httpx
import pytest
from pydantic import ValidationError

from tests.serving.services import SLOW, Service, service, stream, write_checkpoint
from yuzogpt.serving.access import TokenBucket
from yuzogpt.serving.errors import APIError
from yuzogpt.serving.protocol import CompletionRequest

pytestmark = pytest.mark.slow

KEY = "sk-a-key-that-is-long-enough"
CANARY = "sk-another-key-nobody-may-see"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    run = tmp_path_factory.mktemp("limits") / "run"
    write_checkpoint(run, 20, 2.0, **SLOW)
    return run


@pytest.fixture(scope="module")
def slow(directory) -> Service:
    """Two slots, room for two waiting requests, and requests that take long."""
    flags = ["--max_batch=2", "--max_waiting=2", "--max_choices=4", "--max_new_tokens=100000"]
    flags += ["--max_body_bytes=10000", "--max_prompt_tokens=300", "--threads=1"]
    with service(directory, "--num_replicas=0", *flags) as running:
        yield running


def is_refused(answer: httpx.Response, status: int, message: str) -> None:
    """Compare a response with OpenAI's JSON of an error."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert message in error["message"]
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    assert error["type"] == kind


MISTAKES = {
    "not JSON": ('{"model": "run", "prompt": ', 400, "the body: not JSON"),
    "not an object": ('["run"]', 400, "give an object"),
    "nothing": ("", 400, ""),
    "not UTF-8": (b'{"model": "run", "prompt": "\xff"}', 400, ""),
    "deep": (
        '{"model": "run", "prompt": ' + "[" * 4000 + "]" * 4000 + "}",
        400,
        "nested too deeply",
    ),
    "digits": ('{"model": "run", "seed": ' + "9" * 5000 + "}", 400, "the body: not JSON"),
    "unknown field": ('{"model": "run", "promt": "a"}', 400, "promt: unknown field"),
    "unknown model": ('{"model": "gpt-4"}', 404, "'gpt-4' is not served here; 'run' is"),
    "no model": ('{"prompt": "a"}', 400, "model: "),
    "max_tokens": ('{"model": "run", "max_tokens": 1000000000}', 400, "at most 100000 here"),
    "max_tokens 1e9": ('{"model": "run", "max_tokens": 1e9}', 400, "max_tokens"),
    "fractions of tokens": ('{"model": "run", "max_tokens": 1.5}', 400, "max_tokens: "),
    "text for a number": ('{"model": "run", "max_tokens": "5"}', 400, "max_tokens: "),
    "true for a number": ('{"model": "run", "max_tokens": true}', 400, "max_tokens: "),
    "temperature": ('{"model": "run", "temperature": -1}', 400, "temperature: "),
    "NaN": ('{"model": "run", "temperature": NaN}', 400, "temperature: "),
    "Infinity": ('{"model": "run", "temperature": Infinity}', 400, "temperature: "),
    "huge number": ('{"model": "run", "temperature": 1e999}', 400, "temperature: "),
    "top_p": ('{"model": "run", "top_p": 0}', 400, "top_p: "),
    "logprobs": ('{"model": "run", "logprobs": 21}', 400, "logprobs: "),
    "n": ('{"model": "run", "n": 0}', 400, "n: "),
    "choices": ('{"model": "run", "n": 5}', 400, "n: 5 choices; at most 4 here"),
    "prompts": ('{"model": "run", "prompt": ["a","a","a"], "n": 2}', 400, "n: 6 choices"),
    "long prompt": ('{"model": "run", "prompt": "' + "a" * 301 + '"}', 400, "prompt: 301 tokens"),
    "no such token": ('{"model": "run", "prompt": [65]}', 400, "not in 0 to 64"),
    "nor with logprobs": ('{"model": "run", "prompt": [65], "logprobs": 0}', 400, "not in 0 to 64"),
    "many bad tokens": ('{"model": "run", "prompt": [' + "-1," * 3000 + "-1]}", 400, "prompt"),
    "half a pair": ('{"model": "run", "prompt": "\\ud800"}', 400, "hex escape"),
    "a field of half a pair": ('{"model": "run", "\\ud800": 1}', 400, ""),
    "a stop of half a pair": ('{"model": "run", "stop": "\\ud800"}', 400, "hex escape"),
    "many fields": (json.dumps({str(n): n for n in range(500)}), 400, "500 fields"),
    "negative token": ('{"model": "run", "prompt": [-1]}', 400, "prompt"),
    "no such character": ('{"model": "run", "prompt": "\\u00e4"}', 400, ""),
    "mixed prompt": ('{"model": "run", "prompt": ["a", 1]}', 400, "prompt"),
    "empty stop": ('{"model": "run", "stop": ""}', 400, "stop: an empty string would end"),
    "an empty stop": (
        '{"model": "run", "stop": ["a", ""]}',
        400,
        "stop: an empty string would end",
    ),
    "null in stops": ('{"model": "run", "stop": [null]}', 400, "stop.0: "),
    "a number for a stop": ('{"model": "run", "stop": 1}', 400, "stop: "),
    "a model of null": ('{"model": null}', 400, "model: Field required"),
    "huge top_k": ('{"model": "run", "top_k": 9223372036854775808}', 400, "top_k: "),
    "a number for a prompt": ('{"model": "run", "prompt": 5}', 400, "prompt: give a text"),
    "many stops": ('{"model": "run", "stop": ["a"' + ',"a"' * 16 + "]}", 400, "stop"),
    "best_of": ('{"model": "run", "best_of": 2}', 400, "best_of is not supported"),
    "suffix": ('{"model": "run", "suffix": "a"}', 400, "suffix is not supported"),
    "logit_bias": ('{"model": "run", "logit_bias": {"1": 5}}', 400, "logit_bias is not"),
    "echo": ('{"model": "run", "echo": true, "prompt": "' + "a" * 257 + '"}', 400, "echo"),
    "options": ('{"model": "run", "stream_options": {}}', 400, "stream_options is for stream"),
    "large": ('{"model": "run", "prompt": "' + "a" * 10000 + '"}', 413, "10000 bytes"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named(slow, mistake):
    content, status, message = MISTAKES[mistake]
    headers = {"Content-Type": "application/json"}
    answer = httpx.post(f"{slow.url}v1/completions", content=content, headers=headers, timeout=20)
    is_refused(answer, status, message)
    assert slow.process.poll() is None
    assert slow.gauge("running_requests") == 0


def test_what_is_not_there(slow):
    is_refused(httpx.get(f"{slow.url}v1/nothing"), 404, "")
    is_refused(httpx.get(f"{slow.url}v1/models/gpt2"), 404, "'gpt2' is not served here")
    is_refused(httpx.get(f"{slow.url}v1/completions"), 405, "")
    form = httpx.post(f"{slow.url}v1/completions", data={"model": "run"})
    is_refused(form, 400, "send the header Content-Type: application/json")
    is_refused(httpx.post(f"{slow.url}v1/chat/completions", json={}), 404, "to /v1/completions")
    is_refused(httpx.post(f"{slow.url}v1/embeddings", json={}), 404, "POST /v1/completions and GET")
    bare = httpx.post(f"{slow.url}v1/completions", content='{"model": "run", "max_tokens": 1}')
    is_refused(bare, 400, "send the header Content-Type: application/json")
    # A foreign page by DNS rebinding; and one with a media type that needs no preflight request.
    foreign = httpx.get(f"{slow.url}v1/models", headers={"Host": "evil.example"})
    is_refused(foreign, 403, "only requests to localhost")
    simple = httpx.post(
        f"{slow.url}v1/completions",
        content='{"model": "run", "max_tokens": 1}',
        headers={"Content-Type": "text/plain"},
    )
    is_refused(simple, 400, "send the header Content-Type: application/json")
    disabled = {"x-request-disconnect-disabled": "1"}
    is_refused(httpx.get(f"{slow.url}v1/models", headers=disabled), 400, "not allowed")


@pytest.mark.parametrize("says_how_long", [True, False])
def test_a_body_of_100_mb_is_not_read(slow, says_how_long):
    """It is refused while the client still sends, and the connection is closed."""
    address = urlsplit(slow.url)
    with socket.create_connection((address.hostname, address.port)) as connection:
        length = "Content-Length: 100000000" if says_how_long else "Transfer-Encoding: chunked"
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n{length}\r\n"
        connection.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode())
        sent, piece = 0, b"a" * 2**16
        if not says_how_long:
            piece = f"{len(piece):x}\r\n".encode() + piece + b"\r\n"
        with contextlib.suppress(ConnectionError):
            connection.settimeout(1)
            while sent < 10**8:
                sent += connection.send(piece)
        answer = b""
        with contextlib.suppress(ConnectionError, TimeoutError):
            answer = connection.recv(10000)
    assert answer.startswith(b"HTTP/1.1 413") or (not answer and sent < 10**8)
    assert slow.gauge("running_requests") == 0


def fill(service: Service) -> list[contextlib.ExitStack]:
    """Take all capacity with streams that run or wait; return what ends each."""
    streams = []
    for _ in range(4):
        stack = contextlib.ExitStack()
        body = {"model": "run", "prompt": "bead", "max_tokens": 100_000, "stream": True}
        stack.enter_context(
            httpx.stream("POST", f"{service.url}v1/completions", json=body, timeout=60)
        )
        streams.append(stack)
    return streams


def test_overload_is_refused_at_once_and_a_client_that_disconnects_makes_room(slow):
    streams = fill(slow)
    slow.wait_until(lambda: slow.gauge("waiting_requests") == 2)
    assert slow.gauge("running_requests") == 2
    refused = slow.post(max_tokens=1)
    is_refused(refused, 503, "overloaded: 4 of 4 places")
    assert int(refused.headers["Retry-After"]) >= 1
    # It was refused before any of the others had finished.
    assert (slow.gauge("running_requests"), slow.gauge("waiting_requests")) == (2, 2)
    for left in (3, 2, 1, 0):
        streams.pop().close()  # whether it ran or waited; to finish it would take minutes
        slow.wait_until(
            lambda left=left: (
                slow.gauge("running_requests") + slow.gauge("waiting_requests") == left
            )
        )
    assert slow.post(max_tokens=2).status_code == 200


def test_a_client_that_disconnects_before_a_whole_response_makes_room(slow):
    def ask() -> None:
        with contextlib.suppress(httpx.TimeoutException):
            httpx.post(
                f"{slow.url}v1/completions",
                json={"model": "run", "max_tokens": 100_000},
                timeout=1.0,
            )

    before = disconnected(slow)
    thread = threading.Thread(target=ask)
    thread.start()
    slow.wait_until(lambda: slow.gauge("running_requests") == 1)
    thread.join()
    slow.wait_until(lambda: slow.gauge("running_requests") == 0)  # to finish would take minutes
    assert disconnected(slow) == before + 1


def disconnected(service: Service) -> float:
    """Return how many requests were counted as ended by their client."""
    text = httpx.get(f"{service.url}metrics").text
    found = re.search(r'^yuzogpt_requests_total\{status="499"\} (\S+)$', text, re.MULTILINE)
    return float(found[1]) if found else 0


def test_a_request_ends_at_its_deadline(directory):
    flags = ("--num_replicas=0", "--deadline=1.5", "--max_new_tokens=100000", "--threads=1")
    with service(directory, *flags) as served:
        begin = time.monotonic()
        is_refused(served.post(max_tokens=100_000), 504, "not done within 1.5 s")
        assert time.monotonic() - begin >= 1.5
        *chunks, last = stream(served, max_tokens=100_000)
        assert chunks
        assert last["error"]["message"] == "not done within 1.5 s"
        assert last["error"]["code"] == "timeout"
        served.wait_until(lambda: served.gauge("running_requests") == 0)


def test_a_body_that_does_not_come_is_not_waited_for(directory):
    """It takes up capacity from its head on: on Ray, at Serve's proxy."""
    flags = ("--num_replicas=1", "--deadline=1.5", "--max_batch=1", "--max_waiting=0")
    with service(directory, *flags, "--max_choices=1", "--threads=1") as served:
        address = urlsplit(served.url)
        with socket.create_connection((address.hostname, address.port), timeout=20) as connection:
            head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n"
            connection.sendall(f'{head}Content-Type: application/json\r\n\r\n{{"model'.encode())
            served.wait_until(lambda: served.post(max_tokens=1).status_code == 503)
            answer = b"".join(iter(lambda: connection.recv(10000), b""))  # until it is closed
        assert answer.startswith(b"HTTP/1.1 408")
        assert b"the body did not come within 1.5 s" in answer
        served.wait_until(lambda: served.post(max_tokens=1).status_code == 200)


def test_a_context_that_ends_there_says_so(directory):
    flags = ("--num_replicas=0", "--context_overflow=stop", "--threads=1")
    with service(directory, *flags) as served:
        assert served.model()["context_overflow"] == "stop"
        answer = served.post(max_tokens=500).json()
        assert answer["usage"]["total_tokens"] == 257  # the last token is never fed back
        assert answer["choices"][0]["finish_reason"] == "length"
        is_refused(served.post(prompt="a" * 257), 400, "at most 256")


def test_a_key_is_needed_and_has_a_rate(directory, tmp_path):
    file = tmp_path / "keys"
    # With a byte order mark, as Notepad saves it.
    file.write_text(f"{KEY}\n# of the team\n\n{CANARY}\n", encoding="utf-8-sig")
    file.chmod(0o600)
    flags = (f"--api_keys_file={file}", "--requests_per_minute=3", "--threads=1")
    with service(directory, "--num_replicas=0", "--host=0.0.0.0", *flags) as served:
        served.url = served.url.replace("0.0.0.0", "127.0.0.1")

        def post(key: str | None) -> httpx.Response:
            headers = {} if key is None else {"Authorization": key}
            body = {"model": "run", "max_tokens": 1}
            return httpx.post(f"{served.url}v1/completions", json=body, headers=headers)

        for wrong in (None, "", "Bearer", "Basic " + KEY, KEY):
            is_refused(post(wrong), 401, "no API key")
        is_refused(post("Bearer " + KEY[:-1]), 401, "unknown API key")
        is_refused(post("Bearer # of the team"), 401, "unknown API key")
        assert post("Bearer " + KEY).headers.get("WWW-Authenticate") is None
        assert [post(f"Bearer {KEY}").status_code for _ in range(3)] == [200, 200, 429]
        refused = post(f"bearer {KEY}")
        is_refused(refused, 429, "more than 3 requests in a minute")
        assert 1 <= int(refused.headers["Retry-After"]) <= 21
        assert post(f"Bearer {CANARY}").status_code == 200  # each key has its own
        is_refused(httpx.get(f"{served.url}v1/models"), 401, "no API key")
        is_refused(httpx.get(f"{served.url}v1/run"), 401, "no API key")
        assert httpx.get(f"{served.url}healthz").status_code == 200
        assert CANARY not in httpx.get(f"{served.url}metrics").text
        for _ in range(100):
            is_refused(post("Bearer " + KEY[:-1]), 401, "unknown API key")
    assert not any(CANARY in line or KEY[:-1] in line for line in served.printed)
    # Refused clients are logged, but not each of their requests.
    logged = [line for line in served.printed if line.startswith("401 for 127.0.0.1: ")]
    assert logged[0] == "401 for 127.0.0.1: 'POST /v1/completions'\n"
    assert len(logged) < 20


def test_retry_after_is_rounded_up_to_whole_seconds():
    for seconds, header in ((0, "1"), (0.2, "1"), (1, "1"), (1.1, "2"), (2, "2"), (3, "3")):
        assert APIError(429, "", retry_after=seconds).headers["Retry-After"] == header


def test_a_token_bucket_refills_with_time():
    now = 0.0
    bucket, waits = TokenBucket(3, clock=lambda: now), []
    for _ in range(6):  # every ten seconds; a token takes twenty
        now += 10
        waits.append(bucket.take())
    assert waits[:5] == [0, 0, 0, 0, 0]
    assert waits[5] == pytest.approx(10)
    now += waits[5]
    assert bucket.take() == 0
    now += 3600
    assert [bucket.take() for _ in range(4)] == [0, 0, 0, pytest.approx(20)]


def test_of_a_million_mistakes_few_are_listed():
    """The list is made on the event loop, which serves no other request meanwhile."""
    for content in (
        {"prompt": [-1] * 1000}, {"prompt": [[-1]] * 1000}, {"prompt": ["a", *[1] * 1000]},
        {"stop": [""] * 1000}, {"logit_bias": {str(n): "x" for n in range(1000)}},
        {str(n): n for n in range(1000)},
    ):  # fmt: skip
        with pytest.raises(ValidationError) as caught:
            CompletionRequest.model_validate({"model": "run", **content})
        assert caught.value.error_count() <= 5
