"""Where a run on a corpus of the user's own is written: out-<dataset>, unless an out_dir is given.

A preset's out_dir is for the preset's own corpus: config/resolve.py does not count it as given if
another corpus is named.
"""

import contextlib
from typing import TypeVar

import yaml

from yuzogpt.config import TrainSettings, TuneSettings, with_changes
from yuzogpt.config.resolve import load_yaml
from yuzogpt.errors import UserError
from yuzogpt.runs.directory import SETTINGS
from yuzogpt.storage.paths import directory_or_store
from yuzogpt.storage.run_storage import READER, open_storage

T = TypeVar("T", bound=TrainSettings)


def with_own_out_dir(settings: T) -> T:
    """Return the settings of a corpus that was named without an out_dir with one of its own.

    A run of that corpus which an earlier version wrote elsewhere is resumed there.
    """
    run, data = settings.run, settings.data
    if "out_dir" in run.model_fields_set or "dataset" not in data.model_fields_set:
        return settings
    own = f"out-{data.dataset}{'-tune' if isinstance(settings, TuneSettings) else ''}"
    earlier = directory_or_store(run.out_dir, run.storage, "out_dir")
    is_there = corpus_of(earlier) == data.dataset
    return with_changes(settings, {"run.out_dir": run.out_dir if is_there else own})


def corpus_of(out_dir: str) -> str:
    """Return the name of the corpus of the run in out_dir; empty if there is none."""
    with contextlib.suppress(OSError, UserError, KeyError, TypeError):
        content = (open_storage(out_dir, READER) / SETTINGS).read()
        return str(load_yaml(content, out_dir, yaml.SafeLoader)["data"]["dataset"])
    return ""
