"""OpenAI's client gets the engine's own tokens, whole and as a stream."""

import asyncio
import json

import httpx
import openai
import pytest
import torch

from tests.checkpoints import files
from tests.inference.engines import ALPHABET, make_engine, run, small_model
from tests.serving.services import Service, service, write_checkpoint
from yuzogpt import checkpoints, tokenization
from yuzogpt.config import ServeSettings, TrainSettings
from yuzogpt.config.resolve import resolve
from yuzogpt.inference.detokenize import TextStream
from yuzogpt.inference.requests import Event, Request, SamplingParams
from yuzogpt.serving.app import build
from yuzogpt.serving.completions import Logprobs, TokenOffsets
from yuzogpt.tokenization.tokenizer import CharTokenizer, gpt2_tokenizer

pytestmark = pytest.mark.slow

PROMPT = "bead"


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Service:
    directory = tmp_path_factory.mktemp("served") / "run"
    write_checkpoint(directory, 20, 2.0)
    with service(directory, "--num_replicas=0", "--max_batch=4", "--threads=1") as running:
        yield running


@pytest.fixture(scope="module", autouse=True)
def as_many_threads_as_the_service():
    """The last bits of a product depend on how many threads share it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def client(served):
    with openai.OpenAI(base_url=f"{served.url}v1", api_key="none", max_retries=0) as running:
        yield running


def expected(tokens: int, n: int = 1, prompt: str = PROMPT, seed: int = 7, **changes):
    """Return the events of the engine itself, each request alone."""
    ids = CharTokenizer(ALPHABET).encode(prompt).tolist()
    sampling = {"temperature": 0.9, "top_p": 0.9}
    return [
        run(
            make_engine(small_model(1)),
            [Request(ids, tokens, SamplingParams(**sampling, seed=seed + i), **changes)],
        )[0]
        for i in range(n)
    ]


def text(events) -> str:
    return "".join(event.text for event in events)


SETTINGS = {"model": "run", "prompt": PROMPT, "temperature": 0.9, "top_p": 0.9, "seed": 7}


def test_a_completion_is_the_engines(client):
    answer = client.completions.create(**SETTINGS, max_tokens=40, n=3, logprobs=2, user="me")
    alone = expected(40, n=3, logprobs=2)
    assert [choice.text for choice in answer.choices] == [text(events) for events in alone]
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert {choice.finish_reason for choice in answer.choices} == {"length"}
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(PROMPT), 120)
    assert answer.usage.total_tokens == len(PROMPT) + 120
    assert answer.system_fingerprint == "step-20-float32"
    found = answer.choices[1].logprobs
    assert found.tokens == list(answer.choices[1].text)
    assert found.token_logprobs == [event.logprob for event in alone[1]]
    assert found.text_offset == list(range(len(PROMPT), len(PROMPT) + 40))
    for token, logprob, top in zip(
        found.tokens, found.token_logprobs, found.top_logprobs, strict=True
    ):
        assert top[token] == logprob
        assert 2 <= len(top) <= 3


def test_a_stream_has_the_same_tokens(client):
    whole = client.completions.create(**SETTINGS, max_tokens=30, n=2, logprobs=1)
    pieces = list(
        client.completions.create(
            **SETTINGS, max_tokens=30, n=2, logprobs=1, stream=True,
            stream_options={"include_usage": True},
        )
    )  # fmt: skip
    *chunks, last = pieces
    assert last.usage == whole.usage
    assert last.choices == []
    assert len({piece.id for piece in pieces}) == 1
    for index, choice in enumerate(whole.choices):
        mine = [piece.choices[0] for piece in chunks if piece.choices[0].index == index]
        assert len(mine) == 30  # one a token, as they come
        assert "".join(piece.text for piece in mine) == choice.text
        assert [piece.logprobs.token_logprobs[0] for piece in mine] == (
            choice.logprobs.token_logprobs
        )
        assert [piece.finish_reason for piece in mine] == [None] * 29 + ["length"]


def test_stop_strings_and_echo(client):
    (events,) = expected(60)
    stop = text(events)[20:23]
    answer = client.completions.create(**SETTINGS, max_tokens=60, stop=["nowhere", stop])
    (choice,) = answer.choices
    assert choice.text == text(events)[: text(events).index(stop)]
    assert choice.finish_reason == "stop"
    echoed = client.completions.create(**SETTINGS, max_tokens=0, echo=True, logprobs=0)
    (choice,) = echoed.choices
    assert choice.text == PROMPT
    assert choice.logprobs.tokens == list(PROMPT)
    assert choice.logprobs.token_logprobs[0] is None
    assert all(value < 0 for value in choice.logprobs.token_logprobs[1:])
    assert choice.logprobs.text_offset == [0, 1, 2, 3]
    assert echoed.usage.completion_tokens == 0


@pytest.mark.parametrize(
    "prompt",
    ["bead", ["bead", "game"], [1, 2, 3], [[1, 2, 3], [4]], "", "FILE:name"],
    ids=str,
)
def test_prompts_of_every_kind(client, prompt):
    several = isinstance(prompt, list) and not isinstance(prompt[0], int)
    answer = client.completions.create(**{**SETTINGS, "prompt": prompt}, max_tokens=5, n=2)
    assert len(answer.choices) == (4 if several else 2)
    tokenizer = CharTokenizer(ALPHABET)
    first = prompt[0] if several else prompt
    as_text = first if isinstance(first, str) else tokenizer.decode(first)
    (events,) = expected(5, prompt=as_text or "\n")  # FILE: is plain text here
    assert answer.choices[0].text == text(events)


def test_a_context_that_overflows_slides_and_says_so(served, client):
    assert served.model()["context_overflow"] == "slide"
    assert served.model()["context_length"] == 32
    answer = client.completions.create(**SETTINGS, max_tokens=100)
    assert answer.choices[0].text == text(expected(100)[0])


def test_what_is_served(served, client):
    (model,) = client.models.list().data
    assert model.id == "run"
    assert client.models.retrieve("run") == model
    found = served.model()
    assert (found["step"], found["val_loss_estimate"]) == (20, 2.0)
    assert found["batch_invariant"] is True
    assert (found["dtype"], found["device"], found["max_batch"]) == ("float32", "cpu", 4)
    assert httpx.get(f"{served.url}healthz").json() == {"status": "ok"}
    assert httpx.get(f"{served.url}v1/run").json() == {"train": [], "val": [], "step": 20}


def test_prometheus_metrics(served):
    assert served.post(max_tokens=1).status_code == 200
    before = served.gauge("new_tokens_total"), served.gauge("requests_total")
    assert served.post(max_tokens=12, n=2, seed=1).status_code == 200
    assert served.post(max_tokens=-1).status_code == 400
    assert served.gauge("new_tokens_total") == before[0] + 24
    assert served.gauge("requests_total") == before[1] + 2
    assert served.gauge("weights_step") == 20
    answer = httpx.get(f"{served.url}metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert "yuzogpt_first_token_seconds_bucket" in answer.text
    assert "process_resident_memory_bytes" in answer.text


def test_events_of_a_stream_are_server_sent_events(served):
    body = {"model": "run", "prompt": "bead", "max_tokens": 3, "stream": True}
    for options, ends in (({}, []), ({"stream_options": {"include_usage": True}}, [4])):
        answer = httpx.post(f"{served.url}v1/completions", json={**body, **options})
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        *events, last, nothing = answer.content.split(b"\n\n")
        assert (last, nothing) == (b"data: [DONE]", b"")
        assert all(event.startswith(b"data: {") and b"\n" not in event for event in events)
        pieces = [json.loads(event.removeprefix(b"data: ")) for event in events]
        assert {piece["object"] for piece in pieces} == {"text_completion"}
        assert pieces[2]["choices"][0]["finish_reason"] == "length"
        assert len(pieces) == 3 + len(ends)
        # If asked for, usage is in every chunk, as OpenAI documents.
        used = [piece.get("usage", "none") for piece in pieces[:3]]
        assert used == ([None] * 3 if ends else ["none"] * 3)
        assert [piece["usage"]["prompt_tokens"] for piece in pieces[3:]] == ends


def test_tokens_of_a_text_that_a_stop_string_ends_lie_in_it(served, client):
    (events,) = expected(60)
    whole = text(events)
    stop = [whole[20:23], whole[10:12] + "\n" + whole[12]]  # the second only seems to come
    settings = {**SETTINGS, "max_tokens": 60, "stop": stop, "logprobs": 1}
    (choice,) = client.completions.create(**settings).choices
    assert choice.finish_reason == "stop"
    assert choice.text == whole[: whole.index(stop[0])]
    assert choice.logprobs.tokens == list(choice.text)
    start = len(PROMPT)
    assert choice.logprobs.text_offset == list(range(start, start + len(choice.text)))
    pieces = [piece.choices[0] for piece in client.completions.create(**settings, stream=True)]
    assert "".join(piece.text for piece in pieces) == choice.text
    for name in ("tokens", "text_offset", "token_logprobs"):
        values = [value for piece in pieces for value in getattr(piece.logprobs, name)]
        assert values == getattr(choice.logprobs, name)


def test_offsets_count_characters_not_tokens():
    """An ä of two tokens; of the next token only the beginning is before the stop string."""
    tokenizer = gpt2_tokenizer()
    first, second = (tokenizer.ranks[bytes([byte])] for byte in "ä".encode())
    (cat,) = tokenizer.encode(" cat").tolist()
    stream = TextStream(tokenizer, ["at"])
    offsets = TokenOffsets(tokenizer, 7)
    logprobs = Logprobs()
    for token in (first, second, cat, cat):
        logprobs.extend(offsets.add(Event(0, token, stream.push(token), logprob=-1.0)))
    assert logprobs.text_offset == [7, 7, 8]
    assert logprobs.tokens == ["bytes:\\xc3", "bytes:\\xa4", " cat"]


@pytest.fixture(scope="module")
def ends_at_once(tmp_path_factory):
    """A model with GPT-2's tokens that always predicts the end of text; and its run."""
    run, tokenizer = tmp_path_factory.mktemp("ends") / "run", gpt2_tokenizer()
    model = small_model(1, vocab_size=50257)
    with torch.no_grad():
        end = model.state_dict()["wte.weight"][tokenizer.end_of_text]
        model.state_dict()["ln_f.bias"].add_(end * 20 / end.square().sum())
    settings = TrainSettings.model_validate({"model": model.settings.model_dump()})
    state = checkpoints.State(20, 20, settings.model_dump(), "none", "none", {})
    files.write_checkpoint(run, state, model.state_dict(), {}, tokenization.to_bytes(tokenizer))
    return model, run


