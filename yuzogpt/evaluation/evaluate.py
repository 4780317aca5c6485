"""`yuzogpt evaluate`: from settings to figures.

In: a model and the names of benchmarks. Out: results.json and a table. Each benchmark is cut into
shards (shards.py); what computes them, this process or Ray's, is handed in.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from yuzogpt import __version__
from yuzogpt.checkpoints.resolve import ModelReference, resolve_model
from yuzogpt.config import BenchmarkSettings, EvaluateSettings
from yuzogpt.console.terminal import say
from yuzogpt.errors import UserError, nearest
from yuzogpt.evaluation import results
from yuzogpt.evaluation.benchmarks import files
from yuzogpt.evaluation.benchmarks.corpus_loss import LOSS, loss_exam
from yuzogpt.evaluation.benchmarks.tasks import TASKS, PreparedTask, TaskOptions
from yuzogpt.evaluation.passages import Score
from yuzogpt.evaluation.results import Result
from yuzogpt.evaluation.shards import ScoringJob, Shard, compute, shards_of, undone, weights_hash
from yuzogpt.runs.requirements import check_writable
from yuzogpt.storage.lease import Lease
from yuzogpt.storage.run_storage import LocalStorage

# Computes shards, in any order, and yields each with its scores.
Compute = Callable[[Sequence[Shard]], Iterator[tuple[Shard, list[Score]]]]


def here(shards: Sequence[Shard]) -> Iterator[tuple[Shard, list[Score]]]:
    """Compute shards in this process."""
    return ((shard, compute(shard)) for shard in shards)


@dataclass(frozen=True)
class Evaluation:
    """What is to be evaluated, all of it known to be there."""

    settings: EvaluateSettings
    reference: ModelReference
    directory: Path
    read: dict[str, tuple[str, str]]  # of each task: where its text is, and what that is known by


def check(settings: EvaluateSettings, directory: Path, corpus: str) -> Evaluation:
    """Find the model and the files; UserError for what is missing or does not exist."""
    check_tasks(settings.benchmarks)
    check_writable(directory, settings.evaluated.out_dir or directory.name)
    reference = resolve_model(settings.evaluated.model, settings.benchmarks.context)
    results.refuse_foreign(directory)
    if not settings.evaluated.overwrite:
        results.check_same_model(directory, reference.name)
    reference.tokenizer()
    read: dict[str, tuple[str, str]] = {}
    for name in dict.fromkeys(settings.benchmarks.tasks):
        if name == LOSS:
            from yuzogpt.data.remote import open_anywhere

            read[name] = corpus, open_anywhere(corpus).fingerprint
        else:
            path, digest = files.find(TASKS[name], settings.benchmarks.benchmark_dir)
            read[name] = str(path), digest
    return Evaluation(settings, reference, directory, read)


def check_tasks(wanted: BenchmarkSettings) -> None:
    """Raise UserError for a task that there is not, or not in this protocol."""
    known = (*TASKS, LOSS)
    if not wanted.tasks:
        raise UserError(f"--tasks: none; known: {', '.join(known)}")
    for name in wanted.tasks:
        check_task(name, known, "--tasks")
        if name != LOSS and wanted.protocol not in TASKS[name].prepare:
            (other,) = TASKS[name].prepare
            raise UserError(
                f"--tasks={name} --protocol={wanted.protocol}: {name} has the protocol {other} only"
            )


def check_task(name: str, known: Sequence[str], flag: str) -> None:
    """Raise UserError for a task that there is not."""
    if name not in known:
        hint = nearest(name, known) or f"known: {', '.join(known)}"
        raise UserError(f"{flag}={name}: no such task; {hint}")


def evaluate(evaluation: Evaluation, compute_shards: Compute = here) -> list[Result]:
    """Compute what is not there yet, and write the results."""
    directory, settings = evaluation.directory, evaluation.settings
    reference, weights = evaluation.reference, weights_hash(evaluation.reference)
    exams = {task: exam_of(evaluation, task) for task in evaluation.read}
    shards = {
        task: shards_of(sitting_of(evaluation, task, weights), exam.passages)
        for task, exam in exams.items()
    }
    everything = [shard for of_task in shards.values() for shard in of_task]
    directory.mkdir(parents=True, exist_ok=True)
    with Lease(LocalStorage(directory)):
        left = everything
        if not settings.evaluated.overwrite:
            left = list(undone(directory, everything))
        if len(left) < len(everything):
            say(f"{len(everything) - len(left)} of {len(everything)} shards are there already")
        with tqdm(total=len(left), unit="shard", disable=not left) as bar:
            for shard, scores in compute_shards(left):
                shard.write(directory, scores)
                bar.set_postfix_str(shard.sitting.task)
                bar.update()
        found = [judge(evaluation, task, exams[task], of_task) for task, of_task in shards.items()]
        model = {"name": reference.name, "sha256": weights}
        if reference.checkpoint:
            model["step"] = str(reference.checkpoint.state.step)
        path = results.write(directory, model, found)
    results.show(found)
    say(f"results: {path}")
    return found


def exam_of(evaluation: Evaluation, task: str) -> PreparedTask:
    """Read a benchmark for a model."""
    wanted, reference = evaluation.settings.benchmarks, evaluation.reference
    reading = TaskOptions(
        tokenizer=reference.tokenizer(),
        block_size=reference.shape.block_size,
        stride=wanted.stride,
        stop_words=wanted.stop_word_filter,
        limit=wanted.limit,
    )
    place, _ = evaluation.read[task]
    if task == LOSS:
        return loss_exam(place, reading, wanted.loss_windows)
    return TASKS[task].exam(wanted.protocol, Path(place), reading)


def sitting_of(evaluation: Evaluation, task: str, weights: str) -> ScoringJob:
    """Return what a worker must know of a task."""
    wanted, work = evaluation.settings.benchmarks, evaluation.settings.work
    reference = evaluation.reference
    checkpoint = reference.checkpoint
    return ScoringJob(
        # The checkpoint, not the run: its best one may be another, soon.
        model=checkpoint.storage.display_name if checkpoint else reference.name,
        weights=weights,
        task=task,
        protocol=wanted.protocol,
        size=work.shard_size,
        batch_size=work.batch_size,
        device=evaluation.settings.device,
    )


def judge(evaluation: Evaluation, task: str, exam: PreparedTask, shards: Sequence[Shard]) -> Result:
    """Return the figures of a task whose shards are all there."""
    scores = list[Score]()
    for shard in shards:
        found = shard.read(evaluation.directory)
        assert found is not None, shard.path(evaluation.directory)
        scores += found
    settings = evaluation.settings
    digest = evaluation.read[task][1]
    published = None if task == LOSS else files.is_published(task, digest, exam.size)
    notes = {
        **exam.notes,
        **({} if published is None else {"published": published}),
        "context": evaluation.reference.shape.block_size,
        "limit": settings.benchmarks.limit,
        "dtype": settings.device.dtype,
        "file_sha256": digest,
        "yuzogpt": __version__,
    }
    return Result(task, exam.judge(scores), notes)
