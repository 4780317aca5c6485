"""The engine computes what the model computes, whatever else is in the batch."""

import random

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.inference.engines import (
    SHAPE,
    check_against_uncached,
    greedy,
    logprobs,
    make_engine,
    random_prompt,
    run,
    small_model,
    uncached,
)
from yuzogpt.errors import UserError
from yuzogpt.inference.engine import window_start
from yuzogpt.inference.packed_linear import (
    FP16_OPS,
    INT8_OPS,
    ONEDNN_OPS,
    Int8Linear,
    PackedLinear,
    choose_dtype,
)
from yuzogpt.inference.requests import Request, SamplingParams
from yuzogpt.tokenization.tokenizer import gpt2_tokenizer

BLOCK = SHAPE.block_size


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize("length", [1, 2, 7, 16, 31, 32, 33, 70])
def test_cached_logits_are_those_of_the_whole_context(batch, length):
    engine = make_engine(slots=4, prefill_chunk=8)
    prompts = [random_prompt(length, seed) for seed in range(batch)]
    events = run(engine, [greedy(prompt, 12) for prompt in prompts])
    assert all(len(events_of_prompt) == 12 for events_of_prompt in events)
    check_against_uncached(small_model(), prompts, events)


def test_far_past_the_contexts_end():
    prompts = [random_prompt(5, 1), random_prompt(BLOCK, 2)]
    events = run(make_engine(), [greedy(prompt, 3 * BLOCK) for prompt in prompts])
    check_against_uncached(small_model(), prompts, events)


def test_the_window_slides_in_quarters_and_never_holds_too_much():
    starts = [window_start(tokens, 32) for tokens in range(1, 100)]
    assert starts[:32] == [0] * 32
    assert starts[32:42] == [8] * 8 + [16] * 2
    assert all(25 <= n - start <= 32 for n, start in enumerate(starts[32:], 33))
    assert [window_start(n, 1) for n in (1, 2, 3)] == [0, 1, 2]


def test_a_context_that_does_not_slide_ends():
    engine = make_engine()
    (events,) = run(engine, [greedy(random_prompt(10, 1), 500, slide=False)])
    assert len(events) == BLOCK + 1 - 10  # the last token is never fed back
    assert events[-1].finish == "length"
    with pytest.raises(UserError, match="33 tokens; with a context that does not slide"):
        engine.submit(greedy(random_prompt(33, 1), 1, slide=False))


@pytest.mark.slow
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_a_request_gets_the_same_bits_alone_and_in_a_batch(dtype, packed):
    chance = random.Random(3)
    requests = [
        Request(
            random_prompt(chance.choice([1, 3, 9, 20, 40]), seed),
            chance.randint(1, 40),
            SamplingParams(temperature=chance.choice([0, 0.7, 1.3]), top_p=0.9, seed=seed),
            logprobs=SHAPE.vocab_size,
        )
        for seed in range(24)
    ]
    settings = {"dtype": dtype, "packed": packed, "prefill_chunk": 8}
    assert make_engine(slots=1, **settings).batch_invariant
    engine = make_engine(slots=5, **settings)
    assert engine.batch_invariant
    alone = [run(engine, [request])[0] for request in requests]
    order, together, ids = list(range(24)), {}, {}
    chance.shuffle(order)
    while order or engine.busy:  # requests join, finish, and are cancelled
        if order and chance.random() < 0.5:
            number = order.pop()
            ids[engine.submit(requests[number])] = number
            disturbing = engine.submit(requests[chance.randrange(24)])
        for event in engine.step():
            if event.request_id in ids:
                together.setdefault(ids[event.request_id], []).append(event)
        if chance.random() < 0.3:
            engine.cancel(disturbing)
    for number, events in enumerate(alone):
        same = together[number]
        assert [e.token for e in events] == [e.token for e in same]
        assert [e.top_logprobs for e in events] == [e.top_logprobs for e in same]  # to the last bit


