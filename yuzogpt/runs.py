"""One run is one out_dir: what the same command finds there, and whether it may go on.

In: settings, the corpus, and the directory. Out: nothing yet (a new run), the checkpoint to resume
from, or a UserError with the difference. Needs no torch, so the answer comes at once.
"""

import contextlib
import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from yuzogpt import checkpoints, mirrors, stored_checkpoints, tokenizers
from yuzogpt.checkpoints import Checkpoint
from yuzogpt.config import ModelSettings, Part, TrainSettings
from yuzogpt.config.schedule import decaying_again, first_change, refuse_rates, way_on
from yuzogpt.data.batches import refuse_short
from yuzogpt.data.blocks import PreparedCorpus
from yuzogpt.data.remote import open_anywhere
from yuzogpt.errors import RunFailed, UserError
from yuzogpt.files import refuse_public
from yuzogpt.filesystems import scheme_of
from yuzogpt.lease import Lease, holder_of
from yuzogpt.metrics import append_record, read_records
from yuzogpt.model.hub import CONFIG, PUBLISHED, download, refuse_out_of_reach, weight_files
from yuzogpt.overrides import changed_frozen, to_yaml
from yuzogpt.quantities import in_bytes
from yuzogpt.references import GPT2_VOCABULARY, resolve_model, shape_of

METRICS = "metrics.jsonl"
EVALUATIONS = "evaluations.jsonl"  # of `--eval_tasks`; the same kind of records
CURVE = "loss.png"
REPORT = "report.html"
SETTINGS = "settings.yaml"
ERRORS = "errors.log"
SIGNATURE = "# Written by `yuzogpt train`: the settings of this run.\n"
WANDB_ID = "wandb-id.txt"
STOP = "stop"  # a file that asks the run to stop; may hold the reason
FAILED = ".failed"  # a line: why workers of this command are not to be started again
PAUSE = ".pause"  # the same, of the launcher, which will start the workers again


def check(settings: TrainSettings) -> tuple[TrainSettings, Checkpoint | None]:
    """Find every mistake that can be found without starting: corpus, vocabulary, an earlier run.

    Returns the settings with the shape that the corpus, the run or a pretrained model gives them,
    and the checkpoint that the run would go on from. Reads only, but for weights that come from the
    hub. Needs no torch, so mistakes show within a second.
    """
    corpus = open_anywhere(settings.data.data_dir)
    corpus.verify()
    settings = check_vocabulary(settings, corpus)
    check_wandb(settings)
    if settings.evaluation.eval_tasks and settings.workers.num_workers == 0:
        raise UserError("--eval_tasks: Ray does it beside the training; --num_workers=1 or more")
    run = directory_of(settings)
    try:
        pull(run)
    except OSError as error:
        name = settings.run.out_dir
        raise UserError(f"--out_dir={name}: not within reach: {error.strerror}") from None
    check_out_dir(settings, run)
    resume = None
    if not settings.run.overwrite:
        resume = find_resume(settings, corpus, run, lambda *_: None, head_only=is_stored(settings))
    check_world(settings, settings.workers.span(auto=1)[1], resume)
    refuse_rates(settings, resume.state.step if resume else None)
    settings = as_started(settings, resume) if resume else check_start(settings, corpus)
    parts: dict[str, Part] = {"train": "whole", "val": settings.evaluation.val_part}
    for split, part in parts.items():
        refuse_short(split, corpus.manifest.tokens(split), settings.model.block_size, part)
    if not settings.evaluation.eval_only:
        check_space(settings, run)
    if resume is None:
        check_weights(settings)
    return settings, resume


def directory_of(settings: TrainSettings) -> Path:
    """Return where the process that the user started finds out_dir."""
    return mirrors.directory_of(settings.run.out_dir, mirrors.DRIVER)


def directory_of_reader(out_dir: str) -> Path:
    """Return where a process that only reads finds a run: what was asked for, and what it says."""
    directory = mirrors.directory_of(out_dir, mirrors.READER)
    try:
        for name in (METRICS, EVALUATIONS, SETTINGS):
            mirrors.pull(directory / name, if_changed=True)
    except OSError as error:
        raise UserError(f"{out_dir}: not within reach: {error.strerror}") from None
    return directory


def is_stored(settings: TrainSettings) -> bool:
    """Tell whether out_dir is in an object store."""
    return bool(scheme_of(settings.run.out_dir))


def pull(run: Path) -> None:
    """Bring what a mirror needs of its run: all but tensors."""
    for name in (SETTINGS, METRICS, WANDB_ID):
        mirrors.pull(run / name, if_changed=True)
    stored_checkpoints.pull_heads(run)


