"""The app in this process: prefixes, peers, clients that do not read, counts, looks at a run."""

import asyncio
import contextlib
import json
import math
import os
import re
import threading
from hashlib import sha256

import httpx
import pytest

from tests.serving.services import SLOW, write_checkpoint
from yuzogpt import checkpoints
from yuzogpt.config import ServeSettings
from yuzogpt.config.resolve import resolve
from yuzogpt.serving import answer, model_slot
from yuzogpt.serving.access import DEAF
from yuzogpt.serving.app import build
from yuzogpt.serving.errors import to_json
from yuzogpt.serving.loss_curve import LossCurve

KEY = "sk-a-key-that-is-long-enough"
ASKED = {"model": "run", "prompt": "bead", "max_tokens": 1}
HERE = ("127.0.0.1", 40000)
POST = {
    "type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"",
    "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
    "client": HERE, "server": ("localhost", 80),
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("gate") / "run"
    write_checkpoint(directory, 20, 2.0, **SLOW)
    return directory


@contextlib.asynccontextmanager
async def at_work(run, *flags, key=None):
    """Yield the app, its model loaded."""
    flags = [f"--model={run}", "--device=cpu", "--threads=1", "--num_replicas=0", *flags]
    app = build(resolve(ServeSettings, [], flags), [sha256(key.encode()).digest()] if key else [])
    async with app.router.lifespan_context(app):
        yield app


def client_of(app, root_path="", peer=HERE) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app, root_path=root_path, client=peer)
    return httpx.AsyncClient(transport=transport, base_url=f"http://localhost{root_path}")


def counted(app) -> dict[str, float]:
    """Return how many requests ended with which status."""
    text = app.state.metrics_text()
    found = re.findall(r'^yuzogpt_requests_total\{status="(\d+)"\} (\S+)$', text, re.MULTILINE)
    return {status: float(number) for status, number in found}


@pytest.mark.parametrize("root_path", ["", "/llm"])
def test_only_the_page_and_what_watches_need_no_key(run, root_path):
    async def look() -> None:
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
                (await client.post("/v1/completions", json=ASKED, headers=bearer)).status_code
                for _ in range(3)
            ]
            assert statuses == [200, 200, 429]

    asyncio.run(look())


def test_without_keys_a_request_must_come_from_this_machine(run):
    async def look() -> None:
        async with at_work(run) as app:
            for peer, status in ((HERE, 200), (("::1", 1), 200), (("192.0.2.7", 1), 403)):
                async with client_of(app, peer=peer) as client:
                    assert (await client.get("/v1/models")).status_code == status
            async with client_of(app) as client:
                twice = [(DEAF, ""), (DEAF, "1")]
                assert (await client.get("/v1/models", headers=twice)).status_code == 400

    asyncio.run(look())


def test_a_name_of_this_machine_in_capitals(run):
    async def look() -> None:
        async with at_work(run) as app, client_of(app) as client:
            for host, status in (("LOCALHOST:8000", 200), ("LocalHost", 200), ("LOCALHOST.x", 403)):
                answer = await client.get("/v1/models", headers={"Host": host})
                assert answer.status_code == status, host

    asyncio.run(look())


def test_head_is_answered_where_get_is(run):
    async def look() -> None:
        async with at_work(run) as app, client_of(app) as client:
            for path in ("/", "/page.js", "/page.css", "/healthz", "/metrics", "/v1/models"):
                head, whole = await client.head(path), await client.get(path)
                assert head.status_code == 200, path
                assert head.headers["content-type"] == whole.headers["content-type"]

    asyncio.run(look())


