"""What each verb does with its settings: make paths absolute, check, then run it where it belongs.

Torch and Ray are imported only after everything that can be checked without them.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from yuzogpt.checkpoints.locations import with_absolute_paths
from yuzogpt.config import (
    EvaluateSettings,
    PrepareSettings,
    SampleSettings,
    TrainSettings,
    with_changes,
)
from yuzogpt.console.terminal import say
from yuzogpt.errors import UserError
from yuzogpt.storage.paths import absolute

if TYPE_CHECKING:
    from yuzogpt.data.blocks import PreparedCorpus
    from yuzogpt.evaluation.results import Result

T = TypeVar("T", bound=TrainSettings)


def prepare(settings: PrepareSettings) -> "tuple[PreparedCorpus, bool]":
    """Turn text into Arrow blocks; return the corpus, and whether anything had to be done."""
    from yuzogpt.data.preparation.own_text import named_after_source
    from yuzogpt.data.preparation.prepare import LocalWorkers
    from yuzogpt.data.preparation.prepare import prepare as prepare_corpus

    settings = with_absolute_paths(named_after_source(settings))
    directory = Path(settings.corpus.data_dir)
    if settings.preparation.num_workers == 0:
        return prepare_corpus(settings, directory, LocalWorkers())
    from yuzogpt.orchestration.data.prepare import prepare_on_ray

    return prepare_on_ray(settings, directory)


def train(settings: TrainSettings) -> None:
    """Train on Ray, in this process, or as one of torchrun's ranks."""
    from yuzogpt import runs
    from yuzogpt.runtime import ranks

    settings = with_run_paths(settings)
    if ranks.of_torchrun():
        if settings.workers.num_workers != 0:
            raise UserError("under torchrun: torchrun ... -m yuzogpt.training PRESET --key=value")
        from yuzogpt.training.launch import run_as_rank

        run_as_rank(settings)
        return
    run = runs.check(settings)
    if run.is_finished and not settings.evaluation.eval_only:
        say(run.finished_line)
    elif settings.workers.num_workers == 0:
        from yuzogpt.training.launch import run_here

        run_here(run)
    else:
        from yuzogpt.orchestration.train.trainer import run_on_ray

        run_on_ray(run)


def with_run_paths(settings: T, unused: Sequence[str] = ()) -> T:
    """Make the paths of a training run absolute, except for `unused` settings."""
    from yuzogpt.runs.own_corpus import with_own_out_dir

    if "run.out_dir" not in unused:
        settings = with_own_out_dir(settings)
    is_path = settings.run.init_from not in ("scratch", "resume")
    return with_absolute_paths(settings, unused if is_path else (*unused, "run.init_from"))


def sample(settings: SampleSettings) -> Iterator[str]:
    """Yield prompt and continuation of each sample."""
    from yuzogpt.inference.sample import sample as draw_samples

    return draw_samples(with_sampling_paths(settings))


def with_sampling_paths(settings: SampleSettings) -> SampleSettings:
    """Make the paths absolute that sampling reads."""
    source = settings.sampling
    is_run = source.init_from == "resume"
    unused = "sampling.init_from" if is_run else "sampling.out_dir"
    settings = with_absolute_paths(settings, [unused])
    if source.prompts or not source.start.startswith("FILE:"):
        return settings
    file = absolute(source.start.removeprefix("FILE:"), source.storage, "start")
    return with_changes(settings, {"sampling.start": f"FILE:{file}"})


def evaluate(settings: EvaluateSettings) -> "list[Result]":
    """Score a model on benchmarks, on Ray or in this process."""
    from yuzogpt.evaluation.evaluate import check, compute_here
    from yuzogpt.evaluation.evaluate import evaluate as run_evaluation

    reads_corpus = "loss" in settings.benchmarks.tasks
    settings = with_absolute_paths(settings, () if reads_corpus else ["benchmarks.data_dir"])
    out_dir = settings.evaluated.out_dir
    if not out_dir:
        name = f"eval-{Path(settings.evaluated.model).name}"
        out_dir = str(absolute(name, settings.evaluated.storage, "out_dir"))
    evaluation = check(settings, Path(out_dir), settings.benchmarks.data_dir)
    if settings.workers.num_workers == 0:
        return run_evaluation(evaluation, compute_here)
    from yuzogpt.orchestration.evaluate import on_ray

    return run_evaluation(evaluation, on_ray(settings))