def is_finished(settings: TrainSettings, resume: Checkpoint | None) -> bool:
    """Tell whether an earlier command already did all of this."""
    if resume is None or resume.state.step < settings.schedule.max_iters:
        return False
    records = read_records(directory_of(settings) / METRICS)
    return any(r["kind"] == "final" and r["step"] == resume.state.step for r in records)


def finished_line(settings: TrainSettings) -> str:
    """Say that there is nothing left to do."""
    ways = f"{way_on(settings.schedule)}; --overwrite starts from scratch"
    return f"{settings.run.out_dir}: finished; {ways}"


def find_resume(
    settings: TrainSettings,
    corpus: PreparedCorpus,
    run: Path,
    on_corrupt: Callable[[Path, str], None],
    *,
    head_only: bool = False,
) -> Checkpoint | None:
    """Return the checkpoint that a run goes on from; None for a new run. Changes nothing.

    `run`: where this process finds out_dir; `head_only`: not to look at tensors. Raises UserError
    if settings that decide what the run computes were changed, if every checkpoint is corrupt, or
    if `--init_from=resume` finds nothing.
    """
    existed = bool(checkpoints.candidates(run)) or stored_checkpoints.has_broken(run)
    checkpoint = checkpoints.newest(run, on_corrupt, head_only=head_only)
    if checkpoint is None:
        name = settings.run.out_dir
        weights = [path.name for path in checkpoints.candidates(run)]
        if weights and not checkpoints.resumable(run):
            raise UserError(
                f"{name}: only weights are left, {weights[-1]}; start from them with "
                f"--init_from={name} and another --out_dir"
            )
        if existed:
            raise UserError(f"{name}: no checkpoint is whole any more; --overwrite starts anew")
        if settings.run.init_from == "resume":
            raise UserError(f"--init_from=resume: no checkpoint in {name}")
        return None
    refuse_changes(settings, corpus, checkpoint)
    return checkpoint


def as_started(settings: TrainSettings, checkpoint: Checkpoint) -> TrainSettings:
    """Return the settings with what only the first command of a run knew: where weights started.

    And the shape that a pretrained model gave it.
    """
    first = checkpoint.state.settings["run"]["init_from"]
    wanted = first if settings.run.init_from == "resume" else settings.run.init_from
    run = settings.run.model_copy(update={"init_from": wanted})
    if first != "scratch":
        settings = shaped_like(settings, shape_of(checkpoint))
    return settings.model_copy(update={"run": run})


def shaped_like(settings: TrainSettings, shape: ModelSettings) -> TrainSettings:
    """Return the settings with another model's shape, but for dropout and what the user set."""
    own = {name: getattr(settings.model, name) for name in settings.model.model_fields_set}
    model = shape.model_copy(update={"dropout": settings.model.dropout, **own})
    return settings.model_copy(update={"model": model})


def refuse_changes(settings: TrainSettings, corpus: PreparedCorpus, checkpoint: Checkpoint) -> None:
    """Raise UserError with the difference if the run would not be the same run."""
    old = checkpoint.state.settings
    differences = changed_frozen(old, as_started(settings, checkpoint))
    if settings.evaluation.eval_only:  # which compares with nothing
        differences = [one for one in differences if not one.startswith("evaluation.val_part")]
    steps, peak = checkpoint.state.step, settings.optimizer.learning_rate
    changed = first_change(old.get("schedule", {}), peak, settings.schedule, steps)
    if changed is None:  # what comes may have other learning rates
        differences = [one for one in differences if not one.startswith("schedule.")]
    elif any(one.startswith("schedule.") for one in differences):
        before = old["schedule"].get("redecay", "")
        again = decaying_again(before, steps, settings.schedule.max_iters)
        differences.append(
            f"the learning rate of steps already made, from step {changed} on; to decay again, "
            f"{again}"
        )
    rows_before = old["batch"]["batch_size"] * old["batch"]["gradient_accumulation_steps"]
    if rows_before != settings.batch.global_rows:
        differences.append(
            "batch_size x gradient_accumulation_steps: "
            f"{rows_before} -> {settings.batch.global_rows} rows"
        )
    if checkpoint.state.dataset != corpus.fingerprint:
        differences.append(f"the corpus in {corpus.directory}: its manifest is another")
    if differences:
        raise UserError(
            f"{settings.run.out_dir}: holds a run with other settings ({'; '.join(differences)}); "
            "undo the change, choose another --out_dir, or start anew with --overwrite"
        )