def test_a_field_of_null_is_absent(run):
    nothing = "suffix logit_bias stop best_of user n stream stream_options functions tools".split()

    async def look() -> None:
        async with at_work(run) as app, client_of(app) as client:
            asked = {**ASKED, "temperature": 0, "max_tokens": 5}
            expected = (await client.post("/v1/completions", json=asked)).json()["choices"]
            nulls = {**asked, **dict.fromkeys(nothing)}
            answer = await client.post("/v1/completions", json=nulls)
            assert answer.json()["choices"] == expected
            options = {"stream": True, "stream_options": {"include_usage": None, "x": None}}
            answer = await client.post("/v1/completions", json={**asked, **options})
            assert answer.status_code == 200

    asyncio.run(look())


@pytest.mark.parametrize("allowed", ["", "https://app.example", "*"])
def test_pages_of_allowed_origins_may_use_it(run, allowed):
    async def look() -> None:
        origins = [f"--allowed_origins=http://localhost:3000,{allowed}"] if allowed else []
        async with at_work(run, *origins, key=KEY) as app, client_of(app) as client:
            asking = {
                "Access-Control-Request-Method": "POST",
                "Access-Control-Request-Headers": "authorization,content-type,x-stainless-lang",
            }
            for origin, may in (
                ("https://app.example", bool(allowed)),
                ("http://localhost:3000", bool(allowed)),
                ("https://app.example.evil.example", allowed == "*"),
            ):
                names = {"Origin": origin}
                asked = await client.options("/v1/completions", headers={**asking, **names})
                assert (asked.status_code == 200) == may
                # Refusals, too, can be read by a page that may ask.
                for headers in ({}, {"Authorization": f"Bearer {KEY}"}):
                    answer = await client.post(
                        "/v1/completions", json=ASKED, headers={**names, **headers}
                    )
                    assert answer.status_code == (200 if headers else 401)
                    found = answer.headers.get("Access-Control-Allow-Origin")
                    assert (found in (origin, "*")) == may

    asyncio.run(look())


def strict(answer: httpx.Response):
    """Return the JSON of an answer; NaN and Infinity are none."""

    def refuse(word):
        raise AssertionError(word)

    assert answer.status_code == 200, answer.text
    return json.loads(answer.text, parse_constant=refuse)


def test_numbers_that_json_has_no_word_for_are_null(tmp_path):
    run = tmp_path / "run"
    write_checkpoint(run, 20, math.nan, **SLOW)

    async def look() -> None:
        async with at_work(run) as app, client_of(app) as client:
            (model,) = strict(await client.get("/v1/models"))["data"]
            assert model["val_loss_estimate"] is None
            assert strict(await client.get("/v1/models/run"))["val_loss_estimate"] is None
            app.state.serving.now.driver.engine.model.ln_f.weight.data.fill_(math.nan)
            asked = {**ASKED, "temperature": 0, "echo": True, "logprobs": 1}
            (choice,) = strict(await client.post("/v1/completions", json=asked))["choices"]
            assert choice["logprobs"]["token_logprobs"] == [None] * 5
            answer = await client.post("/v1/completions", json={**asked, "stream": True})
            assert answer.text.endswith("data: [DONE]\n\n")
            assert "NaN" not in answer.text
            drawn = await client.post("/v1/completions", json={**ASKED, "max_tokens": 3})
            assert strict(drawn)["choices"][0]["finish_reason"] == "length"

    asyncio.run(look())


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
        found = json.loads(to_json(curve.read()))
        numbers = [number for points in found.values() for point in points for number in point]
        assert all(math.isfinite(number) and number < 2**53 for number in numbers)


