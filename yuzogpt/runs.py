"""One run is one out_dir: what the same command finds there, and whether it may go on.

In: settings, the corpus, and the directory. Out: nothing yet (a new run), the checkpoint to resume
from, or a UserError with the difference. Needs no torch, so the answer comes at once.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

from yuzogpt import checkpoints
from yuzogpt.checkpoints import Checkpoint
from yuzogpt.config import TrainSettings
from yuzogpt.data.batches import refuse_short
from yuzogpt.data.blocks import PreparedCorpus, open_corpus
from yuzogpt.errors import UserError
from yuzogpt.metrics import read_records
from yuzogpt.overrides import changed_frozen
from yuzogpt.references import resolve_model

METRICS = "metrics.jsonl"
CURVE = "loss.png"
SETTINGS = "settings.yaml"


def check(settings: TrainSettings) -> tuple[TrainSettings, Checkpoint | None]:
    """Find every mistake that can be found without starting: corpus, vocabulary, an earlier run.

    Returns the settings with the corpus's vocabulary, and the checkpoint that the run would go on
    from. Reads only. Needs no torch, so mistakes show within a second.
    """
    corpus = open_corpus(Path(settings.data.data_dir))
    corpus.verify()
    settings = check_vocabulary(settings, corpus)
    check_start(settings)
    for split in ("train", "val"):
        refuse_short(split, corpus.manifest.tokens(split), settings.model.block_size)
    if settings.run.overwrite:
        return settings, None
    return settings, find_resume(settings, corpus, lambda *_: None)


def is_finished(settings: TrainSettings, resume: Checkpoint | None) -> bool:
    """Tell whether an earlier command already did all of this."""
    if resume is None or resume.state.step < settings.schedule.max_iters:
        return False
    records = read_records(Path(settings.run.out_dir) / METRICS)
    return any(r["kind"] == "final" and r["step"] == resume.state.step for r in records)


def find_resume(
    settings: TrainSettings, corpus: PreparedCorpus, on_corrupt: Callable[[Path, str], None]
) -> Checkpoint | None:
    """Return the checkpoint that a run goes on from; None for a new run. Changes nothing.

    Raises UserError if settings that decide what the run computes were changed, if every
    checkpoint is corrupt, or if `--init_from=resume` finds nothing.
    """
    run = Path(settings.run.out_dir)
    checkpoint = checkpoints.newest(run, on_corrupt)
    if checkpoint is None:
        if checkpoints.candidates(run):
            raise UserError(f"{run}: no checkpoint is whole any more; --overwrite starts anew")
        if settings.run.init_from == "resume":
            raise UserError(f"--init_from=resume: no checkpoint in {run}")
        return None
    refuse_changes(settings, corpus, checkpoint)
    return checkpoint


def refuse_changes(settings: TrainSettings, corpus: PreparedCorpus, checkpoint: Checkpoint) -> None:
    """Raise UserError with the difference if the run would not be the same run."""
    old = TrainSettings.model_validate(checkpoint.state.settings)
    new = settings
    if new.run.init_from == "resume":
        run = new.run.model_copy(update={"init_from": old.run.init_from})
        new = new.model_copy(update={"run": run})
    if old.run.init_from != "scratch":  # the shape was that of the pretrained model
        model = old.model.model_copy(update={"dropout": new.model.dropout})
        new = new.model_copy(update={"model": model})
    differences = changed_frozen(old, new)
    if old.batch.global_rows != new.batch.global_rows:
        differences.append(
            "batch_size x gradient_accumulation_steps: "
            f"{old.batch.global_rows} -> {new.batch.global_rows} rows"
        )
    if checkpoint.state.dataset != corpus.manifest.fingerprint:
        differences.append(f"the corpus in {corpus.directory}: its manifest is another")
    if differences:
        raise UserError(
            f"{settings.run.out_dir}: holds a run with other settings ({'; '.join(differences)}); "
            "undo the change, choose another --out_dir, or start anew with --overwrite"
        )


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


def check_start(settings: TrainSettings) -> None:
    """Raise UserError if `init_from` names nothing, or a model with another vocabulary."""
    if settings.run.init_from in ("scratch", "resume"):
        return
    reference = resolve_model(settings.run.init_from)
    if reference.vocab_size != settings.model.vocab_size:
        raise UserError(
            f"--init_from={reference.name}: its vocabulary has {reference.vocab_size} tokens, the "
            f"corpus {settings.data.dataset} {settings.model.vocab_size}; prepare the corpus with "
            "the model's tokenizer"
        )


def clear(run: Path) -> None:
    """Delete what earlier runs wrote in out_dir (`--overwrite`), and nothing else."""
    for checkpoint in checkpoints.candidates(run):
        checkpoints.remove(checkpoint)
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    for name in (METRICS, CURVE, SETTINGS):
        (run / name).unlink(missing_ok=True)
