"""What lies in a directory: corpora, runs and models, by their small files.

Needs neither torch nor Ray, and reads no file to its end that grows with a run.
"""

import time
from collections.abc import Iterator
from pathlib import Path

from yuzogpt.checkpoints.pretrained import CONFIG
from yuzogpt.console.quantities import in_bytes
from yuzogpt.data.blocks import MANIFEST, open_corpus
from yuzogpt.errors import UserError
from yuzogpt.runs.directory import METRICS, SETTINGS
from yuzogpt.runs.event_log import MAX_LINE_BYTES, Record, parse
from yuzogpt.runs.own_corpus import corpus_of
from yuzogpt.storage import lease
from yuzogpt.storage.untrusted import open_regular

FRESH_S = 60.0  # age of a heartbeat, clocks of machines being what they are
TAIL_BYTES = 2**18  # of metrics.jsonl: its last records, and an evaluation among them

Row = tuple[str, ...]


def corpora(directory: Path) -> Iterator[Row]:
    """Yield a corpus's directory, tokenizer, tokens of both splits, and size."""
    found = {*directory.glob(f"*/{MANIFEST}"), *directory.glob(f"data/*/{MANIFEST}")}
    for path in sorted(found):
        name = str(path.parent.relative_to(directory))
        try:
            manifest = open_corpus(path.parent).manifest
        except UserError:
            yield name, "damaged", "", "", ""
            continue
        tokenizer = f"{manifest.tokenizer['kind']}, {manifest.tokenizer['vocab_size']:,}"
        tokens = (f"{manifest.tokens(split):,}" for split in ("train", "val"))
        yield name, tokenizer, *tokens, in_bytes(sum(block.bytes for block in manifest.blocks))


def runs(directory: Path) -> Iterator[Row]:
    """Yield a run's directory, corpus, state, step, and val loss, or the estimate of it."""
    found = {path.parent for name in (METRICS, SETTINGS) for path in directory.glob(f"*/{name}")}
    for run in sorted(found):
        records = last_records(run / METRICS)
        steps = [record["step"] for record in records if record["kind"] != "failure"]
        yield (
            str(run.relative_to(directory)),
            corpus_of(str(run.absolute())),
            state_of(run, records),
            f"{steps[-1]:,}" if steps else "",
            val_loss(records),
        )


def models(directory: Path) -> Iterator[Row]:
    """Yield the Hugging Face folders, and the size of their weights."""
    for path in sorted(directory.glob(f"*/{CONFIG}")):
        files = path.parent.glob("*.safetensors")
        if weights := [file for file in files if file.is_file()]:  # not a link that leads nowhere
            size = sum(file.stat().st_size for file in weights)
            yield str(path.parent.relative_to(directory)), in_bytes(size)


def last_records(metrics: Path) -> list[Record]:
    """Return the last records of a run; none if there are none."""
    try:
        with open_regular(metrics) as file:
            file.seek(max(0, metrics.stat().st_size - TAIL_BYTES))
            lines = file.read(MAX_LINE_BYTES).decode(errors="replace").splitlines()
    except (OSError, UserError):
        return []
    return [record for record in map(parse, lines) if record]


def state_of(run: Path, records: list[Record]) -> str:
    """Return what a run is doing, or how it ended."""
    if is_held(run):
        return "running"
    if not (run / METRICS).exists():
        return "sweep" if (run / "trials").is_dir() else "not started"
    kinds = [r["kind"] for r in records if r["kind"] in ("train", "start", "stop", "final")]
    return {"final": "finished", "stop": "stopped"}.get(kinds[-1] if kinds else "", "not finished")


def is_held(run: Path) -> bool:
    """Return whether a process writes a run; one of another machine, if it did so lately."""
    try:
        with open_regular(run / lease.LEASE) as file:
            holder = lease.parse(file.read(MAX_LINE_BYTES))
        age = time.time() - (run / lease.LEASE).stat().st_mtime
    except (OSError, UserError):
        return False
    alive = lease.is_holder_alive(holder) if holder else False
    return age < FRESH_S if alive is None else alive


def val_loss(records: list[Record]) -> str:
    """Return the val loss over the whole split, or else the last estimate of it."""
    for record in reversed(records):
        if record["kind"] == "final" and record.get("val_loss") is not None:
            return f"{record['val_loss']:.4f}"
        if record["kind"] == "evaluation" and record.get("val_loss_estimate") is not None:
            return f"about {record['val_loss_estimate']:.4f}"
    return ""