def check_world(settings: TrainSettings, workers: int, resume: Checkpoint | None) -> None:
    """Raise UserError if a global batch will be too small to give each worker a row.

    A batch that grows is never smaller again than that of the step a run goes on from.
    """
    least = settings.batch.least_rows
    if resume:
        least = int(resume.state.batch.get("rows", settings.batch.rows_at(resume.state.step)))
    if least < workers:
        flag = "batch_size" if least == settings.batch.global_rows else "start_rows"
        raise UserError(
            f"a global batch of {least} rows is too small for {workers} workers; raise --{flag}"
        )
    grows = settings.batch.batch_schedule == "noise" and least < settings.batch.global_rows
    if grows and least < 2 * workers:  # one gradient alone shows no noise
        raise UserError(
            f"batch_schedule=noise: {workers} workers need {2 * workers} rows to measure it; raise "
            f"--start_rows={least}"
        )


def check_writable(directory: Path, name: str) -> None:
    """Raise UserError if nothing can be written into a directory, which need not exist."""
    there = next(path for path in (directory, *directory.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        why = "not writable" if there.is_dir() else "not a directory"
        raise UserError(f"--out_dir={name}: {there} is {why}; choose another")


def check_out_dir(settings: TrainSettings, run: Path) -> None:
    """Raise UserError if the run would replace the user's files, or what it is to start from."""
    name = settings.run.out_dir
    check_writable(run, name)
    found = run / SETTINGS
    if found.exists() and not found.read_bytes().startswith(SIGNATURE.encode()):
        raise UserError(f"--out_dir={name}: its {SETTINGS} is not of a run; choose another")
    refuse_to_delete_the_start(settings)


def refuse_to_delete_the_start(settings: TrainSettings) -> None:
    """Raise UserError if `--overwrite` would delete what `--init_from` names."""
    name, start = settings.run.out_dir, settings.run.init_from
    inside = [Path(start), *Path(start).parents]
    if settings.run.overwrite and (start == "resume" or Path(name) in inside):
        raise UserError(
            f"--overwrite would delete what --init_from={start} starts from; choose another "
            "--out_dir"
        )


def check_space(settings: TrainSettings, run: Path) -> None:
    """Raise UserError if the checkpoints that are kept will not fit on the disk.

    One is weights and two moments, and whole before an older one goes; of the best, weights are
    kept. In a mirror of an object store there is one at a time.
    """
    there = next(path for path in (run, *run.parents) if path.exists())
    kept, weights = settings.checkpoint, 4 * settings.model.count_weights()
    often = settings.evaluation.eval_interval
    written = 1 + settings.schedule.max_iters // min(often, kept.checkpoint_interval or often)
    at_once = 3 * min(written, kept.keep_last + 1) + (written > kept.keep_last) * kept.keep_best
    free = shutil.disk_usage(there).free
    if is_stored(settings):
        at_once = 3
    else:
        free += sum(map(stored_checkpoints.size_of, checkpoints.candidates(run)))
    if at_once * weights > free:
        raise UserError(
            f"--out_dir={settings.run.out_dir}: its checkpoints take "
            f"{in_bytes(at_once * weights)}, of {in_bytes(3 * weights)} each, {in_bytes(free)} are "
            f"free in {there}; choose a larger disk, or a smaller --keep_last"
        )


def check_wandb(settings: TrainSettings) -> None:
    """Raise UserError if W&B is asked for and cannot work."""
    key_file = settings.log.wandb_key_file
    if not settings.log.wandb_log:
        return
    if importlib.util.find_spec("wandb") is None:
        raise UserError("--wandb_log: wandb is not installed; pip install 'yuzogpt[wandb]'")
    if key_file:
        refuse_public(Path(key_file), "wandb_key_file")


def check_vocabulary(settings: TrainSettings, corpus: PreparedCorpus) -> TrainSettings:
    """Return the settings with the corpus's vocabulary; UserError if they name another."""
    size = corpus.manifest.tokenizer["vocab_size"]
    if settings.model.vocab_size not in (0, size):
        raise UserError(
            f"--vocab_size={settings.model.vocab_size}: the corpus {corpus.manifest.corpus} has "
            f"{size} tokens; leave vocab_size out to take the corpus's"
        )
    model = settings.model.model_copy(update={"vocab_size": size})
    return settings.model_copy(update={"model": model})


def check_start(settings: TrainSettings, corpus: PreparedCorpus) -> TrainSettings:
    """Return the settings with the shape of the model that `init_from` names, if it names one.

    UserError if there is none, or one that does not fit.
    """
    frozen = settings.finetuning.freeze_layers
    if settings.run.init_from == "scratch":
        if frozen:
            raise UserError(
                f"--freeze_layers={frozen}: new weights must learn; leave it out, or say with "
                "--init_from where pretrained ones are"
            )
        return settings
    reference = resolve_model(settings.run.init_from)
    origin, shape = f"--init_from={reference.name}", reference.shape
    if shape.vocab_size != settings.model.vocab_size:
        raise UserError(
            f"{origin}: its vocabulary has {shape.vocab_size} tokens, the corpus "
            f"{corpus.manifest.corpus} {settings.model.vocab_size}; prepare the corpus with the "
            "model's tokenizer"
        )
    is_known = reference.checkpoint or shape.vocab_size == GPT2_VOCABULARY
    made_with = corpus.manifest.tokenizer["fingerprint"]
    if is_known and tokenizers.fingerprint(reference.tokenizer()) != made_with:
        raise UserError(
            f"{origin}: its tokenizer is not the one that made the corpus "
            f"{corpus.manifest.corpus}, though both have {shape.vocab_size} tokens"
        )
    fitted = shaped_like(settings, shape)
    for name, wanted in fitted.model.model_dump(exclude={"dropout", "block_size"}).items():
        found = getattr(shape, name)
        if wanted != found:
            raise UserError(f"{origin}: its {name} is {found}, not {wanted}; leave {name} out")
    if shape.block_size < fitted.model.block_size and not shape.is_extensible:
        raise UserError(
            f"{origin}: it has positions for {shape.block_size} tokens; lower "
            f"--block_size={fitted.model.block_size}"
        )
    if frozen > shape.n_layer:
        raise UserError(f"--freeze_layers={frozen}: the model has {shape.n_layer} layers")
    return fitted


def check_weights(settings: TrainSettings) -> None:
    """Raise UserError unless the weights to start from are here, or can be had.

    The published ones are fetched where this machine trains; a cluster's nodes do that themselves.
    """
    start = settings.run.init_from
    if start in PUBLISHED and is_here(settings):
        download(start)
    elif start in PUBLISHED:
        refuse_out_of_reach(start)
    elif Path(start, CONFIG).is_file():
        weight_files(Path(start))


def is_here(settings: TrainSettings) -> bool:
    """Tell whether this machine trains: in this process, or on a Ray of this command's own."""
    return settings.workers.num_workers == 0 or not ray_address(settings)


def ray_address(settings: TrainSettings) -> str:
    """Return the Ray cluster to join; empty: this command starts one."""
    return settings.workers.ray_address or os.environ.get("RAY_ADDRESS", "")


@contextlib.contextmanager
def writing(settings: TrainSettings) -> Iterator[Path]:
    """Hold out_dir for this command alone; with `--overwrite`, empty it first."""
    run = directory_of(settings)
    with Lease(run) as lease:
        if settings.run.overwrite:
            clear(run)
        stored_checkpoints.sweep(run)
        for name in (STOP, PAUSE, FAILED):
            mirrors.delete(run / name)
        # What is only to be evaluated keeps its settings: they say how it was trained.
        if not settings.evaluation.eval_only or not mirrors.exists(run / SETTINGS):
            write_settings(settings, run)
        try:
            yield run
        except RunFailed as error:
            with contextlib.suppress(OSError):
                if holder_of(run) == lease.holder["id"]:  # not into another's records
                    append_record(run / METRICS, "failure", str(error), reason="gave up")
            raise
        finally:
            with contextlib.suppress(OSError):
                mirrors.delete(run / STOP)
                mirrors.delete(run / FAILED)


def write_settings(settings: TrainSettings, run: Path) -> None:
    """Write settings.yaml, which the same command can be given again."""
    # To train from this file again must not delete the run.
    content = SIGNATURE + to_yaml(without_overwriting(settings))
    mirrors.write(run / SETTINGS, content.encode())


def without_overwriting(settings: TrainSettings) -> TrainSettings:
    """Return the settings of a command that goes on with what it finds."""
    run = settings.run.model_copy(update={"overwrite": False})
    return settings.model_copy(update={"run": run})


def clear(run: Path) -> None:
    """Delete what earlier runs wrote in out_dir (`--overwrite`), and nothing else."""
    stored_checkpoints.clear(run)
    for name in (METRICS, EVALUATIONS, CURVE, REPORT, SETTINGS, ERRORS, WANDB_ID):
        mirrors.delete(run / name)
