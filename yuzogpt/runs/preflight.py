"""Finds every mistake that can be found before a run starts.

In: settings, the corpus, and out_dir. Out: a `ResolvedRun`, or a UserError with the difference.
Needs no torch, so the answer comes at once.
"""

import os
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from yuzogpt import checkpoints, tokenization
from yuzogpt.checkpoints.format import Checkpoint
from yuzogpt.checkpoints.pretrained import (
    CONFIG,
    PUBLISHED,
    check_hub_reachable,
    download,
    weight_files,
)
from yuzogpt.checkpoints.resolve import resolve_model, shape_of
from yuzogpt.checkpoints.select import OnCorrupt
from yuzogpt.config import (
    ModelSettings,
    Part,
    RunSettings,
    TrainSettings,
    WorkerSettings,
    with_changes,
)
from yuzogpt.config.resolve import changed_frozen
from yuzogpt.config.schedule import (
    check_learning_rates,
    continuation_hint,
    first_changed_step,
    redecay_flag,
)
from yuzogpt.data.batches import check_split_length
from yuzogpt.data.blocks import PreparedCorpus
from yuzogpt.data.remote import open_anywhere
from yuzogpt.errors import UserError
from yuzogpt.runs import requirements
from yuzogpt.runs.directory import (
    CURVE,
    DELETING,
    ERRORS,
    EVALUATIONS,
    METRICS,
    PAUSE,
    REPORT,
    SETTINGS,
    SIGNATURE,
    STOP,
    WANDB_ID,
    download_run,
    gives_way,
    has_checkpoints,
    header,
    hold_run_dir,
    open_run,
)
from yuzogpt.runs.event_log import read_records
from yuzogpt.storage.run_storage import RunStorage


@dataclass(frozen=True)
class ResolvedRun:
    """A run without a mistake that could be found before it starts: what a launcher needs."""

    settings: TrainSettings  # with the shape that the corpus, the run or a pretrained model gives
    storage: RunStorage  # out_dir
    corpus: PreparedCorpus
    resume: Checkpoint | None  # which the run resumes from; None: a new run
    command: str  # as in `hold_run_dir`

    @property
    def is_finished(self) -> bool:
        """Whether an earlier command has finished this run."""
        if self.resume is None or self.resume.state.step < self.settings.schedule.max_iters:
            return False
        records = read_records((self.storage / METRICS).local)
        return any(r["kind"] == "final" and r["step"] == self.resume.state.step for r in records)

    @property
    def finished_line(self) -> str:
        """The line for a run that has nothing left to do."""
        ways = f"{continuation_hint(self.settings.schedule)}; --overwrite starts from scratch"
        return f"{self.settings.run.out_dir}: finished; {ways}"

    def hold(self) -> AbstractContextManager[RunStorage]:
        """Hold out_dir for this command alone."""
        return hold_run_dir(self.settings, self.command)


def check(settings: TrainSettings, command: str = "") -> ResolvedRun:
    """Find every mistake that can be found without starting: corpus, vocabulary, an earlier run.

    `command`: its id, if it may have begun its run already. Writes nothing, but for weights that it
    downloads from the hub. Needs no torch, so mistakes show within a second.
    """
    corpus = open_anywhere(settings.data.data_dir)
    corpus.verify()
    settings = check_vocabulary(settings, corpus)
    requirements.check_wandb(settings.log)
    if settings.evaluation.eval_tasks and settings.workers.num_workers == 0:
        raise UserError("--eval_tasks: needs Ray, beside the training; --num_workers=1 or more")
    run = open_run(settings.run)
    try:
        download_run(run)
    except OSError as error:
        name = settings.run.out_dir
        raise UserError(f"--out_dir={name}: not within reach: {error.strerror}") from None
    check_out_dir(settings.run, run)
    resume = None
    if not settings.run.overwrite or not gives_way(settings.run, run, command):
        resume = find_resume(settings, corpus, run, lambda *_: None, head_only=run.is_remote)
    requirements.check_world(settings.batch, settings.workers.span(auto=1)[1], resume)
    check_learning_rates(settings, resume.state.step if resume else None)
    settings = with_recorded_start(settings, resume) if resume else check_start(settings, corpus)
    parts: dict[str, Part] = {"train": "whole", "val": settings.evaluation.val_part}
    for split, part in parts.items():
        check_split_length(split, corpus.manifest.tokens(split), settings.model.block_size, part)
    if not settings.evaluation.eval_only:
        requirements.check_space(settings, run.local)
    if resume is None:
        check_weights(settings.run.init_from, settings.workers)
    return ResolvedRun(settings, run, corpus, resume, command)