def test_a_model_that_is_not_batch_invariant_is_reported(monkeypatch):
    layer_norm = torch.nn.functional.layer_norm

    def depends_on_the_batch(x, *rest):
        return layer_norm(x, *rest) * (1 + 1e-6 * x.shape[0]) + 1e-6 * x.mean()

    monkeypatch.setattr("yuzogpt.model.gpt.F.layer_norm", depends_on_the_batch)
    engine = make_engine(slots=4)
    assert not engine.batch_invariant
    assert engine.batch_sizes == [4]


@pytest.mark.parametrize(("dtype", "max_difference"), [(torch.bfloat16, 0.2), (torch.int8, 1.0)])
def test_rounded_weights_are_near_float32(dtype, max_difference):
    prompt = random_prompt(20, 1)
    (exact,), (rounded,) = (
        run(make_engine(dtype=each), [greedy(prompt, 1)]) for each in (torch.float32, dtype)
    )
    difference = (logprobs(exact[0]) - logprobs(rounded[0])).abs().max()
    assert 1e-5 < difference < max_difference


def test_a_row_of_zeros_is_no_harm_in_int8():
    layer = Int8Linear(torch.randn(8, 48), torch.ones(8))
    x = torch.randn(2, 48)
    x[0] = 0
    y = layer(x)
    assert torch.equal(y[0], torch.ones(8))
    assert torch.equal(y[1:], layer(x[1:]))


@pytest.mark.parametrize(("n_in", "n_out"), [(48, 144), (768, 3072), (3072, 768)])
def test_a_row_alone_has_the_bits_that_it_has_in_a_pair(n_in, n_out):
    generator = torch.Generator().manual_seed(1)
    weight, bias = torch.randn(n_out, n_in, generator=generator), torch.ones(n_out)
    rows = torch.randn(8, 1, n_in, generator=generator)
    layer = PackedLinear(weight, bias)
    together = layer(rows)
    expected = torch.nn.functional.linear(rows, weight, bias)
    torch.testing.assert_close(together, expected, rtol=1e-4, atol=1e-3)
    for row in range(8):
        pair = layer(rows[[row, (row + 1) % 8]])
        assert torch.equal(layer(rows[row : row + 1])[0], pair[0])


class Without:
    """A namespace of torch's operators that lacks one."""

    def __init__(self, namespace, name):
        self.namespace, self.name = namespace, name

    def __getattr__(self, name):
        if name == self.name:
            raise AttributeError(name)
        return getattr(self.namespace, name)


PRIVATE_OPS = [
    *(("mkldnn", name) for name in (*ONEDNN_OPS, "data_ptr", "_nbytes")),
    *(("quantized", name) for name in (*FP16_OPS, *INT8_OPS)),
    ("torch", "quantize_per_channel"),
]


@pytest.mark.parametrize(("namespace", "name"), [("all", ""), *PRIVATE_OPS])
def test_without_a_private_operator_of_torch_its_own_products_do(namespace, name, monkeypatch):
    if namespace == "all":  # torch was built without FBGEMM and oneDNN
        monkeypatch.setattr("yuzogpt.inference.packed_linear.has_fbgemm", lambda ops: False)
        monkeypatch.setattr("yuzogpt.inference.packed_linear.has_onednn", lambda: False)
    elif namespace == "torch":
        monkeypatch.delattr(torch, name)
    else:
        monkeypatch.setattr(torch.ops, namespace, Without(getattr(torch.ops, namespace), name))
    prompts = [random_prompt(9, 1), random_prompt(40, 2)]
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.5)):
        events = run(make_engine(dtype=dtype), [greedy(prompt, 5) for prompt in prompts])
        check_against_uncached(small_model(), prompts, events, tolerance)
    if namespace in ("all", "torch") or name in INT8_OPS:
        with pytest.raises(UserError, match=r"^--dtype=int8: .* use --dtype=bfloat16$"):
            choose_dtype("int8", torch.device("cpu"))


def test_a_long_prompt_does_not_delay_the_others():
    engine = make_engine(slots=2, prefill_chunk=4)
    first = engine.submit(greedy([1, 2, 3], 50))
    engine.step()
    second = engine.submit(greedy(random_prompt(32, 1), 1))
    steps = []
    while not steps or second not in steps[-1]:
        steps.append([event.request_id for event in engine.step()])
    assert len(steps) == 8
    assert all(first in step for step in steps)