def test_every_end_is_counted(run):
    async def look() -> None:
        flags = "--requests_per_minute=100", "--max_body_bytes=200", "--max_waiting=0"
        async with at_work(run, *flags, "--max_batch=2") as app, client_of(app) as client:
            bodies = {
                200: ASKED,
                400: {**ASKED, "temperature": -1},
                404: {**ASKED, "model": "x"},
                413: {**ASKED, "prompt": "a" * 300},
            }
            for status, body in bodies.items():
                assert (await client.post("/v1/completions", json=body)).status_code == status
            # More than there is ever room for: not 503, which says that it may be tried again.
            many = await client.post("/v1/completions", json={**ASKED, "n": 3})
            assert many.status_code == 400
            assert "room for 2 at a time" in many.json()["error"]["message"]
            elsewhere = {"Host": "evil.example"}
            assert (await client.post("/v1/completions", headers=elsewhere)).status_code == 403
            app.state.serving.now.driver.engine.tokenizer = None  # whatever may break
            with pytest.raises(AttributeError):
                await client.post("/v1/completions", json=ASKED)
            assert counted(app) == {
                "200": 1, "400": 2, "404": 1, "413": 1, "403": 1, "500": 1,
            }  # fmt: skip

    asyncio.run(look())


def test_a_client_that_goes_in_the_middle_of_its_upload_made_no_mistake(run):
    async def look() -> None:
        async with at_work(run) as app:
            part = {"type": "http.request", "body": b'{"model', "more_body": True}
            messages = [{"type": "http.disconnect"}, part]

            async def receive():
                return messages.pop()

            async def send(message):
                pass

            await app(dict(POST), receive, send)
            assert counted(app) == {"499": 1}

    asyncio.run(look())


def test_a_share_of_the_rate_below_one_is_one_at_a_time(run):
    async def look() -> None:
        flags = f"--model={run}", "--device=cpu", "--threads=1", "--num_replicas=1..4"
        settings = resolve(ServeSettings, [], [*flags, "--requests_per_minute=3"])
        app = build(settings)
        async with app.router.lifespan_context(app), client_of(app) as client:
            first = await client.post("/v1/completions", json=ASKED)
            second = await client.post("/v1/completions", json=ASKED)
            assert (first.status_code, second.status_code) == (200, 429)
            assert 60 <= int(second.headers["Retry-After"]) <= 82  # 3 / 4 a minute

    asyncio.run(look())


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_does_not_read_keeps_its_places_until_the_deadline(run, stream, monkeypatch):
    monkeypatch.setattr(answer, "LAST_WORDS", 0.2)

    async def look() -> None:
        async with at_work(run, "--deadline=1", "--max_new_tokens=100000") as app:
            full, driver = asyncio.Event(), app.state.serving.now.driver
            tokens = 100_000 if stream else 5
            body = {**ASKED, "max_tokens": tokens, "stream": stream}
            messages = [{"type": "http.request", "body": json.dumps(body).encode()}]

            async def receive():
                return messages.pop() if messages else await asyncio.Event().wait()

            async def send(message):
                if message["type"] == "http.response.body":
                    full.set()
                    await asyncio.Event().wait()  # as uvicorn: until there is room again

            asking = asyncio.create_task(app(dict(POST), receive, send))
            await full.wait()
            assert driver.taken == stream  # a whole answer is sent when its places are free
            await asyncio.wait_for(asking, 5)
            assert driver.taken == 0
            assert counted(app) == {"499": 1}

    asyncio.run(look())


def test_a_checkpoint_that_its_run_deletes_while_it_is_loaded_is_looked_up_again(
    run, tmp_path, monkeypatch
):
    """What is said to serve is what was read."""
    mine = tmp_path / "run"
    write_checkpoint(mine, 20, 2.0, **SLOW)
    load = model_slot.load_engine

    def slowly(reference, *arguments, **options):
        if reference.checkpoint.state.step == 20:
            write_checkpoint(mine, 40, 1.9, seed=2, **SLOW)
            checkpoints.remove(mine / "checkpoints" / "step-20")
        return load(reference, *arguments, **options)

    monkeypatch.setattr(model_slot, "load_engine", slowly)

    async def look() -> None:
        async with at_work(mine) as app:
            assert app.state.serving.now.step == 40

    asyncio.run(look())
    assert [path.name for path in checkpoints.candidates(mine)] == ["step-40"]


