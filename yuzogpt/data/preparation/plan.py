"""A plan: the source listed and split into units, how each is prepared, and which are done already.

Everything uncommitted lies in `.preparing/` inside the directory, from which the same command
resumes. Next on the line: shards.py.
"""

import contextlib
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from yuzogpt import tokenization
from yuzogpt.config import DistributedPrepareSettings
from yuzogpt.console.quantities import in_bytes
from yuzogpt.data import blocks
from yuzogpt.data.blocks import PLAN, STAGING
from yuzogpt.data.preparation import readers, records, sources
from yuzogpt.data.preparation.corpora import Corpus
from yuzogpt.data.preparation.shards import ShardConfig, UnitRecord
from yuzogpt.data.preparation.sources import Listing, Unit
from yuzogpt.data.preparation.splits import SPLIT_RULES, Split
from yuzogpt.errors import UserError
from yuzogpt.storage.atomic_files import to_json, write_durably
from yuzogpt.storage.untrusted import DamagedFile
from yuzogpt.tokenization.tokenizer import BytePairTokenizer, gpt2_tokenizer

SAMPLE_BYTES = 2**20  # of text, from which tokens per byte are estimated
USUAL_COMPRESSION = 3.5  # ratio of gzip and zstd on text; for the estimate of disk only

CountDocuments = Callable[[Sequence[Unit]], list[int]]


@dataclass(frozen=True)
class Plan:
    """What is prepared, how, and where."""

    corpus: str
    directory: Path
    listing: Listing
    shard_config: ShardConfig
    tokenizer: BytePairTokenizer
    identity: dict[str, Any]  # equal for two plans of the same preparation
    settings: dict[str, Any]  # the part of the identity that the manifest records

    @property
    def staging(self) -> Path:
        """Where everything lies that is not committed."""
        return self.directory / STAGING

    def record(self, unit: Unit) -> UnitRecord | None:
        """Return the record of a unit if it is done and all its files are there."""
        return records.read_record(self.staging, unit)


def make_plan(
    settings: DistributedPrepareSettings, corpus: Corpus, source: str, directory: Path
) -> Plan:
    """List the source and decide how it is prepared. Reads footers only, writes nothing."""
    listing = sources.list_source(source, settings.text_column, settings.by_line, directory)
    check_format_settings(settings, listing.units[0].format)
    if listing.units[0].format == "jsonl":
        readers.check_first_line(listing.units, settings.text_column)
    split_rule = settings.split_rule or corpus.split_rule
    if split_rule == "tail":
        rules = " or ".join(SPLIT_RULES)
        raise UserError(f"--split_rule=tail: only for one text file; give {rules}")
    tokenizer = gpt2_tokenizer()
    shard_config = ShardConfig(
        staging=str(directory / STAGING),
        text_column=settings.text_column,
        split=Split(split_rule, settings.val_fraction, listing.documents),
        max_document_bytes=settings.max_document_bytes,
        block_tokens=settings.block_tokens,
    )
    recorded = identity_settings(settings, corpus)
    identity = {
        "corpus": corpus.name,
        "source": [asdict(file) for file in listing.files],
        "tokenizer": tokenization.fingerprint(tokenizer),
        **recorded,
    }
    return Plan(corpus.name, directory, listing, shard_config, tokenizer, identity, recorded)


def check_format_settings(settings: DistributedPrepareSettings, kind: sources.Format) -> None:
    """Raise UserError for an explicit setting that has no effect on this format."""
    if kind in ("text", "lines") and "text_column" in settings.model_fields_set:
        column = settings.text_column
        raise UserError(f"--text_column={column}: the source is plain text, without columns")
    if kind in ("parquet", "jsonl") and settings.by_line:
        raise UserError(f"--by_line: for plain text; the source is {kind}, a document a row")


def identity_settings(settings: DistributedPrepareSettings, corpus: Corpus) -> dict[str, Any]:
    """Return the settings that decide the bytes of a corpus; its manifest records them."""
    return {
        "text_column": settings.text_column,
        "by_line": settings.by_line,
        "split_rule": settings.split_rule or corpus.split_rule,
        "val_fraction": settings.val_fraction,
        "max_document_bytes": settings.max_document_bytes,
        "block_tokens": settings.block_tokens,
        "unit_bytes": sources.UNIT_BYTES,
    }


