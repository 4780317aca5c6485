"""What each verb of the command line does with its settings, and prints.

Torch and Ray are imported only after everything that can be checked without them.
"""

import contextlib
import io
import sys
from collections.abc import Sequence
from pathlib import Path

from yuzogpt.api import verbs
from yuzogpt.config import (
    BenchSettings,
    DoctorSettings,
    EvaluateSettings,
    ExportSettings,
    InspectSettings,
    ListSettings,
    PrepareSettings,
    ReportSettings,
    SampleSettings,
    Section,
    ServeSettings,
    TrainSettings,
    TuneSettings,
    with_changes,
)
from yuzogpt.console.terminal import say
from yuzogpt.errors import RunFailed, UserError
from yuzogpt.storage.filesystems import scheme_of
from yuzogpt.storage.run_storage import SCHEMES


def train(settings: Section) -> None:
    """Train on Ray, in this process, or as one of torchrun's ranks."""
    assert isinstance(settings, TrainSettings)
    verbs.train(settings)


def tune(settings: Section, files: Sequence[str], searched: Sequence[str]) -> None:
    """Search for the best settings with a sweep of training runs on Ray Tune."""
    assert isinstance(settings, TuneSettings)
    from yuzogpt.tuning.space import read_space
    from yuzogpt.tuning.sweep import Sweep

    settings = verbs.with_run_paths(settings)
    sweep = Sweep(settings, read_space(settings, files, searched)).checked()

    from yuzogpt.tuning.search import is_done
    from yuzogpt.tuning.summary import show
    from yuzogpt.tuning.sweep import write_outcome

    with sweep.hold_directory():
        if not sweep.replaces_another and is_done(sweep):
            say(f"{settings.run.out_dir}: finished; a larger --num_samples continues it")
            outcome = write_outcome(sweep)
        else:
            from yuzogpt.orchestration.tune.tuner import on_ray, search

            with on_ray(sweep.base):
                outcome = search(sweep)
        show(sweep, outcome)


def prepare(settings: Section) -> None:
    """Turn text into Arrow blocks, on Ray if the corpus is large."""
    assert isinstance(settings, PrepareSettings)
    from yuzogpt.cli.next_steps import after_prepare
    from yuzogpt.data.preparation.own_text import named_after_source
    from yuzogpt.data.preparation.records import recorded_source

    settings = named_after_source(settings)
    corpus, is_new = verbs.prepare(settings)
    manifest = corpus.manifest
    state = "prepared" if is_new else "already prepared"
    made_from = recorded_source(corpus)
    source = f"{made_from.name}, SHA-256 {made_from.sha256[:12]}"
    say(f"{state}: {manifest.corpus} from {source} in {corpus.directory}")
    say(
        f"vocabulary {manifest.tokenizer['vocab_size']:,}; train {manifest.tokens('train'):,} "
        f"tokens, val {manifest.tokens('val'):,} tokens"
    )
    say(after_prepare(settings, manifest))


def inspect(settings: Section) -> None:
    """Print what is in a prepared corpus, check it, or export it."""
    assert isinstance(settings, InspectSettings)
    from yuzogpt.checkpoints.locations import with_absolute_paths
    from yuzogpt.data.inspect import export_bin, show, verify
    from yuzogpt.data.remote import open_anywhere

    options = with_absolute_paths(settings).inspect
    corpus = open_anywhere(options.data_dir)
    if options.verify:
        say(verify(corpus))
    if options.export_bin:
        say("exported: " + ", ".join(str(path) for path in export_bin(corpus)))
    if not (options.verify or options.export_bin) or "examples" in options.model_fields_set:
        show(corpus, options.examples)


def report(settings: Section) -> None:
    """Summarize a run in the terminal and in an HTML page."""
    assert isinstance(settings, ReportSettings)
    from yuzogpt import runs
    from yuzogpt.checkpoints.locations import with_absolute_paths
    from yuzogpt.report import compare, report

    options = with_absolute_paths(settings).report
    html = Path(options.html) if options.html else None
    run = runs.open_for_reading(options.out_dir)
    if not options.against:
        say(f"\npage: {report.write(run, html, options.num_samples)}")
        return
    other = runs.open_for_reading(options.against)
    html = html or Path.cwd() / f"report-{run.name}-{other.name}.html"
    say(f"\npage: {compare.write([run, other], html)}")


