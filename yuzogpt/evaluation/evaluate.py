"""`yuzogpt evaluate`: from settings to results.json and a table.

Each benchmark is cut into shards (shards.py); the caller passes in what computes them: this process
or Ray.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from yuzogpt import __version__
from yuzogpt.checkpoints.resolve import ModelReference, resolve_model
from yuzogpt.config import BenchmarkSettings, EvaluateSettings
from yuzogpt.console.terminal import note, say, say_while_waiting
from yuzogpt.errors import UserError
from yuzogpt.evaluation import results
from yuzogpt.evaluation.benchmarks import files, tasks
from yuzogpt.evaluation.benchmarks.corpus_loss import LOSS, prepare_loss
from yuzogpt.evaluation.benchmarks.readers import PreparedTask, TaskOptions
from yuzogpt.evaluation.benchmarks.tasks import TASKS
from yuzogpt.evaluation.passages import Score
from yuzogpt.evaluation.results import Result
from yuzogpt.evaluation.shards import (
    ScoringJob,
    Shard,
    missing_shards,
    score_shard,
    split_into_shards,
    weights_hash,
)
from yuzogpt.runs.requirements import check_writable
from yuzogpt.storage.lease import Lease
from yuzogpt.storage.run_storage import LocalStorage

# Scores shards, in any order, and yields each with its scores.
Compute = Callable[[Sequence[Shard]], Iterator[tuple[Shard, list[Score]]]]


def compute_here(shards: Sequence[Shard]) -> Iterator[tuple[Shard, list[Score]]]:
    return ((shard, score_shard(shard)) for shard in shards)


@dataclass(frozen=True)
class Evaluation:
    """What to evaluate; the model and all files are known to exist."""

    settings: EvaluateSettings
    reference: ModelReference
    directory: Path
    texts: dict[str, tuple[str, str]]  # by task: the path of its text, and the text's hash


def check(settings: EvaluateSettings, directory: Path, corpus: str) -> Evaluation:
    """Find the model and the files; UserError for what is missing."""
    check_tasks(settings.benchmarks)
    check_writable(directory, settings.evaluated.out_dir or directory.name)
    reference = resolve_model(settings.evaluated.model, settings.benchmarks.context)
    results.check_is_ours(directory)
    if not settings.evaluated.overwrite:
        results.check_same_model(directory, reference.name)
    reference.tokenizer()
    texts: dict[str, tuple[str, str]] = {}
    for name in dict.fromkeys(settings.benchmarks.tasks):
        if name == LOSS:
            from yuzogpt.data.remote import open_anywhere

            texts[name] = corpus, open_anywhere(corpus).fingerprint
        else:
            path, digest = files.find(name, settings.benchmarks.benchmark_dir)
            texts[name] = str(path), digest
    return Evaluation(settings, reference, directory, texts)


def check_tasks(settings: BenchmarkSettings) -> None:
    """Raise UserError for a task that lacks this protocol."""
    if not settings.tasks:
        raise UserError(f"--tasks: none; known: {', '.join((*TASKS, LOSS))}")
    for name in settings.tasks:
        if name != LOSS and settings.protocol not in TASKS[name].protocols:
            (other,) = TASKS[name].protocols
            raise UserError(
                f"--tasks={name} --protocol={settings.protocol}: {name} has only --protocol={other}"
            )


def evaluate(evaluation: Evaluation, compute_shards: Compute = compute_here) -> list[Result]:
    """Compute the shards that are missing, and write and print the results."""
    directory, settings = evaluation.directory, evaluation.settings
    reference = evaluation.reference
    say_while_waiting(f"loading model {reference.name} ...")
    weights = weights_hash(reference)
    prepared = {task: prepare_task(evaluation, task) for task in evaluation.texts}
    shards = {
        task: split_into_shards(scoring_job(evaluation, task, weights), of_task.passages)
        for task, of_task in prepared.items()
    }
    all_shards = [shard for of_task in shards.values() for shard in of_task]
    directory.mkdir(parents=True, exist_ok=True)
    with Lease(LocalStorage(directory)):
        missing = all_shards
        if not settings.evaluated.overwrite:
            missing = missing_shards(directory, all_shards)
        if len(missing) < len(all_shards):
            note(
                f"{len(all_shards) - len(missing)} of {len(all_shards)} shards are already computed"
            )
        on_terminal = sys.stderr.isatty()
        with tqdm(total=len(missing), unit="shard", disable=not (missing and on_terminal)) as bar:
            for number, (shard, scores) in enumerate(compute_shards(missing), start=1):
                shard.write(directory, scores)
                if not on_terminal:
                    note(f"shard {number}/{len(missing)}: {shard.job.task}")
                bar.set_postfix_str(shard.job.task)
                bar.update()
        computed = [
            task_result(evaluation, task, prepared[task], of_task)
            for task, of_task in shards.items()
        ]
        model = {"name": reference.name, "sha256": weights}
        if reference.checkpoint:
            model["step"] = str(reference.checkpoint.state.step)
        path = results.write(directory, model, computed)
    results.show(computed)
    say(f"results: {path}")
    return computed


def prepare_task(evaluation: Evaluation, task: str) -> PreparedTask:
    """Read a benchmark for the model."""
    settings, reference = evaluation.settings.benchmarks, evaluation.reference
    options = TaskOptions(
        tokenizer=reference.tokenizer(),
        block_size=reference.shape.block_size,
        stride=settings.stride,
        stop_words=settings.stop_word_filter,
        limit=settings.limit,
    )
    path, _ = evaluation.texts[task]
    if task == LOSS:
        return prepare_loss(path, options, settings.loss_windows)
    return tasks.prepare(task, settings.protocol, Path(path), options)


def scoring_job(evaluation: Evaluation, task: str, weights: str) -> ScoringJob:
    """Return what a worker must know of a task."""
    settings, checkpoint = evaluation.settings, evaluation.reference.checkpoint
    return ScoringJob(
        # The checkpoint, not the run: the run's best checkpoint may change meanwhile.
        model=checkpoint.storage.display_name if checkpoint else evaluation.reference.name,
        weights=weights,
        task=task,
        protocol=settings.benchmarks.protocol,
        shard_size=settings.workers.shard_size,
        batch_size=settings.workers.batch_size,
        device=settings.device,
    )


def task_result(
    evaluation: Evaluation, task: str, prepared: PreparedTask, shards: Sequence[Shard]
) -> Result:
    """Return the metrics of a task whose shards all have their scores."""
    scores = list[Score]()
    for shard in shards:
        stored = shard.read(evaluation.directory)
        assert stored is not None, shard.path(evaluation.directory)
        scores += stored
    settings, (_, digest) = evaluation.settings, evaluation.texts[task]
    published = None if task == LOSS else files.is_published(task, digest, prepared.size)
    notes = {
        **prepared.notes,
        **({} if published is None else {"published": published}),
        "context": evaluation.reference.shape.block_size,
        "limit": settings.benchmarks.limit,
        "dtype": settings.device.dtype,
        "file_sha256": digest,
        "yuzogpt": __version__,
    }
    return Result(task, prepared.compute_metrics(scores), notes)
