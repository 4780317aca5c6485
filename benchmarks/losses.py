"""The loss over a large vocabulary, chunked and unchunked: memory and time, forward and backward.

    python benchmarks/losses.py                     # 4 rows of 1,024 tokens, GPT-2's vocabulary
    python benchmarks/losses.py --rows 2 --dtype bfloat16

Only GPT-2 124M's output matrix and loss are measured: `GPT.losses` on the output of the last norm.
The peer, which takes turns in the same process, computes all logits at once, as nanoGPT does. Both
must give the same losses and gradients. Peak: VmHWM less the resident memory before.
"""

import argparse
import contextlib
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from yuzogpt.config import ModelSettings
from yuzogpt.model.gpt import GPT
from yuzogpt.model.initialization import initialize

SHAPE = ModelSettings(vocab_size=50257, n_layer=1)
Losses = Callable[[Tensor, Tensor], Tensor]


def status(name: str) -> int:
    """Return a value of /proc/self/status in bytes."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return 1024 * int(found[1])


def measure(losses: Losses, model: GPT, x: Tensor, targets: Tensor) -> tuple[float, int, Tensor]:
    """Return the seconds, the peak in bytes, and the gradient of the output matrix."""
    model.zero_grad(set_to_none=True)
    x.grad = None
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to VmRSS
    before, began = status("VmRSS"), time.perf_counter()
    losses(x, targets).mean().backward()  # type: ignore[no-untyped-call]
    seconds = time.perf_counter() - began
    assert model.wte.weight.grad is not None
    return seconds, status("VmHWM") - before, model.wte.weight.grad.clone()


def main() -> None:
    """Print a row for each side."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    options = parser.parse_args()
    model = GPT(SHAPE)
    initialize(model, 1)
    x = torch.randn(options.rows, SHAPE.block_size, SHAPE.n_embd, requires_grad=True)
    targets = torch.randint(0, 50257, x.shape[:2])

    def at_once(x: Tensor, targets: Tensor) -> Tensor:
        logits = model.logits(x).flatten(0, 1)
        return F.cross_entropy(logits, targets.flatten(), reduction="none")

    sides: dict[str, Losses] = {"in pieces": model.losses, "at once": at_once}
    found: dict[str, list[tuple[float, int]]] = {name: [] for name in sides}
    autocast: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
    if options.dtype == "bfloat16":
        autocast = torch.autocast("cpu", torch.bfloat16)
    with autocast:
        for number in range(options.rounds + 1):
            gradients = []
            for name, losses in sides.items():
                taken, peak, gradient = measure(losses, model, x, targets)
                gradients.append(gradient)
                if number:
                    found[name].append((taken, peak))
            rtol = 1e-5 if options.dtype == "float32" else 1e-2
            torch.testing.assert_close(*gradients, rtol=rtol, atol=rtol * 1e-3)
    print(f"{x.shape[:2].numel():,} tokens, {options.dtype}; medians (from, to)\n")
    print("| | seconds | peak, MB |\n|---|---|---|")
    for name, values in found.items():
        seconds = [taken for taken, _ in values]
        peaks = [peak for _, peak in values]
        print(
            f"| {name} | {statistics.median(seconds):.2f} ({min(seconds):.2f} to "
            f"{max(seconds):.2f}) | {statistics.median(peaks) / 1e6:,.0f} |"
        )
    ratio = statistics.median(
        b[0] / a[0] for a, b in zip(found["in pieces"], found["at once"], strict=True)
    )
    print(f"\nat once takes {ratio:.2f} times as long")


if __name__ == "__main__":
    main()
