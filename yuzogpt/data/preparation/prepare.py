"""From a source to a prepared corpus: the steps, in the order in which they happen.

In: settings. Out: a directory of Arrow blocks with its manifest. One text file is prepared in
memory (in_memory.py); everything else unit by unit, by whichever workers are given: this process,
or Ray Data. The same command again goes on where an interrupted one stopped, and does nothing when
all is done.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from yuzogpt.config import CorpusSettings, DistributedPrepareSettings, PrepareSettings
from yuzogpt.console.terminal import say
from yuzogpt.data import blocks
from yuzogpt.data.blocks import PreparedCorpus, refuse_other
from yuzogpt.data.preparation import plan, readers, sources
from yuzogpt.data.preparation.commit import commit
from yuzogpt.data.preparation.corpora import Corpus, find_corpus
from yuzogpt.data.preparation.in_memory import prepare_in_memory
from yuzogpt.data.preparation.plan import Plan
from yuzogpt.data.preparation.progress import Progress
from yuzogpt.data.preparation.records import source_of
from yuzogpt.data.preparation.shards import do_unit
from yuzogpt.data.preparation.source_times import read_times, real_path
from yuzogpt.data.preparation.sources import Unit
from yuzogpt.errors import UserError
from yuzogpt.storage.filesystems import is_pattern, scheme_of
from yuzogpt.storage.lease import Lease
from yuzogpt.storage.paths import is_within
from yuzogpt.storage.run_storage import LocalStorage


class Workers(Protocol):
    """Who does the units."""

    def check(self) -> None:
        """Raise UserError if they could not start; nothing is written yet."""

    def start(self) -> None:
        """Be ready; what this takes is not part of the speed that is shown."""

    def count(self, units: Sequence[Unit]) -> list[int]:
        """Count the documents of each unit."""

    def run(self, plan: Plan, units: Sequence[Unit]) -> None:
        """Do units: each has its record afterwards. UserError for a damaged source."""


class LocalWorkers:
    """One unit after the other, without Ray."""

    def check(self) -> None:
        """It can."""

    def start(self) -> None:
        """It is ready."""

    def count(self, units: Sequence[Unit]) -> list[int]:
        """Count the documents of each unit."""
        return [readers.count_documents(unit) for unit in units]

    def run(self, plan: Plan, units: Sequence[Unit]) -> None:
        """Do units."""
        for unit in units:
            do_unit(unit, plan.recipe, plan.tokenizer)


def prepare(
    settings: PrepareSettings, directory: Path, workers: Workers
) -> tuple[PreparedCorpus, bool]:
    """Prepare a corpus in `directory`; return it, and whether anything had to be done.

    Raises UserError if the directory holds another corpus, unless `overwrite`.
    """
    if (directory / blocks.STAGING).is_symlink():  # it would be written, and cleared, elsewhere
        raise UserError(f"{directory / blocks.STAGING}: a symlink; delete it")
    chosen = settings.corpus
    corpus = find_corpus(chosen.dataset, chosen.tokenizer, bool(chosen.source))
    if not is_large(corpus, chosen, settings.large):
        check_ignored_settings(settings.large, corpus)
        if chosen.source:
            check_is_text(chosen.source, corpus)
        if chosen.overwrite and chosen.source:
            check_not_nested(chosen.source, directory)
        return prepare_in_memory(chosen, corpus, directory)
    if not corpus.source:  # the user's own
        corpus = replace(corpus, split_rule="hash")
    return prepare_large(settings, corpus, directory, workers)


def is_large(corpus: Corpus, chosen: CorpusSettings, large: DistributedPrepareSettings) -> bool:
    """Tell whether a corpus is prepared unit by unit: all but one text file."""
    if corpus.source:
        return True
    if corpus.download or corpus.tokenizer == "char":  # characters need the whole text
        return False
    wants_documents = large.by_line or large.split_rule in ("nanogpt", "hash")
    return wants_documents or not is_one_text(chosen.source)


def is_one_text(source: str) -> bool:
    """Return whether a source is one plain text file of this machine, by its name."""
    is_glob = is_pattern(source) and not Path(source).exists()
    if scheme_of(source) or is_glob or Path(source).is_dir():
        return False
    return sources.format_of(source) in (None, "text") and not sources.compression_of(source)


def check_ignored_settings(large: DistributedPrepareSettings, corpus: Corpus) -> None:
    """Raise UserError for an explicit setting that decides nothing for a corpus of one text."""
    as_it_is = {"split_rule": ("", "tail"), "by_line": (False,), "max_document_bytes": (0,)}
    for key in large.model_fields_set - {"num_workers"}:
        value = getattr(large, key)
        if value not in as_it_is.get(key, ()):
            is_own = not corpus.download and corpus.tokenizer == "gpt2"
            hint = "; --by_line=True makes each line a document" if is_own else ""
            raise UserError(
                f"--{key}={value}: not for {corpus.name}, which is prepared as one text, here, its "
                f"last tenth held out{hint}"
            )


def check_is_text(source: str, corpus: Corpus) -> None:
    """Raise UserError if a corpus that is one text has another source."""
    if Path(source).is_dir():
        raise UserError(f"--source={source}: a directory, not a text file")
    if not is_one_text(source):
        why = "the char tokenizer" if corpus.tokenizer == "char" else corpus.name
        hint = "" if corpus.tokenizer == "char" else "; or give a corpus of your own another name"
        raise UserError(f"--source={source}: {why} needs one plain text file of this machine{hint}")


def prepare_large(
    settings: PrepareSettings, corpus: Corpus, directory: Path, workers: Workers
) -> tuple[PreparedCorpus, bool]:
    """Prepare unit by unit."""
    overwrite, source = settings.corpus.overwrite, settings.corpus.source or corpus.source
    done = (directory / blocks.MANIFEST).exists() and not overwrite
    found = blocks.open_corpus(directory) if done else None
    if found:
        sweep(directory)
        refuse_other(found, "corpus", found.manifest.corpus, corpus.name)
        check_same_settings(found, plan.decisive(settings.large, corpus))
        if not settings.corpus.source:  # no need to look at the hub again
            return found, False
    if overwrite:
        check_not_nested(source, directory)
    try:
        wanted = plan.make_plan(settings.large, corpus, source, directory)
    except UserError as error:
        hint = "" if settings.corpus.source else "; or fetch it elsewhere and give --source=FOLDER"
        raise UserError(f"{error}{hint}") from None
    if found:
        check_same_source(found, wanted)
        return found, False
    if overwrite and wanted.listing.own:
        raise nested(source, directory)
    workers.check()
    say(plan.describe(wanted, source, overwrite))
    with Lease(LocalStorage(directory)):
        if (directory / blocks.MANIFEST).exists() and not overwrite:
            raise UserError(f"{directory}: another command prepared it just now; run this again")
        plan.begin(wanted, overwrite, workers.start)
        wanted = plan.with_counts(wanted, workers.count)
        do_units(wanted, workers)
        prepared = commit(wanted)
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


def do_units(wanted: Plan, workers: Workers) -> None:
    """Have the units done that an interrupted command left undone, or all."""
    listed = wanted.listing.units
    undone = [unit for unit in listed if not wanted.record(unit)]
    if done := len(listed) - len(undone):
        say(f"going on: {done} of {len(listed)} units are done")
    if undone:
        workers.start()
        with Progress(wanted):
            workers.run(wanted, undone)
        by_node: Counter[str] = Counter()
        for record in filter(None, map(wanted.record, undone)):
            by_node[record.node] += record.documents
        for node, documents in sorted(by_node.items()):
            if node:
                say(f"node {node[:8]}: {documents:,} documents")


def sweep(directory: Path) -> None:
    """Delete what a command left that was killed between its commit and its end."""
    if (directory / blocks.STAGING).exists():
        with Lease(LocalStorage(directory)):
            blocks.clear_staging(directory)


def check_same_source(found: PreparedCorpus, wanted: Plan) -> None:
    """Raise UserError if a finished corpus was made from other files, or they changed since."""
    recorded, name = source_of(found), wanted.listing.name
    if recorded.files is None:
        refuse_other(found, "source", "one text file", name)
    sizes = {file.name: file.bytes for file in recorded.files or []}
    then = read_times(found.directory)
    for file in wanted.listing.files:
        if sizes.pop(file.name, None) != file.bytes:
            refuse_other(found, "source", recorded.name, f"{name} with this {file.name}")
        modified = then.get(real_path(file), file.modified)
        if modified != file.modified:
            raise UserError(
                f"{file.path}: changed since {found.directory} was prepared from it; --overwrite "
                "prepares it again, --data_dir=DIR keeps both"
            )
    if sizes:
        refuse_other(found, "source", recorded.name, f"{name} without {min(sizes)}")


def check_same_settings(found: PreparedCorpus, wanted: dict[str, Any]) -> None:
    """Raise UserError if a finished corpus was made with settings that decide what it is."""
    made_with = source_of(found).settings
    if made_with is None:
        return  # one text: refused for its source
    for key, value in wanted.items():
        refuse_other(found, key, str(made_with.get(key)), str(value))


def report(prepared: PreparedCorpus, corpus: Corpus) -> None:
    """Say where every document went, and what differs from what is known of the corpus."""
    manifest = prepared.manifest
    documents = manifest.source["documents"]
    written = sum(block.documents for block in manifest.blocks)
    rejected = ", ".join(f"{count:,} {reason}" for reason, count in manifest.rejected.items())
    say(
        f"{documents:,} documents in = {written:,} written + "
        f"{sum(manifest.rejected.values()):,} rejected" + (f" ({rejected})" if rejected else "")
    )
    if not written:
        say("warning: no document was kept: look at --text_column and the source")
    elif not manifest.tokens("val"):
        is_hash = manifest.split_rule.startswith("hash")  # which holds out one of two that differ
        why = "no two documents differ" if is_hash or written == 1 else "raise --val_fraction"
        say(f"the val split is empty: {why}; training needs one")
    for what, expected, count in (
        ("documents", corpus.documents, documents),
        ("val tokens", corpus.val_tokens, manifest.tokens("val")),
    ):
        if expected and expected != count:
            say(f"warning: {corpus.name} has {expected:,} {what}, this source {count:,}")
