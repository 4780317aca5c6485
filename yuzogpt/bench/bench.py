"""`yuzogpt bench`: from settings to a table of what a step costs.

In: the settings of a training run, and of the measurement. Out: rows, as a table or as JSON. Each
row is a short run of the loop of `yuzogpt train`, in a directory that is deleted.
"""

import dataclasses
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from yuzogpt import runs
from yuzogpt.bench.hardware_rate import flops_per_token, matrix_rate, spread
from yuzogpt.bench.launchers import LAUNCHERS, Timing, measure
from yuzogpt.bench.synthetic import tokenizer_of, write_random_corpus
from yuzogpt.checkpoints.resolve import resolve_model
from yuzogpt.config import BenchSettings, ModelSettings, Section, TrainSettings
from yuzogpt.console import terminal
from yuzogpt.console.terminal import say
from yuzogpt.errors import UserError
from yuzogpt.runs import requirements
from yuzogpt.runtime.cores import available_cores
from yuzogpt.runtime.device import Hardware, choose_hardware
from yuzogpt.runtime.signals import raising_on_signals
from yuzogpt.runtime.world import World
from yuzogpt.storage.paths import absolute

NEVER = 10**9  # steps
COLUMNS = ("workers", "ms a step", "tokens/s", "of ideal", "MFU", "first step", "memory")


@dataclass(frozen=True)
class Row:
    """What a step costs, started in one way."""

    launcher: str
    workers: int
    devices: float  # that they have together, each as fast as the measured one
    ms_per_step: float  # median
    ms_low: float  # a tenth of the steps take less
    ms_high: float  # a tenth of the steps take more
    tokens_per_second: float
    mfu: float  # share of the devices' measured matrix rate
    seconds_to_first_step: float
    memory_bytes: int | None


def bench(settings: BenchSettings) -> dict[str, Any]:
    """Measure, and return everything that is known."""
    wanted = settings.bench
    storage = check(settings)
    place = tempfile.TemporaryDirectory(prefix="yuzogpt-bench-", dir=storage)
    with raising_on_signals(), place as directory:
        base = short_run(settings, Path(directory))
        base, _ = runs.check(in_directory(base, directory, "none"))
        for workers in wanted.world_sizes if wanted.launchers != ("bare",) else ():
            requirements.check_world(base, workers, None)
        hardware = choose_hardware(base.device, World(), base.device.compile)
        timings: list[tuple[str, int, Timing]] = []
        if "bare" in wanted.launchers:
            run = in_directory(base, directory, "bare")
            timings.append(("bare", 1, measure("bare", run, 1, wanted.trace)))
            if hardware.compile:
                device = base.device.model_copy(update={"compile": False})
                eager = base.model_copy(update={"device": device})
                run = in_directory(eager, directory, "eager")
                timings.append(("bare, eager", 1, measure("bare", run, 1)))
        for workers in wanted.world_sizes:
            for name in (name for name in wanted.launchers if name != "bare"):
                run = in_directory(base, directory, f"{name}-{workers}")
                timings.append((name, workers, LAUNCHERS[name](run, workers)))
        rate = matrix_rate(hardware)
    warmup = wanted.warmup_steps
    rows = [row(*timing, base.model, hardware, rate, warmup) for timing in timings]
    return {
        "device": hardware.device.type,
        "threads": hardware.threads,
        "choices": list(hardware.reasons),
        "shape": base.model.model_dump(),
        "tokens_per_step": base.batch.global_rows * base.model.block_size,
        "flops_per_token": flops_per_token(base.model),
        "matrix_flops_per_second": rate,
        "rows": [dataclasses.asdict(row) for row in rows],
        "break_even_steps": break_even(rows),
    }


def check(settings: BenchSettings) -> Path | None:
    """Find the mistakes that need no corpus; return where runs are to be, if not just anywhere."""
    wanted, storage, trace = settings.bench, settings.run.storage, settings.bench.trace
    if trace and (not Path(trace).parent.is_dir() or Path(trace).is_dir()):
        raise UserError(f"--trace={trace}: give a file in a directory that exists")
    if settings.finetuning.freeze_layers:
        raise UserError(
            f"--freeze_layers={settings.finetuning.freeze_layers}: only steps in which all layers "
            "learn are measured; --freeze_layers=0"
        )
    if storage:
        directory = absolute(".", storage, "storage")
        directory.mkdir(parents=True, exist_ok=True)
        return directory
    if "ray" in wanted.launchers and runs.ray_address(settings):
        raise UserError(
            "--launchers=ray, on a cluster: say with --storage where all its nodes see what the "
            "others write"
        )
    return None


