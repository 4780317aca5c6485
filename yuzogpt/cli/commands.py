"""What each verb does with its settings: paths made absolute, then the work, wherever it runs.

In: settings, as cli.py resolved them. Out: what the verb is for. Nothing heavy is imported before
what can be checked is known to be right.
"""

import contextlib
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from yuzogpt.config import (
    BenchSettings,
    DoctorSettings,
    EvaluateSettings,
    ExportSettings,
    InspectSettings,
    PrepareSettings,
    ReportSettings,
    SampleSettings,
    SamplingSettings,
    Section,
    ServeSettings,
    TrainSettings,
    TuneSettings,
)
from yuzogpt.console.terminal import say
from yuzogpt.errors import RunFailed, UserError
from yuzogpt.storage.filesystems import scheme_of
from yuzogpt.storage.paths import absolute, absolute_or_remote, directory_or_store, expanded
from yuzogpt.storage.run_storage import SCHEMES

T = TypeVar("T", bound=TrainSettings)


def train(settings: Section) -> None:
    """Train, on Ray, in this process, or as one of torchrun's ranks."""
    assert isinstance(settings, TrainSettings)
    from yuzogpt import runs
    from yuzogpt.runtime import ranks

    settings = locate_train(settings)
    if ranks.of_torchrun():
        if settings.workers.num_workers != 0:
            raise UserError("under torchrun: torchrun ... -m yuzogpt.training PRESET --key=value")
        from yuzogpt.training.launch import run_as_rank

        run_as_rank(settings)
        return
    settings, resume = runs.check(settings)
    if runs.is_finished(settings, resume) and not settings.evaluation.eval_only:
        say(runs.finished_line(settings))
    elif settings.workers.num_workers == 0:
        from yuzogpt.training.launch import run_here

        run_here(settings)
    else:
        from yuzogpt.orchestration.train.trainer import run_on_ray

        run_on_ray(settings)


def locate_train(settings: T) -> T:
    """Make every path absolute; one in an object store stays a URI."""
    run, data = settings.run, settings.data
    changes = {
        "out_dir": directory_or_store(run.out_dir, run.storage, "out_dir"),
        "init_from": locate_start(settings),
    }
    folder = settings.evaluation.benchmark_dir
    benchmark_dir = folder and str(absolute(folder, run.storage, "benchmark_dir"))
    key_file = settings.log.wandb_key_file
    key_file = key_file and str(expanded(key_file, "wandb_key_file"))
    return settings.model_copy(
        update={
            "run": run.model_copy(update=changes),
            "data": data.model_copy(update={"data_dir": locate_data(settings)}),
            "log": settings.log.model_copy(update={"wandb_key_file": key_file}),
            "evaluation": settings.evaluation.model_copy(update={"benchmark_dir": benchmark_dir}),
        }
    )


def locate_data(settings: TrainSettings) -> str:
    """Return where the corpus is."""
    data = settings.data
    named = data.data_dir or f"data/{data.dataset}"
    return absolute_or_remote(named, settings.run.storage, "data_dir")


def locate_start(settings: TrainSettings) -> str:
    """Return where weights start: a name, or where the directory is."""
    from yuzogpt.checkpoints.resolve import locate_model

    start = settings.run.init_from
    if start in ("scratch", "resume"):
        return start
    return locate_model(start, settings.run.storage, "init_from")


def tune(settings: Section, files: Sequence[str], searched: Sequence[str]) -> None:
    """Search for the best settings: a sweep of trainings, on Ray Tune."""
    assert isinstance(settings, TuneSettings)
    from yuzogpt.tuning.space import read_space
    from yuzogpt.tuning.sweep import Sweep

    settings = locate_train(settings)
    sweep = Sweep(settings, read_space(settings, files, searched)).checked()

    from yuzogpt.tuning.search import is_over
    from yuzogpt.tuning.summary import show
    from yuzogpt.tuning.sweep import write_outcome

    with sweep.writing():
        if not sweep.replaces_another and is_over(sweep):
            say(f"{settings.run.out_dir}: finished; it goes on with a larger --num_samples")
            found = write_outcome(sweep)
        else:
            from yuzogpt.orchestration.tune.tuner import on_ray, search

            with on_ray(sweep.base):
                found = search(sweep)
        show(sweep, found)


