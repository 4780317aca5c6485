"""Milliseconds a training step, against transformers' GPT2LMHeadModel in a plain loop.

    python benchmarks/speed.py                      # 6 layers, 384 wide, context 256, batch 16
    python benchmarks/speed.py --rounds 9 --kinds "float32 eager" "float32 compiled"

The same model (GPT-2's parts, with biases), the same random tokens, AdamW and clipping; both in
this process, eager and compiled, in float32 and under bfloat16 autocast (which a CPU without
bfloat16 arithmetic emulates). Contenders take turns, round by round; the first round of each is not
counted. A ratio above 1: we are faster. The last two rows compare our fastest kind with theirs, and
with their float32 eager.
"""

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from yuzogpt.config import FinetuningSettings, ModelSettings, OptimizerSettings, ParallelSettings
from yuzogpt.hardware import Hardware
from yuzogpt.model.initialization import initial_weights
from yuzogpt.training.monitor import add_up, clip
from yuzogpt.training.optimizers import build_optimizer
from yuzogpt.training.parallel import parallelize
from yuzogpt.world import World

Step = Callable[[Tensor], None]
KINDS: dict[str, tuple[torch.dtype | None, bool]] = {
    "float32 eager": (None, False),
    "float32 compiled": (None, True),
    "bfloat16 eager": (torch.bfloat16, False),
    "bfloat16 compiled": (torch.bfloat16, True),
}


def our_step(shape: ModelSettings, dtype: torch.dtype | None, compiled: bool) -> Step:
    """Return a step as training/loop.py takes it."""
    hardware = Hardware(torch.device("cpu"), dtype, compiled, torch.get_num_threads(), ())
    trainee = parallelize(shape, initial_weights(shape, 1), "none", ParallelSettings(), hardware)
    optimizer = build_optimizer(trainee.model, OptimizerSettings(), FinetuningSettings())
    keys = torch.zeros(0, dtype=torch.int32)

    def step(rows: Tensor) -> None:
        ids, targets = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
        with hardware.autocasting():
            losses = trainee.trained(ids, targets, keys)
            (losses.sum() / ids.numel()).backward()
        totals = add_up(trainee, losses.detach().sum(), ids.numel(), False, 0.0, World())
        clip(trainee, totals.gradient_norm, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def their_step(shape: ModelSettings, dtype: torch.dtype | None, compiled: bool) -> Step:
    """Return a step of transformers' model, as its users write it."""
    config = GPT2Config(
        vocab_size=shape.vocab_size, n_positions=shape.block_size, n_layer=shape.n_layer,
        n_head=shape.n_head, n_embd=shape.n_embd, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        use_cache=False, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).train()
    called = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, betas=(0.9, 0.95))

    def step(rows: Tensor) -> None:
        on = torch.autocast("cpu", dtype) if dtype else contextlib.nullcontext()
        with on:
            loss = called(rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()

    return step


def main() -> None:
    """Print a row a kind of arithmetic."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="of each contender in a round")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--vocab", type=int, default=65)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    wanted = parser.parse_args()
    shape = ModelSettings(
        n_layer=wanted.layers, n_head=wanted.width // 64, n_embd=wanted.width,
        block_size=wanted.context, vocab_size=wanted.vocab, bias=True,
    )  # fmt: skip
    rows = torch.randint(0, wanted.vocab, (wanted.batch, wanted.context + 1))
    kinds = {name: KINDS[name] for name in wanted.kinds}
    # Theirs predicts each row's next tokens out of the row itself: the same number of positions.
    contenders = {
        name: (our_step(shape, *kind), their_step(shape, *kind)) for name, kind in kinds.items()
    }
    found: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in kinds}
    for number in range(wanted.rounds + 1):
        for name, pair in contenders.items():
            for side, (step, given) in enumerate(zip(pair, (rows, rows[:, :-1]), strict=True)):
                began = time.perf_counter()
                for _ in range(wanted.steps):
                    step(given)
                if number:
                    found[name][side].append((time.perf_counter() - began) / wanted.steps)
    print(f"{torch.get_num_threads()} threads, {wanted.rounds} rounds; ms a step, medians\n")
    print("| | ours | transformers | ratio (lowest to highest round) |\n|---|---|---|---|")
    for name, (ours, theirs) in found.items():
        print_row(name, ours, theirs)
    ours = min((pair[0] for pair in found.values()), key=statistics.median)
    theirs = min((pair[1] for pair in found.values()), key=statistics.median)
    print_row("our best, its best", ours, theirs)
    if "float32 eager" in found:
        print_row("our best, its float32 eager", ours, found["float32 eager"][1])


def print_row(name: str, ours: list[float], theirs: list[float]) -> None:
    """Print medians, and the ratio of each round."""
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    print(
        f"| {name} | {1e3 * statistics.median(ours):,.0f} | {1e3 * statistics.median(theirs):,.0f} "
        f"| {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) |",
        flush=True,
    )


if __name__ == "__main__":
    main()
