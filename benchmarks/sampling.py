"""Sampling: tokens per second, against transformers' `generate` and nanoGPT's way.

    python benchmarks/sampling.py
    python benchmarks/sampling.py --rounds 5 --threads 1
    python benchmarks/sampling.py --perplexity RUN CORPUS      # of a trained model, in each dtype

GPT-2's 124M shape, random weights, a prompt of 16 tokens, 128 new tokens at temperature 0.8 and
top_k 200, one sample and a batch of eight. The sides take turns in each round:

    YuzoGPT        the engine: float32, bfloat16 (weights; the arithmetic is float32), int8
    transformers   `generate`, in the same dtypes; it has no int8 on CPUs without other packages
    recompute      nanoGPT's way, float32: YuzoGPT's model without a cache computes the whole
                   context for each token; timed at eight lengths from the first to the last

The limit is the time to read every weight once per token (or per eight tokens), at the rate at
which both cores together read a large array here.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from yuzogpt.checkpoints.load import load_model
from yuzogpt.checkpoints.resolve import resolve_model
from yuzogpt.config import ModelSettings
from yuzogpt.data.batches import FixedWindows
from yuzogpt.data.blocks import open_corpus
from yuzogpt.inference.engine import Engine
from yuzogpt.inference.packed_linear import pack_weights
from yuzogpt.inference.requests import Request, SamplingParams
from yuzogpt.model.gpt import GPT
from yuzogpt.model.initialization import initialize
from yuzogpt.model.shapes import count_weights
from yuzogpt.tokenization.tokenizer import gpt2_tokenizer

SHAPE = ModelSettings(vocab_size=50257, bias=True)
PROMPT = list(range(1000, 1016))
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
Side = Callable[[int, int], float]  # (samples, new tokens of each) -> tokens per second


def our_model() -> GPT:
    """Return a model with random weights."""
    model = GPT(SHAPE)
    initialize(model, 1)
    return model.eval()


def ours(dtype: torch.dtype) -> Side:
    """Decode with the engine."""
    engine = Engine(our_model(), gpt2_tokenizer(), torch.device("cpu"), dtype)
    assert engine.batch_invariant

    def generate(samples: int, tokens: int) -> float:
        for seed in range(samples):
            sampling = SamplingParams(temperature=0.8, top_k=200, seed=seed)
            engine.submit(Request(PROMPT, tokens, sampling, stop_at_end_of_text=False))
        started, generated = time.perf_counter(), 0
        while engine.busy:
            generated += len(engine.step())
        assert generated == samples * tokens
        return generated / (time.perf_counter() - started)

    return generate


def theirs(dtype: torch.dtype) -> Side:
    """Decode with transformers."""
    config = GPT2Config(bos_token_id=None, eos_token_id=None, pad_token_id=0)
    model: Any = GPT2LMHeadModel(config)  # its annotations are not those of its methods
    model.to(dtype).eval()

    def generate(samples: int, tokens: int) -> float:
        ids = torch.tensor([PROMPT] * samples)
        sampling = {"do_sample": True, "temperature": 0.8, "top_k": 200, "max_new_tokens": tokens}
        started = time.perf_counter()
        output = model.generate(ids, attention_mask=torch.ones_like(ids), **sampling)
        seconds = time.perf_counter() - started
        assert output.shape == (samples, len(PROMPT) + tokens)
        return samples * tokens / seconds

    return generate


def recomputed() -> Side:
    """Compute the whole context for each token."""
    model = our_model()

    def generate(samples: int, tokens: int) -> float:
        seconds = []
        for part in range(8):
            length = len(PROMPT) + tokens * part // 7
            started = time.perf_counter()
            x = model.hidden(torch.zeros(samples, length, dtype=torch.long), torch.arange(length))
            model.logits(x[:, -1:])
            seconds.append(time.perf_counter() - started)
        return samples / statistics.mean(seconds)

    return generate


def perplexities(run: str, corpus: str) -> None:
    """Print the perplexity of a trained model on a whole val split, in each dtype of weights."""
    reference = resolve_model(run)
    windows = FixedWindows(open_corpus(Path(corpus)).stream("val"), reference.shape.block_size)
    found = {}
    for name, dtype in TYPES.items():
        model = pack_weights(load_model(reference), dtype, torch.device("cpu"))
        losses = []
        for first in range(0, len(windows), 16):
            rows = np.arange(first, min(first + 16, len(windows)))
            tokens = torch.from_numpy(windows.read(rows))
            losses.append(model(tokens[:, :-1], tokens[:, 1:]).flatten())
        found[name] = torch.cat(losses).double().mean().exp().item()
    for name, value in found.items():
        print(f"{name}: perplexity {value:.5f}, {value / found['float32'] - 1:+.3%}")


def read_rate() -> float:
    """Return the bytes per second at which a large array is read."""
    array, seconds = torch.ones(64_000_000), []
    for _ in range(5):
        started = time.perf_counter()
        array.sum()
        seconds.append(time.perf_counter() - started)
    return array.nbytes / min(seconds)


def ratio_to_transformers(name: str, type_name: str, medians: dict[str, float]) -> str:
    """Return a rate as a multiple of transformers' in the same dtype; int8 against float32."""
    theirs_type = "float32" if type_name == "int8" else type_name
    peer = medians.get(f"transformers, {theirs_type}")
    if not peer:  # it was not measured
        return "-"
    return f"{medians[name] / peer:.2f}" + (" (float32's)" if type_name == "int8" else "")


@torch.inference_mode()
def main() -> None:
    """Measure, and print a table with ranges in parentheses."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--types", nargs="+", default=list(TYPES), choices=TYPES)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--perplexity", nargs=2, metavar=("RUN", "CORPUS"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.perplexity:
        perplexities(*options.perplexity)
        return
    sides: dict[str, Side] = {f"YuzoGPT, {name}": ours(TYPES[name]) for name in options.types}
    both = [name for name in options.types if name != "int8"]
    sides |= {f"transformers, {name}": theirs(TYPES[name]) for name in both}
    sides["recompute, float32"] = recomputed()
    rates = [read_rate()]
    print("| samples | side | tokens/s | times recompute | times transformers | share of limit |")
    print("|---|---|---|---|---|---|")
    for samples in options.batches:
        found: dict[str, list[float]] = {name: [] for name in sides}
        for side in sides.values():
            side(samples, 4)  # warm-up
        for _ in range(options.rounds):
            for name, side in sides.items():
                found[name].append(side(samples, options.tokens))
            rates.append(read_rate())
        medians = {name: statistics.median(values) for name, values in found.items()}
        for name, values in found.items():
            type_name = name.rpartition(" ")[2]
            weights = count_weights(SHAPE) * TYPES[type_name].itemsize
            limit = samples * max(rates) / weights
            print(
                f"| {samples} | {name} | {medians[name]:.1f} ({min(values):.1f} to "
                f"{max(values):.1f}) | {medians[name] / medians['recompute, float32']:.1f} "
                f"| {ratio_to_transformers(name, type_name, medians)} "
                f"| {medians[name] / limit:.0%} |",
                flush=True,
            )
    print(f"\nreading: {max(rates) / 1e9:.1f} GB/s at best, {min(rates) / 1e9:.1f} at worst")


if __name__ == "__main__":
    main()
