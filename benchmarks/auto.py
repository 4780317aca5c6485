"""What a run chooses by itself on this CPU, against every combination of what it chooses from.

    python benchmarks/auto.py                       # the CPU recipe and the fast one
    python benchmarks/auto.py --presets shakespeare_char_cpu --rounds 15 --threads 1 2 4
    sudo python benchmarks/auto.py --realtime       # on a machine that other programs use

Combinations of dtype, kind of attention and threads take turns, round by round: whole training
steps on random tokens. A ratio is the median over rounds of a combination's time by that of the
chosen one; at least 0.95 for the best means that the choice is within 5%. `--realtime` measures in
bursts of real-time priority, with pauses for the others.
"""

import argparse
import contextlib
import os
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from busy import cpu_name
from speed import our_step  # type: ignore[import-not-found,unused-ignore]

from yuzogpt.config import TrainSettings
from yuzogpt.config.resolve import resolve
from yuzogpt.runtime.cores import available_cores, limit_spinning
from yuzogpt.runtime.device import choose_hardware
from yuzogpt.runtime.world import World
from yuzogpt.training.arithmetic import AUTOCAST, MeasuredPart, choose_arithmetic

Key = tuple[str, int]  # dtype and attention, threads
STEPS = 3  # whose median a round counts


@contextlib.contextmanager
def undisturbed(is_realtime: bool) -> Iterator[None]:
    """Give this process's threads real-time priority meanwhile, if asked, after a pause."""
    if not is_realtime:
        yield
        return
    time.sleep(0.3)
    set_policy(os.SCHED_RR, 1)
    yield
    set_policy(os.SCHED_OTHER, 0)


def set_policy(policy: int, priority: int) -> None:
    """Set how all threads of this process are scheduled."""
    for thread in Path("/proc/self/task").iterdir():
        os.sched_setscheduler(int(thread.name), policy, os.sched_param(priority))


def compare(preset: str, threads: list[int], rounds: int, is_realtime: bool) -> None:
    """Measure all combinations for a preset, and print a table."""
    flags = ["--vocab_size=65", "--autotune=now", "--device=cpu", "--dropout=0"]
    settings = resolve(TrainSettings, [preset], flags)
    hardware = choose_hardware(settings.device, World())
    torch.zeros(1, device="meta").normal_()  # what a run imports in any case
    with undisturbed(is_realtime):
        started = time.perf_counter()
        _, arithmetic, line = choose_arithmetic(settings, World(), hardware, None)
        seconds = time.perf_counter() - started
    assert arithmetic
    chosen = (f"{arithmetic.dtype} {arithmetic.attention}", hardware.threads)
    names = MeasuredPart(settings, World()).names
    keys = list(dict.fromkeys([chosen, *((name, count) for name in names for count in threads)]))
    rows = torch.randint(65, (settings.batch.batch_size, settings.model.block_size + 1))
    steps = {}
    for name in names:
        dtype, attention = name.split()
        steps[name] = our_step(settings.model, AUTOCAST[dtype], False, attention == "explicit")

    def measure(key: Key) -> float:
        torch.set_num_threads(key[1])
        taken = []
        with undisturbed(is_realtime):
            steps[key[0]](rows)  # with these threads, which may have to start
            for _ in range(STEPS):
                before = time.perf_counter()
                steps[key[0]](rows)
                taken.append(time.perf_counter() - before)
        return statistics.median(taken)

    found: dict[Key, list[float]] = {key: [] for key in keys}
    for _ in range(rounds):
        for key in keys:
            found[key].append(measure(key))
    print(f"\n{preset}, chosen in {seconds:.1f} s: {line}\n")
    print("| combination | threads | ms a step | of the chosen one's time |")
    print("|---|---|---|---|")
    for key in sorted(keys, key=lambda key: statistics.median(found[key])):
        ratios = [own / other for own, other in zip(found[key], found[chosen], strict=True)]
        mark = " (chosen)" if key == chosen else ""
        middle = 1e3 * statistics.median(found[key])
        print(f"| {key[0]}{mark} | {key[1]} | {middle:.1f} | {statistics.median(ratios):.2f} |")


def main() -> None:
    """Measure each preset."""
    if "torch" in sys.modules and "GOMP_SPINCOUNT" not in os.environ:
        limit_spinning()
        os.execv(sys.executable, [sys.executable, *sys.argv])  # as commands set it, before torch
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    recipes = ["shakespeare_char_cpu", "shakespeare_char_fast"]
    parser.add_argument("--presets", nargs="+", default=recipes)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, available_cores()])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--realtime", action="store_true")
    options = parser.parse_args()
    print(f"{cpu_name()}; medians of {options.rounds} rounds")
    for preset in options.presets:
        compare(preset, options.threads, options.rounds, options.realtime)


if __name__ == "__main__":
    main()