def short_run(settings: BenchSettings, directory: Path) -> TrainSettings:
    """Return the settings of a run that does nothing but steps; make its corpus, if need be."""
    wanted, data_dir, start = settings.bench, settings.data.data_dir, settings.run.init_from
    steps = wanted.warmup_steps + wanted.steps
    if start not in ("scratch", "resume"):  # new weights do as well; their shape counts
        model = runs.with_model_shape(settings, resolve_model(start).shape).model
        settings = settings.model_copy(update={"model": model})
    if wanted.synthetic:
        rows = steps * settings.batch.global_rows + 2
        data_dir = str(directory / "corpus")
        length = settings.model.block_size
        tokenizer = tokenizer_of(settings.data.dataset, settings.model.vocab_size)
        write_random_corpus(Path(data_dir), tokenizer, train=rows * length, val=2 * length + 1)
    changes: dict[str, dict[str, Any]] = {
        "data": {"data_dir": data_dir},
        "schedule": {"max_iters": steps},
        "batch": {"batch_schedule": "constant"},
        "evaluation": {
            "eval_interval": NEVER, "val_part": "one", "eval_only": False, "eval_tasks": ()
        },
        "checkpoint": {"checkpoint_interval": 0},
        "log": {"log_interval": 1, "health_interval": 0, "network_interval": 0, "wandb_log": False},
        "run": {"init_from": "scratch", "overwrite": False},
        "workers": {"num_workers": 0},
    }  # fmt: skip
    sections: dict[str, Section] = {name: getattr(settings, name) for name in changes}
    updated = {name: part.model_copy(update=changes[name]) for name, part in sections.items()}
    kept = {name: getattr(settings, name) for name in TrainSettings.model_fields}
    return TrainSettings(**{**kept, **updated})


def in_directory(settings: TrainSettings, directory: str, name: str) -> TrainSettings:
    """Return the settings of a run of that name."""
    out_dir = str(Path(directory) / name)
    return settings.model_copy(update={"run": settings.run.model_copy(update={"out_dir": out_dir})})


def devices_of(workers: int, hardware: Hardware) -> float:
    """Return how many times the device that was measured so many workers have.

    A GPU each; or as many threads each as that was measured with, as far as there are cores.
    """
    if hardware.device.type != "cpu":
        return workers
    return max(1.0, min(workers, available_cores() / hardware.threads))


def row(
    name: str,
    workers: int,
    timing: Timing,
    shape: ModelSettings,
    hardware: Hardware,
    rate: float,
    warmup: int,
) -> Row:
    """Turn a run's steps into a row, without those of the warm-up; `rate`: of one device."""
    devices = devices_of(workers, hardware)
    middle, low, high = spread(timing.seconds[warmup:])
    tokens_per_second = timing.tokens / middle
    return Row(
        launcher=name,
        workers=workers,
        devices=devices,
        ms_per_step=1e3 * middle,
        ms_low=1e3 * low,
        ms_high=1e3 * high,
        tokens_per_second=tokens_per_second,
        mfu=tokens_per_second * flops_per_token(shape) / (rate * devices),
        seconds_to_first_step=timing.until_first,
        memory_bytes=timing.memory,
    )


def break_even(rows: list[Row]) -> float | None:
    """Return after how many steps compiling has paid off; None if it was not tried, or never."""
    by_name = {row.launcher: row for row in rows}
    if "bare, eager" not in by_name:
        return None
    compiled, eager = by_name["bare"], by_name["bare, eager"]
    gained = (eager.ms_per_step - compiled.ms_per_step) / 1e3
    lost = compiled.seconds_to_first_step - eager.seconds_to_first_step
    return max(0.0, lost / gained) if gained > 0 else None


def show(found: dict[str, Any], output: str) -> None:
    """Print what was found."""
    if output == "json":
        json.dump(found, sys.stdout, indent=2)
        say()
        return
    rate = found["matrix_flops_per_second"] / 1e9
    say("; ".join([f"{found['threads']} thread(s) on {found['device']}", *found["choices"]]))
    say(
        f"{found['tokens_per_step']:,} tokens a step, {found['flops_per_token'] / 1e6:,.1f} MFLOP "
        f"a token; matrix products alone: {rate:,.0f} GFLOP/s"
    )
    terminal.console().print(table(found["rows"]))
    if any(row["launcher"] == "bare, eager" for row in found["rows"]):
        steps = found["break_even_steps"]
        paid = "never pays off here" if steps is None else f"has paid off after {steps:,.0f} steps"
        say(f"compiling {paid}, its own time counted")


def table(rows: list[dict[str, Any]]) -> Table:
    """Return the rows as a table."""
    drawn = Table(box=SIMPLE_HEAD, show_edge=False)
    drawn.add_column("launcher")
    for name in COLUMNS:
        drawn.add_column(name, justify="right")
    reference = min(rows, key=lambda row: row["workers"])  # the first of them
    for row in rows:
        ideal = reference["tokens_per_second"] * row["devices"] / reference["devices"]
        memory = row["memory_bytes"]
        drawn.add_row(
            row["launcher"],
            str(row["workers"]),
            f"{row['ms_per_step']:,.1f}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['tokens_per_second'] / ideal:.2f}",
            f"{row['mfu']:.1%}",
            f"{row['seconds_to_first_step']:.1f} s",
            "" if memory is None else f"{memory / 2**20:,.0f} MiB",
        )
    return drawn