@pytest.mark.parametrize("stream", [False, True])
def test_the_token_that_ends_a_text_is_listed(ends_at_once, stream):
    """lm-evaluation-harness leaves out the last token listed: it must be the new one."""
    model, run = ends_at_once
    tokenizer = gpt2_tokenizer()
    prompt = tokenizer.encode("the king of night").tolist()
    asked = {"prompt": prompt, "max_tokens": 1, "echo": True, "logprobs": 1, "temperature": 0}

    async def ask() -> list[dict]:
        flags = [f"--model={run}", "--device=cpu", "--threads=1", "--num_replicas=0"]
        app = build(resolve(ServeSettings, [], flags))
        transport = httpx.ASGITransport(app, client=("127.0.0.1", 1))
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://localhost") as client,
        ):
            body = {"model": "run", "stream": stream, **asked}
            answer = (await client.post("/v1/completions", json=body)).text
        lines = answer.split("\n\n")[:-2] if stream else [answer]
        return [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines]

    choices = asyncio.run(ask())
    found = Logprobs()
    for choice in choices:
        found.extend(Logprobs(**choice["logprobs"]))
    text = "".join(choice["text"] for choice in choices)
    assert text == "the king of night"
    assert choices[-1]["finish_reason"] == "stop"
    assert found.tokens == ["the", " king", " of", " night", "<|endoftext|>"]
    assert found.text_offset == [0, 3, 8, 11, len(text)]
    with torch.no_grad():
        logits = model(torch.tensor([prompt]))[0].log_softmax(-1)
    expected = [logits[i, token].item() for i, token in enumerate(prompt[1:])]
    expected.append(logits[-1, tokenizer.end_of_text].item())
    assert found.token_logprobs[1:] == pytest.approx(expected, abs=1e-4)
    assert max(found.top_logprobs[-1], key=found.top_logprobs[-1].get) == "<|endoftext|>"


def test_what_a_stop_string_cuts_off_is_not_listed_but_the_end_is():
    tokenizer = gpt2_tokenizer()
    half, end = tokenizer.ranks[b"\xc3"], tokenizer.end_of_text
    for last, text, tokens in (
        (Event(0, end, "\ufffd", finish="end_of_text"), "\ufffd", ["bytes:\\xc3", "<|endoftext|>"]),
        (Event(0, end, "", finish="stop"), "", []),
    ):
        offsets = TokenOffsets(tokenizer, 3)
        logprobs = offsets.add(Event(0, half, "", logprob=-1.0))
        logprobs.extend(offsets.add(last))
        assert logprobs.tokens == tokens
        assert logprobs.text_offset == [3, 3 + len(text)][: len(tokens)]