def find_resume(
    settings: TrainSettings,
    corpus: PreparedCorpus,
    run: RunStorage,
    on_corrupt: OnCorrupt,
    *,
    head_only: bool = False,
) -> Checkpoint | None:
    """Return the checkpoint that a run resumes from; None for a new run. Changes nothing.

    There is none in a run that was being deleted. `head_only`: do not read tensors. UserError if
    settings that decide what the run computes were changed, if every checkpoint is corrupt, or if
    `--init_from=resume` finds nothing.
    """
    is_whole = DELETING not in header(run)
    existed = is_whole and has_checkpoints(run)
    checkpoint = checkpoints.newest(run, on_corrupt, head_only=head_only) if is_whole else None
    if checkpoint is None:
        name = settings.run.out_dir
        weights = [path.name for path in checkpoints.candidates(run.local)]
        if existed and weights and not checkpoints.resumable(run.local):
            raise UserError(
                f"{name}: only weights are left, {weights[-1]}; start from them with "
                f"--init_from={name} and another --out_dir"
            )
        if existed:
            raise UserError(
                f"{name}: no checkpoint is whole any more; --overwrite starts from scratch"
            )
        if settings.run.init_from == "resume":
            raise UserError(f"--init_from=resume: no checkpoint in {name}")
        return None
    check_frozen_settings(settings, corpus, checkpoint)
    return checkpoint


def with_recorded_start(settings: TrainSettings, checkpoint: Checkpoint) -> TrainSettings:
    """Return the settings with what only the first command of a run knew.

    That is where its weights started from, and the shape that a pretrained model gave it.
    """
    first = checkpoint.setting("run", "init_from", str)
    init_from = first if settings.run.init_from == "resume" else settings.run.init_from
    if first != "scratch":
        model = with_shape(settings.model, shape_of(checkpoint))
        settings = settings.model_copy(update={"model": model})
    return with_changes(settings, {"run.init_from": init_from})


def with_shape(model: ModelSettings, shape: ModelSettings) -> ModelSettings:
    """Return the settings with another model's shape; dropout and what the user set stay."""
    own = {name: getattr(model, name) for name in model.model_fields_set}
    return shape.model_copy(update={"dropout": model.dropout, **own})


def check_frozen_settings(
    settings: TrainSettings, corpus: PreparedCorpus, checkpoint: Checkpoint
) -> None:
    """Raise UserError with the difference if the run would not be the same run."""
    old = checkpoint.state.settings
    differences = changed_frozen(old, with_recorded_start(settings, checkpoint))
    if settings.evaluation.eval_only:  # which compares with nothing
        differences = [d for d in differences if not d.startswith("evaluation.val_part")]
    steps, peak = checkpoint.state.step, settings.optimizer.learning_rate
    changed = first_changed_step(old.get("schedule", {}), peak, settings.schedule, steps)
    if changed is None:  # later steps may have other learning rates
        differences = [d for d in differences if not d.startswith("schedule.")]
    elif any(d.startswith("schedule.") for d in differences) and (
        settings.schedule.max_iters > steps
    ):
        before = old["schedule"].get("redecay", "")
        again = redecay_flag(before, steps, settings.schedule.max_iters)
        differences.append(
            f"the learning rate of steps already made, from step {changed} on; to decay again, "
            f"{again}"
        )
    rows_before = checkpoint.setting("batch", "batch_size", int)
    rows_before *= checkpoint.setting("batch", "gradient_accumulation_steps", int)
    if rows_before != settings.batch.global_rows:
        differences.append(
            "batch_size x gradient_accumulation_steps: "
            f"{rows_before} -> {settings.batch.global_rows} rows"
        )
    if checkpoint.state.dataset != corpus.fingerprint:
        differences.append(f"the corpus in {corpus.directory}: its manifest has changed")
    if differences:
        raise UserError(
            f"{settings.run.out_dir}: holds a run with other settings ({'; '.join(differences)}); "
            "undo the change, choose another --out_dir, or start from scratch with --overwrite"
        )


