"""`yuzogpt.load`, `prepare`, `train` and `evaluate`: the verbs, with settings as keywords.

Every setting of a verb has the same name, default and checks as on the command line.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yuzogpt.api import verbs
from yuzogpt.api.keywords import File, read_settings, takes_settings
from yuzogpt.config import EvaluateSettings, LoadSettings, PrepareSettings, TrainSettings
from yuzogpt.config.resolve import preset_names
from yuzogpt.errors import UserError
from yuzogpt.runtime.cores import limit_spinning

YAML = (".yaml", ".yml")

limit_spinning()  # before torch is imported

if TYPE_CHECKING:
    from yuzogpt.api.language_model import LanguageModel
    from yuzogpt.runs.event_log import Record


@dataclass(frozen=True)
class Corpus:
    """A prepared corpus."""

    directory: Path
    vocab_size: int
    train_tokens: int
    val_tokens: int
    is_new: bool  # False: it was there already


@dataclass(frozen=True)
class Run:
    """A run, as `train` left it in out_dir."""

    out_dir: str

    @property
    def records(self) -> "list[Record]":
        """The records of metrics.jsonl, each with `kind`, `step` and `time` (Unix seconds).

        `kind="train"` has the loss of a step, `"evaluation"` val_loss_estimate, `"final"` val_loss.
        """
        from yuzogpt import runs
        from yuzogpt.runs.event_log import read_records

        metrics = runs.open_for_reading(str(self.out_dir)).local / runs.METRICS
        if not metrics.is_file():
            raise UserError(f"{self.out_dir}: no run here (no {runs.METRICS})")
        return read_records(metrics)

    @property
    def val_loss(self) -> float | None:
        """The validation loss over the whole split, after the last step."""
        finals = [record for record in self.records if record["kind"] == "final"]
        return finals[-1]["val_loss"] if finals else None

    def load(self, **settings: Any) -> "LanguageModel":
        """Load the best checkpoint; `settings` as for `yuzogpt.load`."""
        return load(self.out_dir, **settings)


@takes_settings(LoadSettings)
def load(model: File = "out", **settings: Any) -> "LanguageModel":
    """Load a model: a run (its best checkpoint), a checkpoint, a Hugging Face folder, or gpt2."""
    from yuzogpt.checkpoints.locations import with_absolute_paths
    from yuzogpt.checkpoints.resolve import resolve_model

    options = read_settings(LoadSettings, [], {"model": model, **settings})
    loaded = with_absolute_paths(options).loaded
    reference = resolve_model(loaded.model, loaded.context)
    from yuzogpt.api.language_model import LanguageModel  # imports torch

    return LanguageModel(reference, options.device)


@takes_settings(PrepareSettings)
def prepare(corpus: File | None = None, /, **settings: Any) -> Corpus:
    """Turn text into a corpus, as `yuzogpt prepare`: a corpus by its name, or a file of text."""
    from yuzogpt.data.preparation.own_text import is_source

    if corpus is not None:
        settings = {"source" if is_source(str(corpus)) else "dataset": corpus, **settings}
    options = read_settings(PrepareSettings, [], settings)
    prepared, is_new = verbs.prepare(options)
    manifest = prepared.manifest
    train_tokens, val_tokens = manifest.tokens("train"), manifest.tokens("val")
    vocab_size = manifest.tokenizer["vocab_size"]
    return Corpus(prepared.directory, vocab_size, train_tokens, val_tokens, is_new)


@takes_settings(TrainSettings)
def train(*files: File, **settings: Any) -> Run:
    """Train a model, or resume its run, as `yuzogpt train`; `files` are presets or YAML files.

    Raises Stopped if the run was asked to stop before its end; the same call resumes it.
    """
    options = verbs.with_run_paths(read_settings(TrainSettings, files, settings))
    verbs.train(options)
    return Run(options.run.out_dir)


@takes_settings(EvaluateSettings)
def evaluate(model: File | None = None, /, *files: File, **settings: Any) -> dict[str, Any]:
    """Score a model on benchmarks, as `yuzogpt evaluate`; `files` are presets or YAML files.

    Returns the entry of each task in results.json: its `figures`, and how they were computed.
    """
    if model is not None and (str(model) in preset_names() or Path(model).suffix in YAML):
        files = (model, *files)
    elif model is not None:
        settings = {"model": model, **settings}
    results = verbs.evaluate(read_settings(EvaluateSettings, files, settings))
    return {result.key: result.to_dict() for result in results}
