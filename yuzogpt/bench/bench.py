"""`yuzogpt bench`: a table, or JSON, of what a training step costs with each launcher.

Each row is a short run of the loop of `yuzogpt train`, in a directory that is deleted afterwards.
"""

import dataclasses
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from yuzogpt import runs
from yuzogpt.bench.hardware_rate import flops_per_token, matmul_rate, median_and_deciles
from yuzogpt.bench.launchers import LAUNCHERS, Timing, measure
from yuzogpt.bench.synthetic import make_tokenizer, write_random_corpus
from yuzogpt.checkpoints.resolve import resolve_model
from yuzogpt.config import BenchSettings, ModelSettings, TrainSettings, with_changes
from yuzogpt.console import terminal
from yuzogpt.console.terminal import say
from yuzogpt.errors import UserError
from yuzogpt.runs import requirements
from yuzogpt.runtime.cores import available_cores
from yuzogpt.runtime.device import Hardware, choose_hardware
from yuzogpt.runtime.signals import raising_on_signals
from yuzogpt.runtime.world import World
from yuzogpt.storage.paths import absolute
from yuzogpt.training.arithmetic import choose_arithmetic

NO_EVALUATION = 10**9  # steps between two evaluations
TABLE_WIDTH = 100  # columns, if stdout is no terminal
COLUMNS = ("workers", "ms a step", "tokens/s", "of ideal", "MFU", "first step", "memory")


@dataclass(frozen=True)
class Row:
    """What a step costs with one launcher and number of workers."""

    launcher: str
    workers: int
    devices: float  # of all workers, in units of the measured device
    ms_per_step: float  # median
    ms_low: float  # first decile
    ms_high: float  # last decile
    tokens_per_second: float
    mfu: float  # share of the devices' measured matmul rate
    seconds_to_first_step: float
    memory_bytes: int | None


def bench(settings: BenchSettings) -> dict[str, Any]:
    """Measure, and return all results."""
    options = settings.bench
    temporary = tempfile.TemporaryDirectory(prefix="yuzogpt-bench-", dir=check(settings))
    with raising_on_signals(), temporary as directory:
        base = short_run(settings, Path(directory))
        base = runs.check(in_directory(base, directory, "none")).settings
        for workers in options.world_sizes if options.launchers != ("bare",) else ():
            requirements.check_world(base.batch, workers, None)
        hardware = choose_hardware(base.device, World(), base.device.compile)
        hardware, _, arithmetic = choose_arithmetic(base, World(), hardware, None)
        if base.device.autotune == "now":  # not once more in each run
            base = with_changes(base, {"device.autotune": "cached"})
        timings: list[tuple[str, int, Timing]] = []
        if "bare" in options.launchers:
            run = in_directory(base, directory, "bare")
            timings.append(("bare", 1, measure("bare", run, 1, options.trace)))
            if hardware.compile:
                eager = with_changes(base, {"device.compile": False})
                run = in_directory(eager, directory, "eager")
                timings.append(("bare, eager", 1, measure("bare", run, 1)))
        for workers in options.world_sizes:
            for name in (name for name in options.launchers if name != "bare"):
                run = in_directory(base, directory, f"{name}-{workers}")
                timings.append((name, workers, LAUNCHERS[name](run, workers)))
        rate = matmul_rate(hardware)
    warmup = options.warmup_steps
    rows = [make_row(*timing, base.model, hardware, rate, warmup) for timing in timings]
    return {
        "device": hardware.device.type,
        "threads": hardware.threads,
        "choices": [*hardware.reasons, *filter(None, [arithmetic])],
        "shape": base.model.model_dump(),
        "tokens_per_step": base.batch.global_rows * base.model.block_size,
        "flops_per_token": flops_per_token(base.model),
        "matrix_flops_per_second": rate,
        "rows": [dataclasses.asdict(row) for row in rows],
        "break_even_steps": break_even(rows),
    }


def check(settings: BenchSettings) -> Path | None:
    """Find the mistakes that need no corpus; return the directory for the runs, None for any."""
    storage, trace = settings.run.storage, settings.bench.trace
    if trace and (not Path(trace).parent.is_dir() or Path(trace).is_dir()):
        raise UserError(f"--trace={trace}: give a file in a directory that exists")
    if settings.finetuning.freeze_layers:
        raise UserError(
            f"--freeze_layers={settings.finetuning.freeze_layers}: bench measures steps that train "
            "all layers; use --freeze_layers=0"
        )
    if storage:
        directory = absolute(".", storage, "storage")
        directory.mkdir(parents=True, exist_ok=True)
        return directory
    if "ray" in settings.bench.launchers and runs.ray_address(settings.workers):
        raise UserError(
            "--launchers=ray, on a cluster: give a directory that all nodes share with --storage"
        )
    return None


