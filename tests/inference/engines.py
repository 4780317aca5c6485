"""What the tests of the engine share: a small model, and the slow way to the same logits."""

import torch

from yuzogpt.config import ModelSettings
from yuzogpt.inference.engine import Engine, window_start
from yuzogpt.inference.requests import Request, SamplingParams
from yuzogpt.model.gpt import GPT
from yuzogpt.model.initialization import initialize
from yuzogpt.tokenization.tokenizer import CharTokenizer

ALPHABET = "".join(chr(ord("0") + n) for n in range(63)) + "\n "
SHAPE = ModelSettings(n_layer=2, n_head=2, n_embd=48, block_size=32, vocab_size=65, bias=True)


def small_model(seed: int = 1, **changes) -> GPT:
    """Return a model whose logits say something: its weights are large."""
    model = GPT(SHAPE.model_copy(update=changes))
    initialize(model, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.15)
    return model.eval()


def make_engine(model: GPT | None = None, **settings) -> Engine:
    """Return an engine with its own copy of the small model, if none is given."""
    tokenizer = settings.pop("tokenizer", CharTokenizer(ALPHABET))
    return Engine(model or small_model(), tokenizer, torch.device("cpu"), **settings)


def random_prompt(length: int, seed: int) -> list[int]:
    """Return token ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, SHAPE.vocab_size, (length,), generator=generator).tolist()


def greedy(prompt: list[int], tokens: int, **changes) -> Request:
    """Return a greedy request that asks for all log-probabilities."""
    settings = {"logprobs": SHAPE.vocab_size, **changes}
    return Request(prompt, tokens, SamplingParams(temperature=0), **settings)


def run(engine: Engine, requests) -> list:
    """Return the events of each request, all submitted at once."""
    ids = [engine.submit(request) for request in requests]
    events = {request_id: [] for request_id in ids}
    while engine.busy:
        for event in engine.step():
            events[event.request_id].append(event)
    return [events[request_id] for request_id in ids]


def logprobs(event) -> torch.Tensor:
    """Return the log-probabilities of all tokens, by their ids."""
    values = torch.empty(len(event.top_logprobs))
    for token, value in event.top_logprobs:
        values[token] = value
    return values


@torch.no_grad()
def uncached(model: GPT, tokens: list[int]) -> torch.Tensor:
    """Return the log-probabilities of the next token, computed without a cache."""
    window = tokens[window_start(len(tokens), model.settings.block_size) :]
    return model(torch.tensor([window]))[0, -1].log_softmax(-1)


def check_against_uncached(model: GPT, prompts, events, tolerance: float = 1e-4) -> None:
    """Compare the log-probabilities of greedy requests with those computed without a cache."""
    for prompt, events_of_prompt in zip(prompts, events, strict=True):
        tokens = list(prompt)
        for event in events_of_prompt:
            torch.testing.assert_close(
                logprobs(event), uncached(model, tokens), rtol=0, atol=tolerance
            )
            tokens.append(event.token)
