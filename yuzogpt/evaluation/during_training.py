"""`--eval_tasks`: score each checkpoint on benchmarks while training continues.

A process apart from the workers does this. It alone writes the records, to evaluations.jsonl in
out_dir; the terminal, W&B and the report read that file beside metrics.jsonl.
"""

from collections.abc import Iterable, Mapping

from yuzogpt.checkpoints.resolve import resolve_model
from yuzogpt.config import DeviceSettings, TrainSettings
from yuzogpt.data.remote import open_anywhere
from yuzogpt.errors import UserError, reason_of
from yuzogpt.evaluation.benchmarks import files
from yuzogpt.evaluation.benchmarks.readers import PreparedTask, TaskOptions
from yuzogpt.evaluation.benchmarks.tasks import TASKS, prepare
from yuzogpt.runs.directory import EVALUATIONS, STOP
from yuzogpt.runs.event_log import append_record
from yuzogpt.storage.run_storage import WORKER, RunStorage, open_storage

PASSAGES_PER_STOP_CHECK = 8


def prepare_tasks(settings: TrainSettings) -> dict[str, PreparedTask]:
    """Read the benchmarks of `--eval_tasks`; UserError if one cannot be read."""
    evaluation, prepared = settings.evaluation, dict[str, PreparedTask]()
    if not evaluation.eval_tasks:
        return prepared
    tokenizer = open_anywhere(settings.data.data_dir).tokenizer
    for name in evaluation.eval_tasks:
        path, _ = files.find(name, evaluation.benchmark_dir)
        options = TaskOptions(
            tokenizer, settings.model.block_size, stride=settings.model.block_size // 2 or 1,
            stop_words=False, limit=evaluation.eval_tasks_limit,
        )  # fmt: skip
        protocol = next(iter(TASKS[name].protocols))  # the paper's, if the task has it
        try:
            prepared[name] = prepare(name, protocol, path, options)
        except UserError as error:  # it begins with the task's name
            raise UserError(f"--eval_tasks={error}") from None
    return prepared


def evaluate_checkpoint(
    name: str, out_dir: str, tasks: Mapping[str, PreparedTask], device: DeviceSettings
) -> dict[str, float]:
    """Evaluate a checkpoint, write the record, and return the values by task and metric.

    If the checkpoint is gone or the run was asked to stop, write a notice and return nothing.
    """
    run = open_storage(out_dir, WORKER)
    step = checkpoint_step(name)
    try:
        values = evaluate_tasks(name, run, tasks, device)
    except Exception as error:  # whatever it is, it must not end the run
        record_failure(name, out_dir, tasks, reason_of(error))
        return {}
    text = ", ".join(f"{key} {value:.4g}" for key, value in values.items())
    append_record(run / EVALUATIONS, "tasks", f"step {step}: {text}", step=step, **values)
    return values


def record_failure(name: str, out_dir: str, tasks: Iterable[str], reason: str) -> None:
    """Write the record of a checkpoint that could not be evaluated."""
    run, step = open_storage(out_dir, WORKER), checkpoint_step(name)
    text = f"!!! step {step} was not evaluated on {', '.join(tasks)} ({reason})"
    append_record(run / EVALUATIONS, "notice", text, step=step)


def checkpoint_step(name: str) -> int:
    return int(name.rpartition("-")[2])


def evaluate_tasks(
    name: str, run: RunStorage, tasks: Mapping[str, PreparedTask], device: DeviceSettings
) -> dict[str, float]:
    """Return a checkpoint's metrics; InterruptedError if the run is asked to stop."""
    from yuzogpt.checkpoints.load import load_model
    from yuzogpt.evaluation.scoring import score
    from yuzogpt.runtime.device import choose_hardware
    from yuzogpt.runtime.world import World

    check_no_early_stop(run)
    hardware = choose_hardware(device, World())
    model = load_model(resolve_model(name)).to(hardware.device)
    values: dict[str, float] = {}
    for task, prepared in tasks.items():
        scores = []
        for first in range(0, len(prepared.passages), PASSAGES_PER_STOP_CHECK):
            check_no_early_stop(run)
            passages = prepared.passages[first : first + PASSAGES_PER_STOP_CHECK]
            scores += score(model, passages, PASSAGES_PER_STOP_CHECK, hardware)
        metrics = prepared.compute_metrics(scores)
        values |= {f"{task} {metric.name}": metric.value for metric in metrics}
    return values


def check_no_early_stop(run: RunStorage) -> None:
    """Raise InterruptedError if the run was asked to stop: it must end within 30 seconds."""
    if (run / STOP).exists():
        raise InterruptedError("the run is asked to stop")