def bench(settings: Section) -> None:
    """Measure how long a training step takes."""
    assert isinstance(settings, BenchSettings)
    from yuzogpt.bench.bench import bench as measure
    from yuzogpt.bench.bench import show

    # The measured runs write to a temporary directory.
    unused = ["run.out_dir", "evaluation.benchmark_dir", "log.wandb_key_file"]
    unused += ["data.data_dir"] if settings.bench.synthetic else []
    settings = verbs.with_run_paths(settings, unused)
    show(measure(settings), settings.bench.output)


def sample(settings: Section) -> None:
    """Print samples, or answer prompts from standard input line by line."""
    assert isinstance(settings, SampleSettings)
    if settings.sampling.interactive:
        from yuzogpt.inference.sample import converse

        settings = verbs.with_sampling_paths(settings)
        if isinstance(sys.stdin, io.TextIOWrapper):
            # The tokenizer refuses a line with bytes that are no text; later lines still work.
            sys.stdin.reconfigure(errors="surrogateescape")
        with contextlib.suppress(KeyboardInterrupt):  # ends the session as end of input does
            converse(settings, sys.stdin, sys.stdout)
        return
    for text in verbs.sample(settings):
        say(text)
        say("---------------")


def evaluate(settings: Section) -> None:
    """Score a model on benchmarks, on Ray or in this process."""
    assert isinstance(settings, EvaluateSettings)
    verbs.evaluate(settings)


def serve(settings: Section) -> None:
    """Answer HTTP requests until interrupted."""
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
    from yuzogpt.checkpoints.locations import with_absolute_paths
    from yuzogpt.checkpoints.resolve import resolve_model
    from yuzogpt.runs.requirements import check_not_in_a_run, check_writable

    paths = with_absolute_paths(settings).export
    folder = Path(paths.hf_dir)
    if folder.exists() or folder.is_symlink():
        raise UserError(f"--hf_dir={folder}: exists already; choose another")
    check_writable(folder, settings.export.hf_dir, "hf_dir")
    check_not_in_a_run(folder, f"--hf_dir={folder}")
    reference = resolve_model(paths.out_dir)
    to_huggingface(reference, folder)
    say(f"{reference.name} -> {folder}")


def doctor(settings: Section) -> None:
    """Check a cluster; RunFailed if it has a fault."""
    assert isinstance(settings, DoctorSettings)
    from yuzogpt.checkpoints.locations import with_absolute_paths
    from yuzogpt.doctor.display import show, to_json, verdict
    from yuzogpt.doctor.findings import diagnose
    from yuzogpt.orchestration.doctor.doctor import survey_cluster

    settings = with_absolute_paths(settings)
    if storage := settings.doctor.storage:
        storage = storage.rstrip("/") or "/"
        if scheme_of(storage) not in ("", *SCHEMES):
            raise UserError(f"--storage={storage}: give a directory, s3://bucket or gs://bucket")
        settings = with_changes(settings, {"doctor.storage": storage})
    survey = survey_cluster(settings.doctor)
    findings = diagnose(survey, settings.doctor)
    if settings.doctor.output == "json":
        say(to_json(survey, findings))
    else:
        show(survey, findings)
    if any(finding.level == "fault" for finding in findings):
        raise RunFailed(verdict(survey, findings))


def list_all(settings: Section) -> None:
    """Print the presets, and the corpora, runs and models in a directory."""
    assert isinstance(settings, ListSettings)
    from yuzogpt.checkpoints.locations import with_absolute_paths
    from yuzogpt.config.resolve import preset_names, preset_summary
    from yuzogpt.console import terminal
    from yuzogpt.runs import listing

    directory = Path(with_absolute_paths(settings).list.directory)
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory")
    presets = [(name, preset_summary(name)) for name in preset_names()]
    tables = [
        ("Presets", ("preset", "what it is"), presets),
        ("Corpora", ("corpus", "tokenizer", "train", "val", "size"), listing.corpora(directory)),
        ("Runs", ("run", "corpus", "state", "step", "val loss"), listing.runs(directory)),
        ("Models", ("folder", "size"), listing.models(directory)),
    ]
    for title, columns, found in tables:
        if rows := list(found):
            numeric = {"train", "val", "size", "step", "val loss"}
            prose = {"what it is"}
            shown = terminal.table(columns, rows, numeric=numeric, prose=prose, title=title)
            terminal.console(width=100).print(shown)
            say()
