"""Decode steps of all slots in one shape: the same logits, and no request disturbs another."""

import random

import pytest
import torch
import torch._dynamo.utils
import torch._inductor.config as inductor

from tests.inference.engines import (
    SHAPE,
    check_against_uncached,
    greedy,
    logprobs,
    make_engine,
    random_prompt,
    run,
    small_model,
)
from yuzogpt.inference.engine import Engine
from yuzogpt.inference.requests import Request, SamplingParams
from yuzogpt.tokenization.tokenizer import CharTokenizer

BLOCK = SHAPE.block_size
COMPILED = {"decode_all_slots": True, "compiled": True}


@pytest.fixture(autouse=True)
def nothing_compiled():
    """Drop what other tests have compiled in this process."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


@pytest.mark.slow
@pytest.mark.parametrize("pos_emb", ["learned", "rotary", "alibi"])
@pytest.mark.parametrize("requests", [1, 3, 7])
def test_logits_are_the_same_without_a_cache(requests, pos_emb):
    engine = make_engine(
        small_model(pos_emb=pos_emb), slots=3, prefill_chunk=8, decode_all_slots=True
    )
    prompts = [random_prompt(length, length) for length in (1, 9, 40, 16, 2, BLOCK, 33)[:requests]]
    events = run(engine, [greedy(prompt, 2 * BLOCK) for prompt in prompts])
    check_against_uncached(small_model(pos_emb=pos_emb), prompts, events)


@pytest.fixture
def one_thread():
    """A CPU's attention kernel gives each thread a buffer; their addresses change last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_a_request_gets_the_same_bits_alone_and_among_others():
    chance = random.Random(5)
    requests = [
        Request(
            random_prompt(chance.choice([1, 3, 9, 20, 40]), seed),
            chance.randint(1, 40),
            SamplingParams(temperature=chance.choice([0, 0.7]), seed=seed),
            logprobs=SHAPE.vocab_size,
        )
        for seed in range(12)
    ]
    engine = make_engine(slots=5, prefill_chunk=8, decode_all_slots=True)
    assert engine.batch_invariant
    together = run(engine, requests)
    for request, events in zip(requests, together, strict=True):
        (alone,) = run(engine, [request])
        assert [e.token for e in events] == [e.token for e in alone]
        assert [e.top_logprobs for e in events] == [e.top_logprobs for e in alone]


def test_log_probabilities_of_the_prompt():
    prompt = random_prompt(21, 4)  # the last token comes alone: 21 = 16 + 4 + 1
    expected, events = (
        run(make_engine(prefill_chunk=16, **how), [greedy(prompt, 2, echo=True), greedy([7], 30)])[
            0
        ]
        for how in ({}, {"decode_all_slots": True})
    )
    assert [event.token for event in events] == [event.token for event in expected]
    for ours, theirs in zip(events[1:], expected[1:], strict=True):
        torch.testing.assert_close(logprobs(ours), logprobs(theirs), rtol=0, atol=1e-4)


@pytest.mark.slow
def test_a_compiled_step_computes_the_same():
    model = small_model(pos_emb="rotary")
    engine = make_engine(model, slots=3, prefill_chunk=8, packed=False, **COMPILED)
    assert engine.decoder.is_compiled
    prompts = [random_prompt(length, length) for length in (1, 9, 40, 16)]
    events = run(engine, [greedy(prompt, 2 * BLOCK) for prompt in prompts])
    check_against_uncached(small_model(pos_emb="rotary"), prompts, events)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs == 1  # nothing of the step is left to Python
    make_engine(small_model(pos_emb="rotary"), slots=3, packed=False, **COMPILED)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs  # a cached one


@pytest.mark.slow
def test_without_a_compiler_it_still_decodes(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(inductor.cpp, "cxx", (str(tmp_path / "no-compiler"),))
    with pytest.warns(UserWarning, match="decoding without torch.compile: "):
        engine = make_engine(small_model(), slots=2, packed=False, **COMPILED)
    assert not engine.decoder.is_compiled
    prompt = random_prompt(9, 9)
    events = run(engine, [greedy(prompt, 20)])
    check_against_uncached(small_model(), [prompt], events)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("pos_emb", ["learned", "rotary", "alibi"])
def test_a_recorded_step_computes_the_same(pos_emb, compiled):
    device = torch.device("cuda")
    tokenizer = CharTokenizer("".join(map(chr, range(48, 48 + SHAPE.vocab_size))))
    model = small_model(pos_emb=pos_emb)
    engine = Engine(model, tokenizer, device, torch.float32, slots=3, compiled=compiled)
    assert engine.decoder is not None
    assert engine.decoder.graph is not None
    prompts = [random_prompt(length, length) for length in (1, 9, 40, 16)]
    recorded = run(engine, [greedy(prompt, 2 * BLOCK) for prompt in prompts])
    engine.decoder.graph = None
    computed = run(engine, [greedy(prompt, 2 * BLOCK) for prompt in prompts])
    for ours, theirs in zip(recorded, computed, strict=True):
        assert [event.top_logprobs for event in ours] == [event.top_logprobs for event in theirs]
    check_against_uncached(small_model(pos_emb=pos_emb), prompts, recorded, 1e-2)  # TF32
