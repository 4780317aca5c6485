"""A text of the user's own: the name and the tokenizer of its corpus, unless they are given."""

import re
from pathlib import Path

from yuzogpt.config import PrepareSettings, with_changes
from yuzogpt.data.preparation import sources
from yuzogpt.data.preparation.corpora import CORPORA
from yuzogpt.storage.filesystems import is_pattern, scheme_of
from yuzogpt.storage.paths import absolute_or_remote

MAX_CHAR_BYTES = 20_000_000  # of a text whose tokens are characters by default


def is_source(word: str) -> bool:
    """Return whether a word is the path of a text, not the name of a corpus."""
    is_path = "/" in word or is_pattern(word) or Path(word).is_file()
    return is_path or bool(sources.format_of(word) or sources.compression_of(word))


def named_after_source(settings: PrepareSettings) -> PrepareSettings:
    """Return the settings with the corpus's name and tokenizer, as its source suggests them."""
    options = settings.corpus
    if not options.source:
        return settings
    name = options.dataset if "dataset" in options.model_fields_set else name_of(options.source)
    tokenizer = options.tokenizer
    if not tokenizer and name not in CORPORA:
        large = settings.preparation
        source = absolute_or_remote(options.source, options.storage, "source")
        is_whole = not large.by_line and large.split_rule in ("", "tail") and is_one_text(source)
        is_small = is_whole and Path(source).is_file()
        is_small = is_small and Path(source).stat().st_size <= MAX_CHAR_BYTES
        tokenizer = "char" if is_small else "gpt2"
    return with_changes(settings, {"corpus.dataset": name, "corpus.tokenizer": tokenizer})


def name_of(source: str) -> str:
    """Return the name of a file or folder, without its ending, as a corpus's name."""
    parts = [part for part in source.split("/") if part and not is_pattern(part)]
    stem = parts[-1] if parts else ""
    while Path(stem).suffix.lower() in (*sources.COMPRESSIONS, *sources.FORMATS):
        stem = Path(stem).stem
    name = re.sub(r"[^\w.-]+", "_", stem).strip("_.-")
    if not re.match("[A-Za-z0-9]", name):
        return f"text_{name}".rstrip("_")
    return f"{name}_text" if name in CORPORA else name


def is_one_text(source: str) -> bool:
    """Return whether a source is one plain text file of this machine, by its name."""
    is_glob = is_pattern(source) and not Path(source).exists()
    if scheme_of(source) or is_glob or Path(source).is_dir():
        return False
    return sources.format_of(source) in (None, "text") and not sources.compression_of(source)
