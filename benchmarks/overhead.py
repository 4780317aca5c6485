"""What Ray Train costs a step: the same loop under torchrun and under Ray, in alternated pairs.

    python benchmarks/overhead.py                        # ten pairs, 1 and 2 workers
    python benchmarks/overhead.py --pairs 3 --workers 1

Each run is a command of its own, on random tokens; steps take at least 200 ms. A pair's ratio is
that of its medians. The interval is that of the median ratio's order statistics (of ten pairs, the
second and the ninth: 97.9%).
"""

import argparse
import math
import statistics
import tempfile
from pathlib import Path

from yuzogpt.bench.bench import in_directory, short_run
from yuzogpt.bench.launchers import LAUNCHERS
from yuzogpt.config import BenchSettings
from yuzogpt.overrides import resolve

FLAGS = (
    "--n_layer=6 --n_head=4 --n_embd=256 --block_size=128 --batch_size=8 "
    "--gradient_accumulation_steps=2 --device=cpu --dtype=float32"
).split()


def interval(ratios: list[float]) -> tuple[float, float]:
    """Return the order statistics that enclose the median with at least 95%, or the extremes."""
    n, ordered = len(ratios), sorted(ratios)
    cut = 0
    while cut + 1 < n / 2 and 2 * sum(math.comb(n, i) for i in range(cut + 2)) / 2**n <= 0.05:
        cut += 1
    return ordered[cut], ordered[n - 1 - cut]


def main() -> None:
    """Print each pair, then a row for each number of workers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=30)
    wanted, flags = parser.parse_known_args()
    settings = resolve(BenchSettings, [], [*FLAGS, f"--steps={wanted.steps}", *flags])
    with tempfile.TemporaryDirectory() as directory:
        base = short_run(settings, Path(directory))
        for workers in wanted.workers:
            found: dict[str, list[float]] = {"torchrun": [], "ray": []}
            for pair in range(wanted.pairs):
                for name in sorted(found, reverse=pair % 2 == 0):  # who is first, changes
                    run = in_directory(base, directory, f"{name}-{workers}-{pair}")
                    seconds = LAUNCHERS[name](run, workers).seconds[settings.bench.warmup_steps :]
                    found[name].append(1e3 * statistics.median(seconds))
                print(
                    *(f"{name} {values[-1]:.1f} ms" for name, values in found.items()), flush=True
                )
            ratios = [a / b for a, b in zip(found["ray"], found["torchrun"], strict=True)]
            low, high = interval(ratios)
            print(
                f"{workers} worker(s), {wanted.pairs} pairs: Ray over torchrun "
                f"{statistics.median(ratios):.3f} ({low:.3f} to {high:.3f}); torchrun "
                f"{statistics.median(found['torchrun']):.1f} ms a step",
                flush=True,
            )


if __name__ == "__main__":
    main()