def prepare(settings: Section) -> None:
    """Turn text into Arrow blocks, on Ray where the corpus is large."""
    assert isinstance(settings, PrepareSettings)
    from yuzogpt.data.preparation.prepare import LocalWorkers
    from yuzogpt.data.preparation.prepare import prepare as prepare_corpus
    from yuzogpt.data.preparation.records import source_of

    wanted = settings.corpus
    if wanted.source:
        source_path = absolute_or_remote(wanted.source, wanted.storage, "source")
        wanted = wanted.model_copy(update={"source": source_path})
        settings = settings.model_copy(update={"corpus": wanted})
    directory = absolute(wanted.data_dir or f"data/{wanted.dataset}", wanted.storage, "data_dir")
    if settings.large.num_workers == 0:
        corpus, is_new = prepare_corpus(settings, directory, LocalWorkers())
    else:
        from yuzogpt.orchestration.data.prepare import prepare_on_ray

        corpus, is_new = prepare_on_ray(settings, directory)
    manifest = corpus.manifest
    state = "prepared" if is_new else "already prepared"
    made_from = source_of(corpus)
    source = f"{made_from.name}, SHA-256 {made_from.sha256[:12]}"
    say(f"{state}: {manifest.corpus} from {source} in {directory}")
    say(
        f"vocabulary {manifest.tokenizer['vocab_size']:,}; train {manifest.tokens('train'):,} "
        f"tokens, val {manifest.tokens('val'):,} tokens"
    )


def inspect(settings: Section) -> None:
    """Print what a prepared corpus is; check it, or export it."""
    assert isinstance(settings, InspectSettings)
    from yuzogpt.data.inspect import export_bin, show, verify
    from yuzogpt.data.remote import open_anywhere

    wanted = settings.inspect
    corpus = open_anywhere(absolute_or_remote(wanted.data_dir, wanted.storage, "data_dir"))
    if wanted.verify:
        say(verify(corpus))
    if wanted.export_bin:
        say("exported: " + ", ".join(str(path) for path in export_bin(corpus)))
    if not (wanted.verify or wanted.export_bin) or "examples" in wanted.model_fields_set:
        show(corpus, wanted.examples)


def report(settings: Section) -> None:
    """Say what a run did: here, and in a page of its own."""
    assert isinstance(settings, ReportSettings)
    from yuzogpt import runs
    from yuzogpt.report.report import write

    wanted = settings.report
    run = directory_or_store(wanted.out_dir, wanted.storage, "out_dir")
    html = absolute(wanted.html, wanted.storage, "html") if wanted.html else None
    say(f"\npage: {write(runs.open_for_reading(run), html)}")


def bench(settings: Section) -> None:
    """Measure what a training step costs."""
    assert isinstance(settings, BenchSettings)
    settings = locate_bench(settings)

    from yuzogpt.bench.bench import bench as measure
    from yuzogpt.bench.bench import show

    show(measure(settings), settings.bench.output)


def locate_bench(settings: BenchSettings) -> BenchSettings:
    """Make the paths absolute that are used: its runs are in a directory that is deleted."""
    run, data, wanted = settings.run, settings.data, settings.bench
    trace, data_dir = wanted.trace, data.data_dir
    if trace:
        trace = str(absolute(trace, run.storage, "trace"))
    if not wanted.synthetic:
        data_dir = locate_data(settings)
    return settings.model_copy(
        update={
            "run": run.model_copy(update={"init_from": locate_start(settings)}),
            "data": data.model_copy(update={"data_dir": data_dir}),
            "bench": wanted.model_copy(update={"trace": trace}),
        }
    )


def sample(settings: Section) -> None:
    """Print samples, or answer line by line."""
    assert isinstance(settings, SampleSettings)
    from yuzogpt.inference.sample import converse
    from yuzogpt.inference.sample import sample as draw_samples

    wanted = locate_sampling(settings.sampling)
    settings = settings.model_copy(update={"sampling": wanted})
    if wanted.interactive:
        if isinstance(sys.stdin, io.TextIOWrapper):
            # The tokenizer refuses the line of a byte that is no text; the next one is answered.
            sys.stdin.reconfigure(errors="surrogateescape")
        with contextlib.suppress(KeyboardInterrupt):  # as good an end as that of the input
            converse(settings, sys.stdin, sys.stdout)
        return
    for text in draw_samples(settings):
        say(text)
        say("---------------")


