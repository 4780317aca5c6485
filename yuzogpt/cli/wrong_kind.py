"""A name of another kind than its verb takes: a corpus where a preset belongs, say.

Such a mistake gets one line that says what the name is, and which command takes it.
"""

from collections.abc import Iterator
from pathlib import Path

from yuzogpt.checkpoints.format import STATE
from yuzogpt.config.resolve import preset_names
from yuzogpt.data.blocks import MANIFEST
from yuzogpt.data.preparation.corpora import CORPORA
from yuzogpt.errors import UserError
from yuzogpt.runs.directory import METRICS, SETTINGS

WANTED = {"prepare": "text", "inspect": "corpus", "dataset": "name"}
WANTED |= dict.fromkeys(("train", "tune", "bench"), "preset")
WANTED |= dict.fromkeys(("report", "sample", "serve", "evaluate", "export"), "run")
KINDS = {
    "run": "a run",
    "corpus": "a corpus's directory",
    "name": "a corpus's name",
    "preset": "a preset",
    "text": "a text",
}


def check_kind(taker: str, word: str) -> None:
    """Raise UserError if a word names something, but nothing that a verb (or --dataset) takes."""
    wanted, uses = WANTED.get(taker, ""), dict(uses_of(word))
    is_corpus = taker in ("prepare", "dataset") and (word in CORPORA or "name" in uses)
    if wanted and uses and wanted not in uses and not is_corpus:
        kind, use = next(iter(uses.items()))
        raise UserError(f"{word}: {KINDS[kind]}, not {KINDS[wanted]}; {use}")


def uses_of(word: str) -> Iterator[tuple[str, str]]:
    """Yield what a word names, and what to do with that."""
    path, named = Path(word), Path("data", word)
    if (path / SETTINGS).is_file() or (path / METRICS).is_file():
        again = f", or its command resumes it: yuzogpt train {path / SETTINGS}"
        yield "run", f"see yuzogpt report {word}, yuzogpt sample {word}{again}"
    if (path / STATE).is_file():  # a checkpoint, which has a manifest, too
        yield "run", f"see yuzogpt sample {word}"
    elif (path / MANIFEST).is_file():
        yield "corpus", f"yuzogpt train PRESET --data_dir={word} trains on it"
    elif (named / MANIFEST).is_file():
        look = f"yuzogpt inspect {named} shows it"
        yield "name", f"{look}, yuzogpt train PRESET --dataset={word} trains on it"
    if word in preset_names():
        yield "preset", f"yuzogpt train {word} trains it"
    if path.is_file():
        yield "text", f"first make a corpus of it: yuzogpt prepare {word}"
