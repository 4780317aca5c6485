"""The app in this process: prefixes, peers, clients that do not read, and counts."""

import asyncio
import importlib.util
import itertools
import json
import math
import os
import re
import sys

import httpx
import pytest
from starlette._utils import get_route_path

from tests.serving.services import LOCAL, SLOW, at_work, client_of, write_checkpoint
from yuzogpt.config import ServeSettings
from yuzogpt.config.resolve import resolve
from yuzogpt.serving import access, answer
from yuzogpt.serving.access import DISCONNECT_DISABLED_HEADER
from yuzogpt.serving.app import build
from yuzogpt.serving.errors import to_json
from yuzogpt.serving.loss_curve import LossCurve

KEY = "sk-a-key-that-is-long-enough"
BODY = {"model": "run", "prompt": "bead", "max_tokens": 1}
POST = {
    "type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"",
    "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
    "client": LOCAL, "server": ("localhost", 80),
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("gate") / "run"
    write_checkpoint(directory, 20, 2.0, **SLOW)
    return directory


def counted(app) -> dict[str, float]:
    """Return how many requests ended with which status."""
    text = app.state.metrics_text()
    counts = re.findall(r'^yuzogpt_requests_total\{status="(\d+)"\} (\S+)$', text, re.MULTILINE)
    return {status: float(number) for status, number in counts}


@pytest.fixture
def without_private_names(monkeypatch):
    """Import the middleware as if starlette had no `_utils`, and use its way to find the path."""
    monkeypatch.setitem(sys.modules, "starlette._utils", None)
    spec = importlib.util.spec_from_file_location("access_without", access.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.get_route_path.__module__ == "access_without"
    monkeypatch.setattr(access, "get_route_path", module.get_route_path)
    return module


def test_a_route_path_is_the_routers(without_private_names):
    for path, root_path in itertools.product(("", "/", "/a", "/ab", "/a/", "/a/b"), repeat=2):
        scope = {"type": "http", "path": path, "root_path": root_path}
        assert without_private_names.get_route_path(scope) == get_route_path(scope), scope


@pytest.mark.slow
@pytest.mark.parametrize("is_private_name_there", [True, False])
@pytest.mark.parametrize("root_path", ["", "/llm"])
def test_only_the_page_health_and_metrics_need_no_key(
    run, root_path, is_private_name_there, request
):
    if not is_private_name_there:
        request.getfixturevalue("without_private_names")

    async def check() -> None:
        async with (
            at_work(run, "--requests_per_minute=2", key=KEY) as app,
            client_of(app, root_path) as client,
        ):
            for path in ("/", "/page.js", "/page.css", "/healthz", "/metrics"):
                assert (await client.get(path)).status_code == 200, path
            closed = "/v1/models", "/v1/run", "/v1/completions", "/v1", "/openapi.json", "/x"
            for path in (*closed, "//v1/models", "/v1/../v1/models"):
                assert (await client.get(path)).status_code == 401, path
            bearer = {"Authorization": f"Bearer {KEY}"}
            assert (await client.get("/v1/models", headers=bearer)).status_code == 200
            assert (await client.get("/openapi.json", headers=bearer)).status_code == 404
            statuses = [
                (await client.post("/v1/completions", json=BODY, headers=bearer)).status_code
                for _ in range(3)
            ]
            assert statuses == [200, 200, 429]

    asyncio.run(check())


def test_without_keys_a_request_must_come_from_this_machine(run):
    async def check() -> None:
        async with at_work(run) as app:
            for peer, status in ((LOCAL, 200), (("::1", 1), 200), (("192.0.2.7", 1), 403)):
                async with client_of(app, peer=peer) as client:
                    assert (await client.get("/v1/models")).status_code == status
            async with client_of(app) as client:
                twice = [(DISCONNECT_DISABLED_HEADER, ""), (DISCONNECT_DISABLED_HEADER, "1")]
                assert (await client.get("/v1/models", headers=twice)).status_code == 400

    asyncio.run(check())


def test_a_name_of_this_machine_in_capitals(run):
    async def check() -> None:
        async with at_work(run) as app, client_of(app) as client:
            for host, status in (("LOCALHOST:8000", 200), ("LocalHost", 200), ("LOCALHOST.x", 403)):
                answer = await client.get("/v1/models", headers={"Host": host})
                assert answer.status_code == status, host

    asyncio.run(check())


def test_head_is_answered_where_get_is(run):
    async def check() -> None:
        async with at_work(run) as app, client_of(app) as client:
            for path in ("/", "/page.js", "/page.css", "/healthz", "/metrics", "/v1/models"):
                head, whole = await client.head(path), await client.get(path)
                assert head.status_code == 200, path
                assert head.headers["content-type"] == whole.headers["content-type"]

    asyncio.run(check())


def test_null_fields_count_as_absent(run):
    nothing = "suffix logit_bias stop best_of user n stream stream_options functions tools".split()

    async def check() -> None:
        async with at_work(run) as app, client_of(app) as client:
            body = {**BODY, "temperature": 0, "max_tokens": 5}
            expected = (await client.post("/v1/completions", json=body)).json()["choices"]
            nulls = {**body, **dict.fromkeys(nothing)}
            answer = await client.post("/v1/completions", json=nulls)
            assert answer.json()["choices"] == expected
            options = {"stream": True, "stream_options": {"include_usage": None, "x": None}}
            answer = await client.post("/v1/completions", json={**body, **options})
            assert answer.status_code == 200

    asyncio.run(check())


@pytest.mark.parametrize("allowed", ["", "https://app.example", "*"])
def test_pages_of_allowed_origins_may_use_it(run, allowed):
    async def check() -> None:
        origins = [f"--allowed_origins=http://localhost:3000,{allowed}"] if allowed else []
        async with at_work(run, *origins, key=KEY) as app, client_of(app) as client:
            preflight_headers = {
                "Access-Control-Request-Method": "POST",
                "Access-Control-Request-Headers": "authorization,content-type,x-stainless-lang",
            }
            for origin, may in (
                ("https://app.example", bool(allowed)),
                ("http://localhost:3000", bool(allowed)),
                ("https://app.example.evil.example", allowed == "*"),
            ):
                names = {"Origin": origin}
                preflight = await client.options(
                    "/v1/completions", headers={**preflight_headers, **names}
                )
                assert (preflight.status_code == 200) == may
                # An allowed page can read errors, too.
                for headers in ({}, {"Authorization": f"Bearer {KEY}"}):
                    answer = await client.post(
                        "/v1/completions", json=BODY, headers={**names, **headers}
                    )
                    assert answer.status_code == (200 if headers else 401)
                    allow = answer.headers.get("Access-Control-Allow-Origin")
                    assert (allow in (origin, "*")) == may

    asyncio.run(check())


def strict(answer: httpx.Response):
    """Return the JSON of an answer; NaN and Infinity are none."""

    def refuse(word):
        raise AssertionError(word)

    assert answer.status_code == 200, answer.text
    return json.loads(answer.text, parse_constant=refuse)


def test_numbers_that_json_has_no_word_for_are_null(tmp_path):
    run = tmp_path / "run"
    write_checkpoint(run, 20, math.nan, **SLOW)

    async def check() -> None:
        async with at_work(run) as app, client_of(app) as client:
            (model,) = strict(await client.get("/v1/models"))["data"]
            assert model["val_loss_estimate"] is None
            assert strict(await client.get("/v1/models/run"))["val_loss_estimate"] is None
            app.state.manager.current.engine_loop.engine.model.ln_f.weight.data.fill_(math.nan)
            body = {**BODY, "temperature": 0, "echo": True, "logprobs": 1}
            (choice,) = strict(await client.post("/v1/completions", json=body))["choices"]
            assert choice["logprobs"]["token_logprobs"] == [None] * 5
            answer = await client.post("/v1/completions", json={**body, "stream": True})
            assert answer.text.endswith("data: [DONE]\n\n")
            assert "NaN" not in answer.text
            drawn = await client.post("/v1/completions", json={**BODY, "max_tokens": 3})
            assert strict(drawn)["choices"][0]["finish_reason"] == "length"

    asyncio.run(check())


@pytest.mark.parametrize("line", [
    '{"kind": "train", "step": 1, "time": 1e300, "loss": 2.0}',
    '{"kind": "train", "step": 1e300, "time": 1.0, "loss": 2.0}',
    '{"kind": "train", "step": NaN, "time": Infinity, "loss": NaN}',
    '{"kind": "train", "step": 1, "time": 1.0, "loss": 1e999}',
    '{"kind": "train", "step": 1, "time": 1.0, "loss": ' + "9" * 400 + "}",
    '{"kind": "train", "step": ' + "9" * 400 + ', "time": 1.0, "loss": 1.0}',
    '{"kind": "train", "step": ' + "9" * 5000 + ', "time": 1.0, "loss": 1.0}',
    '{"kind": ["train"], "step": 1, "time": 1.0, "loss": 1.0}',
    '{"kind": "train", "step": "1", "time": [], "loss": {}}',
    '{"kind": "evaluation", "step": 1, "time": 1.0, "val_loss_estimate": true}',
    '{"kind": "health", "step": 1, "time": 1.0, "layers": {"a": 5}}',
    "[" * 100_000,
    "FIFO",
])  # fmt: skip
def test_a_curve_of_damaged_metrics_breaks_nothing(tmp_path, line):
    mine = tmp_path / "run"
    mine.mkdir()
    if line == "FIFO":
        os.mkfifo(mine / "metrics.jsonl")
    else:
        (mine / "metrics.jsonl").write_text(f"{line}\n")
    curve = LossCurve(str(mine))
    for _ in range(2):
        content = json.loads(to_json(curve.read()))
        numbers = [number for points in content.values() for point in points for number in point]
        assert all(math.isfinite(number) and number < 2**53 for number in numbers)


def test_every_end_is_counted(run):
    async def check() -> None:
        flags = "--requests_per_minute=100", "--max_body_bytes=200", "--max_waiting=0"
        async with at_work(run, *flags, "--max_batch=2") as app, client_of(app) as client:
            bodies = {
                200: BODY,
                400: {**BODY, "temperature": -1},
                404: {**BODY, "model": "x"},
                413: {**BODY, "prompt": "a" * 300},
            }
            for status, body in bodies.items():
                assert (await client.post("/v1/completions", json=body)).status_code == status
            # More than the capacity: not 503, which would invite a retry.
            many = await client.post("/v1/completions", json={**BODY, "n": 3})
            assert many.status_code == 400
            assert "room for 2 at a time" in many.json()["error"]["message"]
            elsewhere = {"Host": "evil.example"}
            assert (await client.post("/v1/completions", headers=elsewhere)).status_code == 403
            app.state.manager.current.engine_loop.engine.tokenizer = None  # an unexpected error
            with pytest.raises(AttributeError):
                await client.post("/v1/completions", json=BODY)
            assert counted(app) == {
                "200": 1, "400": 2, "404": 1, "413": 1, "403": 1, "500": 1,
            }  # fmt: skip

    asyncio.run(check())


def test_a_client_that_goes_in_the_middle_of_its_upload_made_no_mistake(run):
    async def check() -> None:
        async with at_work(run) as app:
            part = {"type": "http.request", "body": b'{"model', "more_body": True}
            messages = [{"type": "http.disconnect"}, part]

            async def receive():
                return messages.pop()

            async def send(message):
                pass

            await app(dict(POST), receive, send)
            assert counted(app) == {"499": 1}

    asyncio.run(check())


def test_a_share_of_the_rate_below_one_is_one_at_a_time(run):
    async def check() -> None:
        flags = f"--model={run}", "--device=cpu", "--threads=1", "--num_replicas=1..4"
        settings = resolve(ServeSettings, [], [*flags, "--requests_per_minute=3"])
        app = build(settings)
        async with app.router.lifespan_context(app), client_of(app) as client:
            first = await client.post("/v1/completions", json=BODY)
            second = await client.post("/v1/completions", json=BODY)
            assert (first.status_code, second.status_code) == (200, 429)
            assert 60 <= int(second.headers["Retry-After"]) <= 82  # 3 / 4 a minute

    asyncio.run(check())


@pytest.mark.slow
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_does_not_read_holds_capacity_until_the_deadline(run, stream, monkeypatch):
    monkeypatch.setattr(answer, "FINAL_SEND_TIMEOUT_S", 0.2)

    async def check() -> None:
        async with at_work(run, "--deadline=1", "--max_new_tokens=100000") as app:
            full, loop = asyncio.Event(), app.state.manager.current.engine_loop
            tokens = 100_000 if stream else 5
            body = {**BODY, "max_tokens": tokens, "stream": stream}
            messages = [{"type": "http.request", "body": json.dumps(body).encode()}]

            async def receive():
                return messages.pop() if messages else await asyncio.Event().wait()

            async def send(message):
                if message["type"] == "http.response.body":
                    full.set()
                    await asyncio.Event().wait()  # as uvicorn: until there is room again

            asking = asyncio.create_task(app(dict(POST), receive, send))
            await full.wait()
            assert (
                loop.admitted == stream
            )  # a whole response is sent after its capacity is released
            await asyncio.wait_for(asking, 5)
            assert loop.admitted == 0
            assert counted(app) == {"499": 1}

    asyncio.run(check())