def describe(plan: Plan, source: str, overwrite: bool) -> str:
    """Describe the source and the disk that it needs; UserError if the disk is too small."""
    listing, tokens, documents = plan.listing, *estimate(plan)
    width = 2 if plan.tokenizer.vocab_size <= 2**16 else 4
    needed = int(1.02 * tokens * width) + 4 * documents
    staged = sum(file.stat().st_size for file in plan.staging.glob("unit-*.arrow"))
    reclaimed = staged + cleared_bytes(plan.directory, overwrite)
    free = check_disk_space(plan.directory, needed - reclaimed)
    about = "" if listing.documents is not None else "about "
    skipped = ", ".join(listing.skipped[:3]) + (", ..." if len(listing.skipped) > 3 else "")
    others = f"; {len(listing.skipped)} other files are skipped ({skipped})" if skipped else ""
    return (
        f"{source}: {len(listing.files):,} files, {about}{documents:,} documents, "
        f"{in_bytes(listing.bytes)}; needs about {in_bytes(needed)} of disk, {in_bytes(free)} free"
        f"{others}"
    )


def cleared_bytes(directory: Path, overwrite: bool) -> int:
    """Return how many bytes of blocks `overwrite` will delete."""
    old_blocks = blocks.block_files(directory) if overwrite else ()
    return sum(path.lstat().st_size for path in old_blocks)


def check_disk_space(directory: Path, needed: int) -> int:
    """Return how many bytes are free where a directory is or will be; UserError if too few."""
    existing = next(path for path in (directory, *directory.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise UserError(
            f"{directory}: needs about {in_bytes(needed)} more, {in_bytes(free)} are free; choose "
            "another --data_dir"
        )
    return free


def estimate(plan: Plan) -> tuple[int, int]:
    """Estimate how many tokens and documents there are, from the first documents."""
    size = tokens = documents = 0
    for raw_bytes, document in readers.peek(plan.listing.units, plan.shard_config.text_column):
        text = document[:SAMPLE_BYTES].decode("utf-8", "replace")
        share_read = len(document[:SAMPLE_BYTES]) / max(1, len(document))
        with contextlib.suppress(UserError):  # not tokenizable: rejected later
            tokens += len(plan.tokenizer.encode(text)) + 1
        size += int(raw_bytes * share_read)
        documents += 1
        if size >= SAMPLE_BYTES:
            break
    total: float = sum(
        unit.bytes * (USUAL_COMPRESSION if sources.compression_of(unit.path) else 1)
        for unit in plan.listing.units
    )
    counted = plan.listing.documents
    share = total / max(1, size)
    return int(tokens * share), int(documents * share) if counted is None else counted


def begin(plan: Plan, overwrite: bool, start: Callable[[], None]) -> None:
    """Make the staging directory, or adopt that of an interrupted command; needs the lease.

    `start` is called before anything is cleared: if it fails, the old corpus stays. Raises
    UserError with the difference if an interrupted command prepared something else.
    """
    is_finished = (plan.directory / blocks.MANIFEST).exists()
    try:
        interrupted = records.read_identity(plan.staging)
    except DamagedFile as error:
        if not overwrite:
            raise UserError(f"{error}; start again with --overwrite") from None
        interrupted = None
    if overwrite and (is_finished or interrupted != plan.identity):
        start()
        blocks.clear(plan.directory)
        interrupted = None
    if interrupted:
        changed = [key for key, value in plan.identity.items() if interrupted.get(key) != value]
        if changed:
            raise UserError(
                f"{plan.directory}: an interrupted preparation with another {', '.join(changed)}; "
                "undo the change to resume it, or start over with --overwrite"
            )
        for folder in (plan.staging, plan.directory):
            for leftover in folder.glob(".*.tmp"):
                leftover.unlink(missing_ok=True)
        return
    blocks.clear_staging(plan.directory)  # left without a plan by a crash while it was cleared
    plan.staging.mkdir(parents=True, exist_ok=True)
    write_durably(plan.staging / blocks.TOKENIZER, tokenization.to_bytes(plan.tokenizer))
    write_durably(plan.staging / PLAN, to_json(plan.identity))


def with_counts(plan: Plan, count: CountDocuments) -> Plan:
    """Count the documents of files that do not record it, if the split rule needs the number."""
    listing, split = plan.listing, plan.shard_config.split
    if not split.is_shuffled or listing.documents is not None:
        return plan
    counts = records.read_counts(plan.staging, listing.units)
    if counts is None:
        counts = count(listing.units)
        write_durably(plan.staging / records.COUNTS, to_json(counts))
    counted = [replace(u, documents=n) for u, n in zip(listing.units, counts, strict=True)]
    listing = replace(listing, units=sources.assign_row_numbers(counted))
    split = replace(split, documents=listing.documents)
    return replace(plan, listing=listing, shard_config=replace(plan.shard_config, split=split))