def locate_sampling(wanted: SamplingSettings) -> SamplingSettings:
    """Make the paths absolute that are used."""
    from yuzogpt.checkpoints.resolve import locate_model

    storage, changes = wanted.storage, {}
    if wanted.init_from == "resume":
        changes["out_dir"] = directory_or_store(wanted.out_dir, storage, "out_dir")
    else:
        changes["init_from"] = locate_model(wanted.init_from, storage, "init_from")
    if wanted.prompts:
        changes["prompts"] = str(absolute(wanted.prompts, storage, "prompts"))
    elif wanted.start.startswith("FILE:"):
        file = absolute(wanted.start.removeprefix("FILE:"), storage, "start")
        changes["start"] = f"FILE:{file}"
    return wanted.model_copy(update=changes)


def evaluate(settings: Section) -> None:
    """Hold a model against benchmarks, on Ray or in this process."""
    assert isinstance(settings, EvaluateSettings)
    from yuzogpt.evaluation.evaluate import check, here
    from yuzogpt.evaluation.evaluate import evaluate as run_evaluation

    settings, directory, corpus = locate_evaluation(settings)
    evaluation = check(settings, directory, corpus)
    if settings.work.num_workers == 0:
        run_evaluation(evaluation, here)
    else:
        from yuzogpt.orchestration.evaluate import on_ray

        run_evaluation(evaluation, on_ray(settings))


def locate_evaluation(settings: EvaluateSettings) -> tuple[EvaluateSettings, Path, str]:
    """Make every path absolute; return where results go, too, and the corpus."""
    from yuzogpt.checkpoints.resolve import locate_model

    wanted, benchmarks = settings.evaluated, settings.benchmarks
    model = locate_model(wanted.model, wanted.storage, "model")
    out_dir = absolute(wanted.out_dir or f"eval-{Path(model).name}", wanted.storage, "out_dir")
    named = benchmarks.data_dir or f"data/{benchmarks.dataset}"
    reads_corpus = "loss" in benchmarks.tasks
    corpus = absolute_or_remote(named, wanted.storage, "data_dir") if reads_corpus else ""
    folder = benchmarks.benchmark_dir
    if folder:
        folder = str(absolute(folder, wanted.storage, "benchmark_dir"))
    located = settings.model_copy(
        update={
            "evaluated": wanted.model_copy(update={"model": model}),
            "benchmarks": benchmarks.model_copy(update={"benchmark_dir": folder}),
        }
    )
    return located, out_dir, corpus


def serve(settings: Section) -> None:
    """Answer HTTP requests, until it is interrupted."""
    assert isinstance(settings, ServeSettings)
    from yuzogpt.serving.launch import check, serve_here

    settings, keys = check(settings)
    if settings.replicas.num_replicas == 0:
        serve_here(settings, keys)
    else:
        from yuzogpt.orchestration.serve.deployment import serve_on_ray

        serve_on_ray(settings, keys)


def export(settings: Section) -> None:
    """Write a checkpoint as a Hugging Face folder."""
    assert isinstance(settings, ExportSettings)
    from yuzogpt.checkpoints.export import to_huggingface
    from yuzogpt.checkpoints.resolve import resolve_model
    from yuzogpt.runs.requirements import check_not_in_a_run, check_writable

    wanted = settings.export
    folder = absolute(wanted.hf_dir, wanted.storage, "hf_dir")
    if folder.exists() or folder.is_symlink():
        raise UserError(f"--hf_dir={folder}: exists already; choose another")
    check_writable(folder, wanted.hf_dir, "hf_dir")
    check_not_in_a_run(folder, f"--hf_dir={folder}")
    reference = resolve_model(directory_or_store(wanted.out_dir, wanted.storage, "out_dir"))
    to_huggingface(reference, folder)
    say(f"{reference.name} -> {folder}")


def doctor(settings: Section) -> None:
    """Examine a cluster; RunFailed if it is not sound."""
    assert isinstance(settings, DoctorSettings)
    from yuzogpt.doctor.display import show, to_json, verdict
    from yuzogpt.doctor.findings import judge
    from yuzogpt.orchestration.doctor.doctor import survey_cluster

    wanted = settings.doctor
    if wanted.storage:
        place = absolute_or_remote(wanted.storage, "", "storage").rstrip("/") or "/"
        if scheme_of(place) not in ("", *SCHEMES):
            raise UserError(f"--storage={place}: give a directory, s3://bucket or gs://bucket")
        wanted = wanted.model_copy(update={"storage": place})
    survey = survey_cluster(wanted)
    findings = judge(survey, wanted)
    if wanted.output == "json":
        say(to_json(survey, findings))
    else:
        show(survey, findings)
    if any(finding.level == "fault" for finding in findings):
        raise RunFailed(verdict(survey, findings))