def check_out_dir(options: RunSettings, run: RunStorage) -> None:
    """Raise UserError if the run would replace the user's files, or the weights it starts from."""
    name = options.out_dir
    if not run.is_remote and run.local.parent == run.local:
        raise UserError(f"--out_dir={name}: the root of this machine; choose a folder in it")
    requirements.check_writable(run.local, name)
    if not run.is_remote:
        requirements.check_not_in_a_run(run.local, f"--out_dir={name}")
        if any(run.local.glob("train-*.arrow")):
            raise UserError(f"--out_dir={name}: holds a corpus; choose another")
    if foreign := first_foreign(run):
        advice = "; if the run is yours, delete that file" if foreign == SETTINGS else ""
        raise UserError(f"--out_dir={name}: its {foreign} is not of a run; choose another{advice}")
    requirements.check_start_is_kept(options)


def first_foreign(run: RunStorage) -> str | None:
    """Return the first file of the user's in out_dir that has a name of a run's files.

    settings.yaml shows that files are a run's; if it was lost, a checkpoint of ours does.
    """
    folder = run.local / "checkpoints"
    if folder.exists() and not folder.is_dir():
        return folder.name
    if (run / SETTINGS).exists():
        return None if header(run)[:1] == [SIGNATURE] else SETTINGS
    names = [path.name for path in checkpoints.candidates(run.local)]
    if any(is_checkpoint(run / "checkpoints" / name) for name in names):
        return None
    files = (METRICS, EVALUATIONS, CURVE, REPORT, ERRORS, WANDB_ID, STOP, PAUSE)
    present = (name for name in files if (run / name).exists())
    return next((f"checkpoints/{name}" for name in names), None) or next(present, None)


def is_checkpoint(storage: RunStorage) -> bool:
    """Return whether a directory is a checkpoint of any version, by its manifest and state."""
    try:
        checkpoints.verify(storage, head_only=True)
    except checkpoints.CorruptCheckpoint:
        return False
    except UserError:
        return True
    return True


def check_vocabulary(settings: TrainSettings, corpus: PreparedCorpus) -> TrainSettings:
    """Return the settings with the corpus's vocabulary; UserError if they name another."""
    size = corpus.manifest.tokenizer["vocab_size"]
    if settings.model.vocab_size not in (0, size):
        raise UserError(
            f"--vocab_size={settings.model.vocab_size}: the corpus {corpus.manifest.corpus} has "
            f"{size} tokens; leave vocab_size out to take the corpus's"
        )
    return with_changes(settings, {"model.vocab_size": size})


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
    made_with = corpus.manifest.tokenizer["fingerprint"]
    if reference.has_tokenizer and tokenization.fingerprint(reference.tokenizer()) != made_with:
        raise UserError(
            f"{origin}: its tokenizer is not the one that made the corpus "
            f"{corpus.manifest.corpus}, though both have {shape.vocab_size} tokens"
        )
    fitted = with_shape(settings.model, shape)
    for name, value in fitted.model_dump(exclude={"dropout", "block_size"}).items():
        own = getattr(shape, name)
        if value != own:
            raise UserError(f"{origin}: its {name} is {own}, not {value}; leave {name} out")
    if shape.block_size < fitted.block_size and not shape.is_extensible:
        raise UserError(
            f"{origin}: it has positions for {shape.block_size} tokens; lower "
            f"--block_size={fitted.block_size}"
        )
    if frozen > shape.n_layer:
        raise UserError(f"--freeze_layers={frozen}: the model has {shape.n_layer} layers")
    return settings.model_copy(update={"model": fitted})


def check_weights(start: str, workers: WorkerSettings) -> None:
    """Raise UserError unless the weights to start from are here, or can be downloaded.

    Published ones are downloaded if this machine trains; a cluster's nodes do that themselves.
    """
    # Without a cluster, this machine trains: in this process, or on a Ray of this command's own.
    trains_here = workers.num_workers == 0 or not ray_address(workers)
    if start in PUBLISHED and trains_here:
        download(start)
    elif start in PUBLISHED:
        check_hub_reachable(start)
    elif Path(start, CONFIG).is_file():
        weight_files(Path(start))


def ray_address(workers: WorkerSettings) -> str:
    """Return the Ray cluster to join; empty: this command starts one."""
    return workers.ray_address or os.environ.get("RAY_ADDRESS", "")
