"""Milliseconds per training step, against the GPT of transformers or litgpt in a plain loop.

    python benchmarks/speed.py                      # 6 layers, 384 wide, context 256, batch 16
    python benchmarks/speed.py --rounds 9 --kinds "float32 eager" "float32 compiled"
    python benchmarks/speed.py --peer litgpt        # pip install litgpt; rotary positions in both

Both sides have the same model (GPT-2's parts, with biases), random tokens, AdamW and clipping. They
run in this process, eager and compiled, in float32 and under bfloat16 autocast (which a CPU without
bfloat16 arithmetic emulates). They take turns, round by round; the first round of each is not
counted. A ratio above 1 means that we are faster. The last two rows compare our fastest kind with
theirs, and with their float32 eager.
"""

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from yuzogpt.config import FinetuningSettings, ModelSettings, OptimizerSettings, ParallelSettings
from yuzogpt.model.initialization import initial_weights
from yuzogpt.runtime.device import Hardware
from yuzogpt.runtime.world import World
from yuzogpt.training.guards import clip_grad_norm, reduce_step_stats
from yuzogpt.training.optimizers import build_optimizer
from yuzogpt.training.parallel import parallelize

Step = Callable[[Tensor], None]
KINDS: dict[str, tuple[torch.dtype | None, bool]] = {
    "float32 eager": (None, False),
    "float32 compiled": (None, True),
    "bfloat16 eager": (torch.bfloat16, False),
    "bfloat16 compiled": (torch.bfloat16, True),
}


def our_step(
    shape: ModelSettings,
    dtype: torch.dtype | None,
    compiled: bool,
    is_explicit: bool | None = None,
) -> Step:
    """Return a step as training/loop.py takes it; `is_explicit`: the kind of attention."""
    hardware = Hardware(torch.device("cpu"), dtype, compiled, torch.get_num_threads(), ())
    model = parallelize(shape, initial_weights(shape, 1), "none", ParallelSettings(), hardware)
    if is_explicit is not None:
        model.gpt.set_explicit_attention(is_explicit)
    optimizer = build_optimizer(model.gpt, OptimizerSettings(), FinetuningSettings())
    keys = torch.zeros(0, dtype=torch.int32)

    def step(rows: Tensor) -> None:
        ids, targets = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
        with hardware.autocast():
            losses = model.wrapped(ids, targets, keys)
            (losses.sum() / ids.numel()).backward()
        stats = reduce_step_stats(model, losses.detach().sum(), ids.numel(), False, 0.0, World())
        clip_grad_norm(model, stats.grad_norm, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def transformers_step(shape: ModelSettings, dtype: torch.dtype | None, compiled: bool) -> Step:
    """Return a step of transformers' GPT-2, whose loss leaves out the last position."""
    config = GPT2Config(
        vocab_size=shape.vocab_size, n_positions=shape.block_size, n_layer=shape.n_layer,
        n_head=shape.n_head, n_embd=shape.n_embd, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        use_cache=False, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).train()
    called = torch.compile(model) if compiled else model

    def loss(rows: Tensor) -> Tensor:
        found: Tensor = called(rows[:, :-1], labels=rows[:, :-1]).loss
        return found

    return plain_step(model, loss, dtype)


def litgpt_step(shape: ModelSettings, dtype: torch.dtype | None, compiled: bool) -> Step:
    """Return a step of litgpt's GPT; it has no learned positions."""
    from litgpt.config import Config  # type: ignore[import-not-found,unused-ignore]
    from litgpt.model import GPT  # type: ignore[import-not-found,unused-ignore]

    config = Config(
        block_size=shape.block_size, vocab_size=shape.vocab_size, n_layer=shape.n_layer,
        padded_vocab_size=shape.padded_vocab, n_head=shape.n_head, n_embd=shape.n_embd, bias=True,
        norm_class_name="LayerNorm", parallel_residual=False, mlp_class_name="GptNeoxMLP",
        gelu_approximate="tanh", rotary_percentage=1.0,
    )  # fmt: skip
    model = GPT(config)
    called = torch.compile(model) if compiled else model

    def loss(rows: Tensor) -> Tensor:
        logits = called(rows[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())

    return plain_step(model, loss, dtype)


def plain_step(
    model: torch.nn.Module, loss_of: Callable[[Tensor], Tensor], dtype: torch.dtype | None
) -> Step:
    """Return a step as a library's users write it."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, betas=(0.9, 0.95))

    def step(rows: Tensor) -> None:
        with torch.autocast("cpu", dtype) if dtype else contextlib.nullcontext():
            loss = loss_of(rows)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()

    return step


PEERS = {"transformers": transformers_step, "litgpt": litgpt_step}


def main() -> None:
    """Print a row for each kind."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="of each contender in a round")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--vocab", type=int, default=65)
    parser.add_argument("--peer", default="transformers", choices=PEERS)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    options = parser.parse_args()
    shape = ModelSettings(
        n_layer=options.layers, n_head=options.width // 64, n_embd=options.width,
        block_size=options.context, vocab_size=options.vocab, bias=True,
        pos_emb="rotary" if options.peer == "litgpt" else "learned",
    )  # fmt: skip
    rows = torch.randint(0, options.vocab, (options.batch, options.context + 1))
    kinds = {name: KINDS[name] for name in options.kinds}
    their_step = PEERS[options.peer]
    contenders = {
        name: (our_step(shape, *kind), their_step(shape, *kind)) for name, kind in kinds.items()
    }
    found: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in kinds}
    for number in range(options.rounds + 1):
        for name, pair in contenders.items():
            for side, step in enumerate(pair):
                began = time.perf_counter()
                for _ in range(options.steps):
                    step(rows)
                if number:
                    found[name][side].append((time.perf_counter() - began) / options.steps)
    print(f"{torch.get_num_threads()} threads, {options.rounds} rounds; ms a step, medians\n")
    print(f"| | ours | {options.peer} | ratio (lowest to highest round) |\n|---|---|---|---|")
    for name, (ours, theirs) in found.items():
        print_row(name, ours, theirs)
    ours = min((pair[0] for pair in found.values()), key=statistics.median)
    theirs = min((pair[1] for pair in found.values()), key=statistics.median)
    print_row("our best, its best", ours, theirs)
    if "float32 eager" in found:
        print_row("our best, its float32 eager", ours, found["float32 eager"][1])


def print_row(name: str, ours: list[float], theirs: list[float]) -> None:
    """Print the medians, and the median and range of the rounds' ratios."""
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    print(
        f"| {name} | {1e3 * statistics.median(ours):,.0f} | {1e3 * statistics.median(theirs):,.0f} "
        f"| {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) |",
        flush=True,
    )


if __name__ == "__main__":
    main()