def test_short_prompts_share_a_step():
    engine = make_engine(slots=4, prefill_chunk=16)
    for seed in range(4):
        engine.submit(greedy(random_prompt(4, seed), 3))
    assert len(engine.step()) == 4


def test_cancelling_frees_the_slot_at_once():
    engine = make_engine(slots=1)
    first, second, third = (engine.submit(greedy([n], 1000)) for n in (1, 2, 3))
    assert {event.request_id for event in engine.step()} == {first}
    assert engine.cancel(first)
    assert engine.cancel(second)  # it was waiting
    assert not engine.cancel(first)
    assert {event.request_id for event in engine.step()} == {third}
    assert engine.cancel(third)
    assert not engine.busy
    assert engine.step() == []
    assert engine.free_slots == [0]


def test_log_probabilities_of_the_prompt():
    prompt = random_prompt(21, 4)
    (events,) = run(make_engine(prefill_chunk=8), [greedy(prompt, 2, echo=True)])
    echoed, new = events[:21], events[21:]
    assert [event.token for event in echoed] == prompt
    assert all(event.is_prompt for event in echoed)
    assert not any(event.is_prompt for event in new)
    assert echoed[0].logprob is None
    for index, event in enumerate(echoed[1:], 1):
        expected = uncached(small_model(), prompt[:index])
        assert event.logprob == pytest.approx(expected[prompt[index]].item(), abs=1e-4)
        torch.testing.assert_close(logprobs(event), expected, rtol=0, atol=1e-4)
    check_against_uncached(small_model(), [prompt], [new])
    # The prompt alone, and the chosen tokens alone.
    (scored,) = run(make_engine(), [greedy(prompt, 0, echo=True, logprobs=0)])
    assert [event.token for event in scored] == [*prompt, None]
    assert scored[-1].finish == "length"
    assert scored[5].logprob == pytest.approx(echoed[5].logprob, abs=1e-4)
    assert scored[5].top_logprobs == ()
    with pytest.raises(UserError, match="with echo, at most 32"):
        make_engine().submit(greedy(random_prompt(33, 1), 1, echo=True))


def test_logprobs_are_sorted_and_as_many_as_asked():
    (events,) = run(make_engine(), [greedy([1, 2], 3, logprobs=5)])
    for event in events:
        values = [value for _, value in event.top_logprobs]
        assert len(values) == 5
        assert values == sorted(values, reverse=True)
        assert (event.token, event.logprob) == event.top_logprobs[0]


def test_end_of_text_ends_a_request_unless_it_is_ignored():
    tokenizer = gpt2_tokenizer()
    model = small_model(vocab_size=tokenizer.vocab_size)
    with torch.no_grad():  # it always predicts the end of text
        model.ln_f.bias.copy_(model.wte.weight[tokenizer.end_of_text] * 100)
    settings = {"tokenizer": tokenizer}
    model_again = small_model(vocab_size=tokenizer.vocab_size)
    model_again.load_state_dict(model.state_dict())
    (events,) = run(make_engine(model, **settings), [greedy([1], 5, logprobs=None)])
    assert [(e.token, e.text, e.finish) for e in events] == [(50256, "", "end_of_text")]
    request = greedy([1], 5, logprobs=None, stop_at_end_of_text=False)
    (events,) = run(make_engine(model_again, **settings), [request])
    assert "".join(event.text for event in events) == "<|endoftext|>" * 5
    assert [event.finish for event in events] == [None] * 4 + ["length"]


def test_a_stop_string_ends_a_request_and_is_not_emitted():
    engine = make_engine()
    request = Request([1, 2], 30, SamplingParams(seed=5))
    (events,) = run(engine, [request])
    text = "".join(event.text for event in events)
    assert len(text) == 30
    stop = text[10:14]  # four tokens
    (events,) = run(engine, [Request([1, 2], 30, SamplingParams(seed=5), stop=("never", stop))])
    assert "".join(event.text for event in events) == text[: text.index(stop)]
    assert events[-1].finish == "stop"
    assert sorted(engine.free_slots) == list(range(8))


