"""From a source to a prepared corpus: the steps, in the order in which they happen.

One text file is prepared in memory (in_memory.py), everything else unit by unit: in this process or
by Ray Data. The same command again resumes an interrupted preparation, and does nothing if the
corpus is finished.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from yuzogpt.config import CorpusSettings, DistributedPrepareSettings, PrepareSettings
from yuzogpt.console.terminal import note, say
from yuzogpt.data import blocks
from yuzogpt.data.blocks import PreparedCorpus
from yuzogpt.data.preparation import plan, readers
from yuzogpt.data.preparation.commit import commit
from yuzogpt.data.preparation.corpora import Corpus, find_corpus
from yuzogpt.data.preparation.finished import (
    check_same_files,
    check_same_settings,
    open_finished,
    write_lease,
)
from yuzogpt.data.preparation.in_memory import prepare_in_memory
from yuzogpt.data.preparation.own_text import is_one_text
from yuzogpt.data.preparation.plan import Plan
from yuzogpt.data.preparation.progress import Progress
from yuzogpt.data.preparation.shards import run_unit
from yuzogpt.data.preparation.sources import Unit
from yuzogpt.data.preparation.splits import SPLIT_RULES
from yuzogpt.errors import UserError
from yuzogpt.storage.filesystems import scheme_of
from yuzogpt.storage.lease import Lease
from yuzogpt.storage.paths import is_within
from yuzogpt.storage.run_storage import LocalStorage


class Workers(Protocol):
    """What runs the units."""

    def check(self) -> None:
        """Raise UserError if the workers could not start. Nothing is written before."""

    def start(self) -> None:
        """Start the workers; the time that this takes is no part of the speed that is shown."""

    def count(self, units: Sequence[Unit]) -> list[int]:
        """Count the documents of each unit."""

    def run(self, plan: Plan, units: Sequence[Unit]) -> None:
        """Run units; each has its record afterwards. UserError for a damaged source."""


class LocalWorkers:
    """Runs one unit after the other in this process, without Ray."""

    def check(self) -> None:
        """Do nothing: this process runs already."""

    def start(self) -> None:
        """Do nothing: this process runs already."""

    def count(self, units: Sequence[Unit]) -> list[int]:
        return [readers.count_documents(unit) for unit in units]

    def run(self, plan: Plan, units: Sequence[Unit]) -> None:
        for unit in units:
            run_unit(unit, plan.shard_config, plan.tokenizer)


def prepare(
    settings: PrepareSettings, directory: Path, workers: Workers
) -> tuple[PreparedCorpus, bool]:
    """Prepare a corpus in `directory`; return it, and whether anything had to be done.

    Raises UserError if the directory holds another corpus, unless `overwrite`.
    """
    if (directory / blocks.STAGING).is_symlink():  # its target would be written, and cleared
        raise UserError(f"{directory / blocks.STAGING}: a symlink; delete it")
    options = settings.corpus
    corpus = find_corpus(options.dataset, options.tokenizer, bool(options.source))
    if not is_by_units(corpus, options, settings.preparation):
        check_one_text_settings(settings.preparation, corpus)
        if options.source:
            check_is_text(options.source, corpus)
        if options.overwrite and options.source:
            check_not_nested(options.source, directory)
        return prepare_in_memory(options, corpus, directory)
    if not corpus.source:  # the user's own
        corpus = replace(corpus, split_rule="hash")
    return prepare_by_units(settings, corpus, directory, workers)


def is_by_units(corpus: Corpus, options: CorpusSettings, large: DistributedPrepareSettings) -> bool:
    """Return whether a corpus is prepared unit by unit: all but one text file."""
    if corpus.source:
        return True
    if corpus.download or corpus.tokenizer == "char":  # characters need the whole text
        return False
    has_documents = large.by_line or large.split_rule in SPLIT_RULES
    return has_documents or not is_one_text(options.source)


def check_one_text_settings(large: DistributedPrepareSettings, corpus: Corpus) -> None:
    """Raise UserError for an explicit setting that has no effect on a corpus of one text."""
    without_effect = {"split_rule": ("", "tail"), "by_line": (False,), "max_document_bytes": (0,)}
    for key in large.model_fields_set - {"num_workers"}:
        value = getattr(large, key)
        if value not in without_effect.get(key, ()):
            is_own = not corpus.download and corpus.tokenizer == "gpt2"
            hint = "; --by_line=True makes each line a document" if is_own else ""
            raise UserError(
                f"--{key}={value}: not for {corpus.name}, which is prepared as one text in this "
                f"process, with its last tenth held out{hint}"
            )


def check_is_text(source: str, corpus: Corpus) -> None:
    """Raise UserError if a corpus that is one text has another source."""
    if Path(source).is_dir():
        raise UserError(f"--source={source}: a directory, not a text file")
    if not is_one_text(source):
        why = "the char tokenizer" if corpus.tokenizer == "char" else corpus.name
        hint = "" if corpus.tokenizer == "char" else "; or give a corpus of your own another name"
        raise UserError(f"--source={source}: {why} needs one plain text file of this machine{hint}")


def prepare_by_units(
    settings: PrepareSettings, corpus: Corpus, directory: Path, workers: Workers
) -> tuple[PreparedCorpus, bool]:
    """Prepare a corpus unit by unit."""
    overwrite, source = settings.corpus.overwrite, settings.corpus.source or corpus.source
    finished = open_finished(corpus, directory, overwrite=overwrite)
    if finished:
        sweep(directory)
        check_same_settings(finished, plan.identity_settings(settings.preparation, corpus))
        if not settings.corpus.source:  # do not list the hub's files again
            return finished, False
    if overwrite:
        check_not_nested(source, directory)
    try:
        planned = plan.make_plan(settings.preparation, corpus, source, directory)
    except UserError as error:
        hint = "" if settings.corpus.source else "; or fetch it elsewhere and give --source=FOLDER"
        raise UserError(f"{error}{hint}") from None
    if finished:
        check_same_files(finished, planned.listing)
        return finished, False
    if overwrite and planned.listing.own:
        raise nested(source, directory)
    workers.check()
    note(plan.describe(planned, source, overwrite))
    with write_lease(directory, overwrite=overwrite):
        plan.begin(planned, overwrite, workers.start)
        planned = plan.with_counts(planned, workers.count)
        run_units(planned, workers)
        prepared = commit(planned)
    report(prepared, corpus)
    return prepared, True


def check_not_nested(source: str, directory: Path) -> None:
    """Raise UserError if a source lies in the directory that --overwrite clears, or around it."""
    if not scheme_of(source):
        path = Path(source.removeprefix("file://"))
        if is_within(path, directory) or (path.is_dir() and is_within(directory, path)):
            raise nested(source, directory)


def nested(source: str, directory: Path) -> UserError:
    """Return the error for a source that --overwrite could harm."""
    return UserError(
        f"--overwrite: the source {source} and the data_dir {directory} lie in each other; "
        "choose another --data_dir"
    )


def run_units(planned: Plan, workers: Workers) -> None:
    """Run the units that have no record yet: all, or what an interrupted command left."""
    units = planned.listing.units
    remaining = [unit for unit in units if not planned.record(unit)]
    if done := len(units) - len(remaining):
        note(f"resuming: {done} of {len(units)} units are done")
    if remaining:
        workers.start()
        with Progress(planned):
            workers.run(planned, remaining)
        by_node: Counter[str] = Counter()
        for record in filter(None, map(planned.record, remaining)):
            by_node[record.node] += record.documents
        for node, documents in sorted(by_node.items()):
            if node:
                note(f"node {node[:8]}: {documents:,} documents")


def sweep(directory: Path) -> None:
    """Delete the staging directory of a command that was killed after its commit."""
    if (directory / blocks.STAGING).exists():
        with Lease(LocalStorage(directory)):
            blocks.clear_staging(directory)


def report(prepared: PreparedCorpus, corpus: Corpus) -> None:
    """Print where every document went, and which counts differ from the corpus's known ones."""
    manifest = prepared.manifest
    documents = manifest.source["documents"]
    written = sum(block.documents for block in manifest.blocks)
    rejected = ", ".join(f"{count:,} {reason}" for reason, count in manifest.rejected.items())
    say(
        f"{documents:,} documents in = {written:,} written + "
        f"{sum(manifest.rejected.values()):,} rejected" + (f" ({rejected})" if rejected else "")
    )
    if not written:
        note("warning: no document was kept: look at --text_column and the source")
    elif not manifest.tokens("val"):
        is_hash = manifest.split_rule.startswith("hash")  # holds out one of two that differ
        why = "no two documents differ" if is_hash or written == 1 else "raise --val_fraction"
        note(f"the val split is empty: {why}; training needs one")
    for what, expected, count in (
        ("documents", corpus.documents, documents),
        ("val tokens", corpus.val_tokens, manifest.tokens("val")),
    ):
        if expected and expected != count:
            note(f"warning: {corpus.name} has {expected:,} {what}, this source {count:,}")
