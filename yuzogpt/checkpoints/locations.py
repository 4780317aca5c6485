"""Paths among the settings, made absolute by the driver: workers run in other directories.

Which settings are paths is declared with each of them (`path=` in config/section.py).
"""

from collections.abc import Collection
from typing import Any, TypeVar

from yuzogpt.checkpoints.pretrained import PUBLISHED
from yuzogpt.config import Section, with_changes
from yuzogpt.config.resolve import leaves
from yuzogpt.storage.paths import absolute, absolute_or_remote, directory_or_store, expanded

S = TypeVar("S", bound=Section)

# Where several paths are wrong, the first of these kinds is refused.
KINDS = ("store", "model", "local", "here", "remote")


def with_absolute_paths(settings: S, unused: Collection[str] = ()) -> S:
    """Return settings whose paths are absolute, or URIs; UserError for a path that cannot be.

    `unused`: `section.leaf` of settings that this command does not read as paths.
    """
    fields: dict[str, Any] = {
        dotted: field.json_schema_extra
        for dotted, field in leaves(type(settings))
        if dotted not in unused
    }
    changes: dict[str, str] = {}
    for dotted in sorted(fields, key=lambda name: (*KINDS, "").index(fields[name]["path"])):
        section, leaf = dotted.split(".")
        kind, values = fields[dotted]["path"], dict(getattr(settings, section))
        value = values[leaf] or fields[dotted]["if_empty"].format(**values)
        if kind and (value or fields[dotted]["is_required"]):
            changes[dotted] = locate(kind, value, storage_of(settings), leaf)
    return with_changes(settings, changes)


def storage_of(settings: Section) -> str:
    """Return the base of relative paths: the setting `storage`, unless it is a path of its own."""
    for dotted, field in leaves(type(settings)):
        section, leaf = dotted.split(".")
        extra: Any = field.json_schema_extra
        if leaf == "storage" and not extra["path"]:
            return str(getattr(settings, section).storage)
    return ""


def locate(kind: str, path: str, storage: str, key: str) -> str:
    """Return where a path of a kind (config/section.py) leads; `key`: the setting, for errors."""
    if kind == "here":
        return str(expanded(path, key).absolute())
    if kind == "local":
        return str(absolute(path, storage, key))
    if kind == "remote":
        return absolute_or_remote(path, storage, key)
    if kind == "model" and path in PUBLISHED:
        return path
    return directory_or_store(path, storage, key)