def looks(serving) -> "asyncio.Queue[None]":
    """Return a queue that grows with every look at the run that has ended."""
    found, loop, look = asyncio.Queue(), asyncio.get_running_loop(), serving._look

    def counted_look(passed_over):
        try:
            return look(passed_over)
        finally:
            loop.call_soon_threadsafe(found.put_nowait, None)

    serving._look = counted_look
    return found


async def two(looked) -> None:
    """Wait until a look that begins from now on has ended: the next may have begun before."""
    while not looked.empty():
        looked.get_nowait()
    await looked.get()
    await looked.get()


FOLLOWING = "--follow", "--follow_interval=0.05"


def test_worse_weights_are_not_taken_even_when_the_best_are_deleted(tmp_path):
    mine = tmp_path / "run"
    write_checkpoint(mine, 20, 2.0, **SLOW)

    async def look() -> None:
        async with at_work(mine, *FOLLOWING) as app:
            serving = app.state.serving
            looked = looks(serving)
            write_checkpoint(mine, 40, 2.5, seed=2, **SLOW)
            checkpoints.remove(mine / "checkpoints" / "step-20")
            await two(looked)
            assert serving.now.step == 20
            write_checkpoint(mine, 60, 1.8, seed=3, **SLOW)
            while serving.now.step != 60:
                await looked.get()
            checkpoints.remove(mine / "checkpoints" / "step-60")
            write_checkpoint(mine, 80, 1.85, seed=4, **SLOW)
            await two(looked)
            assert serving.now.step == 60

    asyncio.run(asyncio.wait_for(look(), 60))


def test_what_may_pass_is_told_once_and_tried_again(tmp_path, monkeypatch, capfd):
    """No memory for the best: the second best serves until there is."""
    mine = tmp_path / "run"
    write_checkpoint(mine, 20, 2.0, **SLOW)
    load, is_short = model_slot.load_engine, True

    def short(reference, *arguments, **options):
        if is_short and reference.checkpoint.state.step == 40:
            raise MemoryError
        return load(reference, *arguments, **options)

    monkeypatch.setattr(model_slot, "load_engine", short)

    async def look() -> None:
        nonlocal is_short
        async with at_work(mine, *FOLLOWING) as app:
            serving = app.state.serving
            looked = looks(serving)
            write_checkpoint(mine, 40, 1.5, seed=2, **SLOW)
            write_checkpoint(mine, 60, 1.9, seed=3, **SLOW)
            while serving.now.step != 60:
                await looked.get()
            await two(looked)
            is_short = False
            while serving.now.step != 40:
                await looked.get()
            # Those that failed, and those that served before, have left no thread behind.
            while sum(thread.name.startswith("engine") for thread in threading.enumerate()) > 1:
                await looked.get()

    asyncio.run(asyncio.wait_for(look(), 60))
    assert capfd.readouterr().err.count("step-40: MemoryError") == 1


def test_a_checkpoint_that_is_deleted_while_it_is_verified_is_not_called_corrupt(
    tmp_path, monkeypatch, capfd
):
    mine = tmp_path / "run"
    write_checkpoint(mine, 20, 2.0, **SLOW)

    async def look() -> None:
        async with at_work(mine, *FOLLOWING) as app:
            looked, verify = looks(app.state.serving), checkpoints.verify
            was_gone = asyncio.Event()
            loop = asyncio.get_running_loop()

            def late(checkpoint, **options):
                if checkpoint.name == "step-40":
                    checkpoints.remove(checkpoint.local)
                    loop.call_soon_threadsafe(was_gone.set)
                return verify(checkpoint, **options)

            better = write_checkpoint(tmp_path / "elsewhere", 40, 1.5, seed=2, **SLOW)
            monkeypatch.setattr(checkpoints, "verify", late)
            better.rename(mine / "checkpoints" / "step-40")
            await was_gone.wait()
            await two(looked)
            assert app.state.serving.now.step == 20

    asyncio.run(asyncio.wait_for(look(), 60))
    assert capfd.readouterr().err == ""