def test_a_repetition_penalty_counts_prompt_and_new_tokens():
    plain, penalized = (
        SamplingParams(temperature=0),
        SamplingParams(temperature=0, repetition_penalty=100),
    )
    engine = make_engine(slots=1)
    prompt = random_prompt(3, 7)
    for _ in range(2):  # the slot keeps nothing of its last request
        (events,) = run(engine, [Request(prompt, 20, penalized)])
        chosen = [event.token for event in events]
        assert len({*prompt, *chosen}) == len(prompt) + 20
    (events,) = run(engine, [Request(prompt, 20, plain)])
    assert len({event.token for event in events}) < 20


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": []}, "empty"),
        ({"prompt": [65]}, "not in 0 to 64"),
        ({"prompt": [-1]}, "not in 0 to 64"),
        ({"max_new_tokens": -1}, "below 0"),
        ({"logprobs": 66}, "logprobs=66"),
        ({"sampling": SamplingParams(temperature=float("nan"))}, "temperature=nan"),
        ({"sampling": SamplingParams(temperature=-1)}, "temperature=-1"),
        ({"sampling": SamplingParams(top_p=0)}, "top_p=0"),
        ({"sampling": SamplingParams(min_p=1.5)}, "min_p=1.5"),
        ({"sampling": SamplingParams(repetition_penalty=0)}, "repetition_penalty=0"),
        ({"sampling": SamplingParams(seed=-1)}, "seed=-1"),
    ],
)
def test_invalid_requests_are_refused(changes, message):
    engine = make_engine()
    with pytest.raises(UserError, match=message):
        engine.submit(Request(**{"prompt": [1], "max_new_tokens": 1, **changes}))
    assert not engine.busy


def test_nothing_to_do_is_done_at_once():
    (events,) = run(make_engine(), [Request([1], 0)])
    assert [(event.token, event.finish) for event in events] == [(None, "length")]


VARIANTS = [
    {"pos_emb": "rotary"},
    {"pos_emb": "alibi"},
    {"pos_emb": "rotary", "qk_norm": True, "norm": "rms", "activation": "swiglu"},
    {"pos_emb": "alibi", "tie_embeddings": False, "logit_softcap": 5.0, "activation": "relu2"},
]


@pytest.mark.slow
@pytest.mark.parametrize("changes", VARIANTS, ids=lambda changes: "-".join(map(str, changes)))
def test_variants_go_through_the_cache_as_without_it(changes):
    """Up to the context's end, past it, and in a context longer than block_size."""
    prompts = [random_prompt(length, length) for length in (1, 6, 19)]
    events = run(make_engine(small_model(**changes)), [greedy(prompt, 40) for prompt in prompts])
    check_against_uncached(small_model(**changes), prompts, events)
    with pytest.raises(AssertionError):
        check_against_uncached(small_model(), prompts, events)
    longer = {**changes, "block_size": 4 * SHAPE.block_size}
    events = run(make_engine(small_model(**longer)), [greedy(prompt, 90) for prompt in prompts])
    check_against_uncached(small_model(**longer), prompts, events)


@pytest.mark.parametrize("pos_emb", ["learned", "rotary", "alibi"])
def test_cached_attention_is_the_flash_kernels(pos_emb):
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # and no other
        run(make_engine(small_model(pos_emb=pos_emb)), [greedy(random_prompt(6, 1), 3)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_an_untied_head_is_packed_too(dtype):
    model = small_model(tie_embeddings=False, pos_emb="rotary")
    prompt = random_prompt(12, 3)
    with torch.no_grad():
        expected = model(torch.tensor([prompt]))[0, -1].log_softmax(-1)
    engine = make_engine(small_model(tie_embeddings=False, pos_emb="rotary"), dtype=dtype)
    ((event,),) = run(engine, [greedy(prompt, 1)])
    error = (logprobs(event) - expected).abs().max().item()
    assert error < {torch.float32: 1e-4, torch.bfloat16: 0.3, torch.int8: 0.5}[dtype]
