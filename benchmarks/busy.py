"""Steps beside busy programs: what other processes on the cores cost, by spin count.

    python benchmarks/busy.py                              # as commands set it, and libgomp's own
    python benchmarks/busy.py --spins libgomp 2000 500 --rounds 9

A training step of the recipe shakespeare_char_cpu, and a decoding step of one sample of GPT-2 124M
in float32, on an otherwise quiet machine, and beside 1 and 4 busy loops of the lowest priority
(nice 19). A process for each spin count (`libgomp`: its own; `ours`: what commands set) is started
once. In each round, every process measures each of the two for a second and a half at each number
of loops, in turn. The rest of the time it sleeps.
"""

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from yuzogpt.runtime.cores import SPIN_COUNT, limit_spinning

SECONDS = 1.5  # of each measurement
NAMES = ("training", "decoding")
Key = tuple[str, str, int]  # what, spin count, busy loops


def training_step() -> Callable[[], object]:
    """Return a step of the CPU recipe on random tokens."""
    import torch
    from speed import our_step  # type: ignore[import-not-found,unused-ignore]

    from yuzogpt.config import DeviceSettings, TrainSettings
    from yuzogpt.config.resolve import resolve
    from yuzogpt.runtime.device import choose_hardware
    from yuzogpt.runtime.world import World

    settings = resolve(TrainSettings, ["shakespeare_char_cpu"], ["--vocab_size=65"])
    hardware = choose_hardware(DeviceSettings(device="cpu"), World())
    step = our_step(settings.model, hardware.autocast_dtype, False)
    rows = torch.randint(65, (settings.batch.batch_size, settings.model.block_size + 1))
    return lambda: step(rows)


def decoding_step() -> Callable[[], object]:
    """Return a decoding step of one sample of GPT-2 124M."""
    import torch
    from sampling import PROMPT, our_model  # type: ignore[import-not-found,unused-ignore]

    from yuzogpt.inference.engine import Engine
    from yuzogpt.inference.requests import Request, SamplingParams
    from yuzogpt.tokenization.tokenizer import gpt2_tokenizer

    engine = Engine(our_model(), gpt2_tokenizer(), torch.device("cpu"))

    def step() -> None:
        if not engine.busy:
            sampling = SamplingParams(temperature=0.8, top_k=200, seed=1)
            engine.submit(Request(PROMPT, 500, sampling, stop_at_end_of_text=False))
        engine.step()

    return step


def measure_on_request() -> None:
    """Answer each line of stdin, the name of a step, with its median in seconds."""
    steps = {"training": training_step(), "decoding": decoding_step()}
    for step in steps.values():
        for _ in range(5):
            step()
    print("ready", flush=True)
    for line in sys.stdin:
        seconds, end = [], time.perf_counter() + SECONDS
        while (started := time.perf_counter()) < end:
            steps[line.strip()]()
            seconds.append(time.perf_counter() - started)
        print(statistics.median(seconds), flush=True)


class Measurer:
    """A process with one spin count."""

    def __init__(self, spins: str) -> None:
        """Start it; `spins`: libgomp, ours, or a number."""
        environment = {name: value for name, value in os.environ.items() if name != SPIN_COUNT}
        if spins == "ours":
            limit_spinning(environment)
        elif spins != "libgomp":
            environment[SPIN_COUNT] = spins
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--measure"], env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        self._read()

    def ask(self, name: str) -> float:
        """Return the median seconds of a step."""
        assert self.process.stdin
        print(name, file=self.process.stdin, flush=True)
        return float(self._read())

    def _read(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline() or sys.exit("a measuring process has ended")


@contextlib.contextmanager
def busy_loops(count: int) -> Iterator[None]:
    """Run loops of the lowest priority meanwhile."""
    command = ["nice", "-n", "19", sys.executable, "-c", "while True: pass"]
    # In sessions of their own, as other people's programs: Linux shares cores among sessions first
    # (autogroup), and within one the nice value would keep the loops away from our threads.
    loops = [subprocess.Popen(command, start_new_session=True) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def cpu_name() -> str:
    """Return the CPU's name and features that matter, as Linux has them."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    fields = dict(line.replace("\t", "").partition(":")[::2] for line in lines)
    flags = [name for name in ("avx2", "avx512f", "avx512_bf16") if name in fields["flags"].split()]
    return f"{fields['model name'].strip()} ({', '.join(flags)}), {os.cpu_count()} cores"


def report(found: dict[Key, list[float]], spins: Sequence[str], loops: Sequence[int]) -> None:
    """Print a row for each step and spin count; ratios are medians of the rounds' own."""
    first = spins[0]
    beside = " | ".join(f"{count} loops" for count in loops[1:])
    print(f"| step | spins | quiet | against {first} | {beside} |")
    print("|---|---|---|---|" + "---|" * (len(loops) - 1))
    for name in NAMES:
        for spin in spins:
            quiet = found[name, spin, 0]
            pairs = zip(quiet, found[name, first, 0], strict=True)
            against = statistics.median(own / other for own, other in pairs)
            cells = [f"{1e3 * statistics.median(quiet):.1f} ms", f"{against:.2f}"]
            for count in loops[1:]:
                busy = found[name, spin, count]
                times = [b / q for b, q in zip(busy, quiet, strict=True)]
                middle, low, high = statistics.median(times), min(times), max(times)
                cells.append(
                    f"{1e3 * statistics.median(busy):,.1f} ms: {middle:.2f} times "
                    f"({low:.2f} to {high:.2f})"
                )
            print(f"| {name} | {spin} | {' | '.join(cells)} |")


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--spins", nargs="+", default=["libgomp", "ours"])
    parser.add_argument("--loops", type=int, nargs="+", default=[0, 1, 4])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure_on_request()
        return
    assert options.loops[0] == 0, "quiet comes first"
    measurers = {spins: Measurer(spins) for spins in options.spins}
    found: dict[Key, list[float]] = {}
    for _ in range(options.rounds):
        for count in options.loops:
            with busy_loops(count):
                for name in NAMES:
                    for spins, measurer in measurers.items():
                        found.setdefault((name, spins, count), []).append(measurer.ask(name))
    print(f"{cpu_name()}; medians of {options.rounds} rounds, ranges in parentheses\n")
    report(found, options.spins, options.loops)


if __name__ == "__main__":
    main()