def short_run(settings: BenchSettings, directory: Path) -> TrainSettings:
    """Return the settings of a run of training steps only; write its corpus if it is synthetic."""
    options, data_dir, start = settings.bench, settings.data.data_dir, settings.run.init_from
    steps = options.warmup_steps + options.steps
    if start not in ("scratch", "resume"):  # only the shape matters, so weights are new
        model = runs.with_shape(settings.model, resolve_model(start).shape)
        settings = settings.model_copy(update={"model": model})
    if options.synthetic:
        rows = steps * settings.batch.global_rows + 2
        data_dir = str(directory / "corpus")
        length = settings.model.block_size
        tokenizer = make_tokenizer(settings.data.dataset, settings.model.vocab_size)
        write_random_corpus(Path(data_dir), tokenizer, train=rows * length, val=2 * length + 1)
    changes = {
        "data.data_dir": data_dir,
        "schedule.max_iters": steps,
        "batch.batch_schedule": "constant",
        "evaluation.eval_interval": NO_EVALUATION,
        "evaluation.val_part": "one",
        "evaluation.eval_only": False,
        "evaluation.eval_tasks": (),
        "checkpoint.checkpoint_interval": 0,
        "log.log_interval": 1,
        "log.health_interval": 0,
        "log.network_interval": 0,
        "log.loggers": (),
        "log.wandb_log": False,
        "run.init_from": "scratch",
        "run.overwrite": False,
        "workers.num_workers": 0,
    }
    changed = with_changes(settings, changes)
    return TrainSettings(**{name: getattr(changed, name) for name in TrainSettings.model_fields})


def in_directory(settings: TrainSettings, directory: str, name: str) -> TrainSettings:
    """Return the settings of a run with that name in the directory."""
    out_dir = str(Path(directory) / name)
    return with_changes(settings, {"run.out_dir": out_dir})


def count_devices(workers: int, hardware: Hardware) -> float:
    """Return how many measured devices the workers have together.

    Each has a GPU; or as many threads as were measured, as long as there are cores.
    """
    if hardware.device.type != "cpu":
        return workers
    return max(1.0, min(workers, available_cores() / hardware.threads))


def make_row(
    name: str,
    workers: int,
    timing: Timing,
    shape: ModelSettings,
    hardware: Hardware,
    rate: float,
    warmup: int,
) -> Row:
    """Turn a run's steps after the warm-up into a row; `rate`: matmul FLOP/s of one device."""
    devices = count_devices(workers, hardware)
    middle, low, high = median_and_deciles(timing.seconds[warmup:])
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
        seconds_to_first_step=timing.seconds_to_first_step,
        memory_bytes=timing.memory_bytes,
    )


def break_even(rows: list[Row]) -> float | None:
    """Return after how many steps compiling pays off; None if never, or if it was not tried."""
    by_name = {row.launcher: row for row in rows}
    if "bare, eager" not in by_name:
        return None
    compiled, eager = by_name["bare"], by_name["bare, eager"]
    saved_per_step = (eager.ms_per_step - compiled.ms_per_step) / 1e3
    compile_seconds = compiled.seconds_to_first_step - eager.seconds_to_first_step
    return max(0.0, compile_seconds / saved_per_step) if saved_per_step > 0 else None


def show(results: dict[str, Any], output: str) -> None:
    if output == "json":
        json.dump(results, sys.stdout, indent=2)
        say()
        return
    rate = results["matrix_flops_per_second"] / 1e9
    mflop = results["flops_per_token"] / 1e6
    say("; ".join([f"{results['threads']} thread(s) on {results['device']}", *results["choices"]]))
    say(
        f"{results['tokens_per_step']:,} tokens a step, {mflop:,.1f} MFLOP a token; "
        f"matrix products alone: {rate:,.0f} GFLOP/s"
    )
    terminal.console(TABLE_WIDTH).print(build_table(results["rows"]))
    if any(row["launcher"] == "bare, eager" for row in results["rows"]):
        steps = results["break_even_steps"]
        paid = "never pays off here" if steps is None else f"pays off after {steps:,.0f} steps"
        say(f"compiling {paid}, its own time counted")


def build_table(rows: list[dict[str, Any]]) -> Table:
    cells = []
    reference = min(rows, key=lambda row: row["workers"])  # the first with the fewest workers
    for row in rows:
        ideal = reference["tokens_per_second"] * row["devices"] / reference["devices"]
        memory = row["memory_bytes"]
        cells.append(
            [
                row["launcher"],
                str(row["workers"]),
                f"{row['ms_per_step']:,.1f}",
                f"{row['tokens_per_second']:,.0f}",
                f"{row['tokens_per_second'] / ideal:.2f}",
                f"{row['mfu']:.1%}",
                f"{row['seconds_to_first_step']:.1f} s",
                "" if memory is None else f"{memory / 2**20:,.0f} MiB",
            ]
        )
    return terminal.table(["launcher", *COLUMNS], cells, numeric=COLUMNS)
