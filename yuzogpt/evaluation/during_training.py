"""`--eval_tasks`: benchmarks while a model is trained, computed beside the training.

In: a checkpoint of the run, by another process than those that train. Out: a record in
evaluations.jsonl in out_dir, which that process alone writes; the terminal, W&B and the report read
it beside metrics.jsonl.
"""

from collections.abc import Iterable, Mapping

from yuzogpt.checkpoints.resolve import resolve_model
from yuzogpt.config import DeviceSettings, TrainSettings
from yuzogpt.data.remote import open_anywhere
from yuzogpt.errors import UserError, reason_of
from yuzogpt.evaluation.benchmarks import files
from yuzogpt.evaluation.benchmarks.tasks import TASKS, PreparedTask, TaskOptions
from yuzogpt.evaluation.evaluate import check_task
from yuzogpt.runs.directory import EVALUATIONS, STOP
from yuzogpt.runs.event_log import append_record
from yuzogpt.storage.run_storage import WORKER, RunStorage, open_storage

AT_A_TIME = 8  # passages, between two looks whether the run was asked to stop


def read_exams(settings: TrainSettings) -> dict[str, PreparedTask]:
    """Read the benchmarks that `--eval_tasks` names; UserError if one cannot be."""
    wanted, exams = settings.evaluation, dict[str, PreparedTask]()
    if not wanted.eval_tasks:
        return exams
    tokenizer = open_anywhere(settings.data.data_dir).tokenizer
    for name in wanted.eval_tasks:
        check_task(name, tuple(TASKS), "--eval_tasks")
        task = TASKS[name]
        path, _ = files.find(task, wanted.benchmark_dir)
        reading = TaskOptions(
            tokenizer, settings.model.block_size, stride=settings.model.block_size // 2 or 1,
            stop_words=False, limit=wanted.eval_tasks_limit,
        )  # fmt: skip
        protocol = next(iter(task.prepare))  # the paper's, if it has that
        try:
            exams[name] = task.exam(protocol, path, reading)
        except UserError as error:  # which begins with the task's name
            raise UserError(f"--eval_tasks={error}") from None
    return exams


def evaluate_checkpoint(
    name: str, out_dir: str, exams: Mapping[str, PreparedTask], device: DeviceSettings
) -> dict[str, float]:
    """Evaluate a checkpoint, write the record, and return its figures, by task and metric.

    No figures if the checkpoint is gone by now, or the run was asked to stop: that is told.
    """
    run = open_storage(out_dir, WORKER)
    step = step_of(name)
    try:
        figures = figures_of(name, run, exams, device)
    except Exception as error:  # whatever it is: it costs a figure, never the run
        tell_of_failure(name, out_dir, exams, reason_of(error))
        return {}
    said = ", ".join(f"{key} {value:.4g}" for key, value in figures.items())
    append_record(run / EVALUATIONS, "tasks", f"step {step}: {said}", step=step, **figures)
    return figures


def tell_of_failure(name: str, out_dir: str, tasks: Iterable[str], reason: str) -> None:
    """Write the record of a checkpoint that has no figures."""
    run, step = open_storage(out_dir, WORKER), step_of(name)
    text = f"!!! step {step} was not evaluated on {', '.join(tasks)} ({reason})"
    append_record(run / EVALUATIONS, "notice", text, step=step)


def step_of(name: str) -> int:
    """Return the step of a checkpoint of that name."""
    return int(name.rpartition("-")[2])


def figures_of(
    name: str, run: RunStorage, exams: Mapping[str, PreparedTask], device: DeviceSettings
) -> dict[str, float]:
    """Return the figures of a checkpoint; InterruptedError if the run is asked to stop."""
    from yuzogpt.checkpoints.load import load_model
    from yuzogpt.evaluation.scoring import score
    from yuzogpt.runtime.device import choose_hardware
    from yuzogpt.runtime.world import World

    check_no_early_stop(run)
    hardware = choose_hardware(device, World())
    model = load_model(resolve_model(name)).to(hardware.device)
    found: dict[str, float] = {}
    for task, exam in exams.items():
        scores = []
        for first in range(0, len(exam.passages), AT_A_TIME):
            check_no_early_stop(run)
            passages = exam.passages[first : first + AT_A_TIME]
            scores += score(model, passages, AT_A_TIME, hardware)
        found |= {f"{task} {figure.metric}": figure.value for figure in exam.judge(scores)}
    return found


def check_no_early_stop(run: RunStorage) -> None:
    """Raise InterruptedError if the run was asked to stop: it ends within 30 seconds."""
    if (run / STOP).exists():
        raise InterruptedError("the run is asked to stop")
