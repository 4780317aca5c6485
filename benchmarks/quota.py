"""Steps under a CPU quota: the threads that `--threads=0` chooses against every other number.

    sudo python benchmarks/quota.py                      # half a core, one core; three rounds
    sudo python benchmarks/quota.py --quotas 0.5 1.5 --threads 0 1 2 4

Each run is a command of its own, `yuzogpt train` with the preset shakespeare_char_cpu on random
tokens, in a control group with that quota. Each round runs every number of threads once. Tokens/s
are over all steps after the first 20, pauses included, because a quota stops a process for the rest
of each period. The script needs root, and a cpu controller of Linux's cgroups (version 1 or 2).
"""

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from yuzogpt import runs
from yuzogpt.bench.synthetic import make_tokenizer, write_random_corpus
from yuzogpt.runs.event_log import read_records
from yuzogpt.runtime.cores import SYSTEM, THREADS, groups

PRESET, DATASET = "shakespeare_char_cpu", "shakespeare_char"
WARMUP_STEPS = 20  # not counted
PERIOD_US = 100_000


@contextlib.contextmanager
def group_with_quota() -> Iterator[Path]:
    """Make a control group; yield the file of its quota."""
    for place in dict.fromkeys(groups("cpu", SYSTEM)):
        group = place / f"yuzogpt-quota-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            for name in ("cpu.max", "cpu.cfs_quota_us"):
                if (group / name).exists():
                    yield group / name
                    return
        finally:
            group.rmdir()
    sys.exit("no control group with a cpu controller can be made here: it needs root and cgroups")


def set_quota(file: Path, cores: float) -> None:
    """Limit a group to the time of `cores` cores."""
    quota = round(cores * PERIOD_US)
    file.write_text(f"{quota} {PERIOD_US}" if file.name == "cpu.max" else str(quota))


def tokens_per_second(group: Path, directory: Path, name: str, flags: list[str]) -> float:
    """Train in a group; return the tokens per second of the steps after the warm-up."""
    run = directory / name
    command = [sys.executable, "-m", "yuzogpt", "train", PRESET, "--num_workers=0"]
    command += [f"--data_dir={directory / 'corpus'}", f"--out_dir={run}", *flags]
    enter = ["sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh"]
    environment = {name: value for name, value in os.environ.items() if name != THREADS}
    ended = subprocess.run(
        [*enter, *command], env=environment, capture_output=True, text=True, check=False
    )
    if ended.returncode:
        sys.exit(f"{' '.join(command)}: {ended.stderr}")
    steps = [one for one in read_records(run / runs.METRICS) if one["kind"] == "train"]
    first, last = steps[WARMUP_STEPS], steps[-1]
    made = (last["step"] - first["step"]) * first["tokens_per_step"]
    return float(made / (last["time"] - first["time"]))


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quotas", type=float, nargs="+", default=[0.5, 1.0])
    parser.add_argument("--threads", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=150)
    options = parser.parse_args()
    schedule = (
        f"--max_iters={WARMUP_STEPS + options.steps}",
        f"--eval_interval={WARMUP_STEPS + options.steps}",
    )
    rates: dict[tuple[float, int], list[float]] = {}
    with tempfile.TemporaryDirectory() as folder, group_with_quota() as file:
        directory = Path(folder)
        write_random_corpus(directory / "corpus", make_tokenizer(DATASET, 0), 200_000, 2_000)
        for turn in range(options.rounds):
            for quota in options.quotas:
                set_quota(file, quota)
                for threads in options.threads:
                    name, flags = f"{quota}-{threads}-{turn}", [*schedule, f"--threads={threads}"]
                    flags += ["--log_interval=1", "--eval_iters=1"]
                    rate = tokens_per_second(file.parent, directory, name, flags)
                    rates.setdefault((quota, threads), []).append(rate)
                    print(f"round {turn}: {quota:g} cores, threads={threads}: {rate:,.0f}/s")
    print(f"\ntokens/s, medians of {options.rounds}; threads=0 chooses by itself")
    for quota in options.quotas:
        medians = {n: statistics.median(rates[quota, n]) for n in options.threads}
        best = max(medians.values())
        cells = [f"threads={n}: {rate:,.0f} ({rate / best:.2f})" for n, rate in medians.items()]
        print(f"{quota:g} cores   {'   '.join(cells)}")


if __name__ == "__main__":
    main()
