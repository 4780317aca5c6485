"""How settings get their values: defaults < YAML files, left to right < `--key=value`.

In: names of presets or YAML files, and flags. Out: one validated settings object, or a UserError
that suggests what would work. A dotted key is exact (`--model.n_layer=4`); a bare key is found by
its leaf name (`--n_layer=4`). YAML files follow the same rule, and a text means the same in both:
YAML decides the structure, the setting's type decides what the text means.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from yuzogpt.config import Section
from yuzogpt.config.registry import values_of
from yuzogpt.config.renamed import RENAMED_SECTIONS, current_name
from yuzogpt.console.terminal import complain
from yuzogpt.errors import UserError, nearest

PRESETS = Path(__file__).parent / "presets"
MERGE = "tag:yaml.org,2002:merge"
SEARCH = "search"  # a section of YAML files: what `yuzogpt tune` varies

S = TypeVar("S", bound=Section)


@dataclass(frozen=True)
class Override:
    """One value for a setting, and where the user wrote it."""

    key: str
    value: Any
    origin: str  # for messages
    file: str = ""  # none: it is a flag


def resolve(
    schema: type[S],
    files: Sequence[str],
    flags: Sequence["str | Override"],
    notify: Callable[[str], None] = complain,
) -> S:
    """Return the settings from the defaults, `files` and `flags`; later values win.

    Raises UserError for an unknown file or key, and for a value of the wrong type or range.
    `notify` is called with a line for each setting that is given by its old name.
    """
    sections = (*schema.model_fields, *RENAMED_SECTIONS)
    overrides = [item for name in files for item in read_yaml(name)]
    # An empty section sets nothing.
    overrides = [item for item in overrides if item.value != "" or item.key not in sections]
    overrides += [parse_flag(flag) if isinstance(flag, str) else flag for flag in flags]
    known = dict(leaves(schema))
    check_renamed(overrides, known, notify)
    nested: dict[str, dict[str, Any]] = {}
    last: dict[str, Override] = {}
    for override in overrides:
        dotted = find_key(override, known)
        # pydantic would accept true as 1.
        if isinstance(override.value, bool) and "bool" not in str(known[dotted].annotation):
            raise UserError(f"{override.origin}: needs a value: --{dotted.split('.')[1]}=VALUE")
        section, leaf = dotted.split(".")
        extra: Any = known[dotted].json_schema_extra
        value = override.value
        is_flag = override.origin.startswith("--")
        if extra["escapes"] and is_flag and not str(value).startswith("FILE:"):
            value = with_escapes(str(value))
        nested.setdefault(section, {})[leaf] = value
        last[dotted] = override
    try:
        settings = schema.model_validate(nested)
    except ValidationError as error:
        raise UserError(describe_invalid(error, last, known)) from None
    corpus, out_dir = last.get("data.dataset"), last.get("run.out_dir")
    if corpus and out_dir and is_of_other_corpus(out_dir, corpus.value):
        settings.run.model_fields_set.discard("out_dir")  # type: ignore[attr-defined]
    return settings


def with_escapes(text: str) -> str:
    r"""Return text in which `\n`, `\t` and `\\` stand for one character, as help shows them."""
    characters = {"n": "\n", "t": "\t", "\\": "\\"}
    return re.sub(r"\\([nt\\])", lambda found: characters[found[1]], text)


def is_of_other_corpus(out_dir: Override, corpus: str) -> bool:
    """Return whether an out_dir was given by a preset, for the preset's own corpus."""
    if out_dir.file not in preset_names():
        return False
    return bool(read_mapping(out_dir.file).get("data", {}).get("dataset") != corpus)


def leaves(schema: type[Section]) -> Iterator[tuple[str, FieldInfo]]:
    """Yield (`section.leaf`, field) for every setting of a verb."""
    for name, section in schema.model_fields.items():
        assert isinstance(section.annotation, type)
        assert issubclass(section.annotation, Section)
        for leaf, field in section.annotation.model_fields.items():
            yield f"{name}.{leaf}", field


def parse_flag(flag: str) -> Override:
    """Split `--key=value`; a flag without a value means true."""
    if not flag.startswith("--") or flag == "--":
        raise UserError(f"{flag}: not a flag; write --key=value")
    key, equals, value = flag[2:].partition("=")
    return Override(key, value if equals else True, flag)


def read_yaml(name: str) -> list[Override]:
    """Read the settings of a preset or a YAML file."""
    content = {key: value for key, value in read_mapping(name).items() if key != SEARCH}
    return list(flatten(content, name))


def read_mapping(name: str) -> Mapping[Any, Any]:
    """Read a preset by its name, or a YAML file by its path."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else PRESETS / f"{name}.yaml"
    if not path.is_file():
        presets = preset_names()
        hint = nearest(name, presets) or f"presets: {', '.join(presets)}; or a path to a .yaml file"
        raise UserError(f"{name}: no such preset or YAML file; {hint}")
    content = load_yaml(path.read_bytes(), str(path), TextLoader)
    if not isinstance(content, dict | None):
        raise UserError(f"{path}: expected `key: value` lines, found a {type(content).__name__}")
    return content or {}


class TextLoader(yaml.SafeLoader):
    """A safe loader that leaves scalars as text, so that they are read as flags are.

    YAML 1.1 would read 012 as 10, 1e-3 as text, and yes as true.
    """

    yaml_implicit_resolvers = {"<": [(MERGE, re.compile("^<<$"))]}  # noqa: RUF012


def load_yaml(content: bytes | str, origin: str, loader: type[yaml.SafeLoader]) -> Any:
    """Parse YAML; for invalid YAML raise a UserError that begins with `origin`."""
    try:
        text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
        return yaml.load(text, loader)
    except RecursionError:
        reason = "nested too deeply"
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        reason = " ".join(str(error).split())
    raise UserError(f"{origin}: not readable as YAML: {reason}")


def flatten(content: Mapping[Any, Any], file: str, prefix: str = "") -> Iterator[Override]:
    """Turn nested YAML mappings into dotted keys."""
    for key, value in content.items():
        dotted = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from flatten(value, file, f"{dotted}.")
        else:
            yield Override(dotted, value, f"{file}: {dotted}: {value}", file)


def preset_names() -> list[str]:
    """Return the names of the shipped presets."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def preset_summary(name: str) -> str:
    """Return the first line of a preset's comment."""
    return (PRESETS / f"{name}.yaml").read_text().splitlines()[0].strip("# .")


def find_key(override: Override, known: Mapping[str, FieldInfo]) -> str:
    """Return the `section.leaf` that a dotted or bare key means, also if it is an old name."""
    by_leaf = {dotted.split(".")[1]: dotted for dotted in known}
    for key in (override.key, current_name(override.key)):
        if key in known:
            return key
        if key in by_leaf:
            return by_leaf[key]
    names = [*by_leaf, *known] if "." in override.key else list(by_leaf)
    hint = nearest(override.key.replace("-", "_"), names) or "--help lists every setting"
    raise UserError(f"{override.origin}: unknown setting; {hint}")


def check_renamed(
    overrides: Sequence[Override],
    known: Mapping[str, FieldInfo],
    notify: Callable[[str], None] = complain,
) -> None:
    """Report settings that are given by an old name.

    Raises UserError if the same file (or the command line) gives the new name, too.
    """
    new: set[tuple[str, str]] = set()
    old: list[tuple[Override, str]] = []
    for override in overrides:
        dotted = find_key(override, known)
        if override.key in (dotted, dotted.split(".")[1]):
            new.add((override.file, dotted))
        else:
            old.append((override, dotted))
    for override, dotted in old:
        if (override.file, dotted) in new:
            raise UserError(
                f"{override.origin}: {override.key} is now {current_name(override.key)}, which is "
                "given, too; leave one out"
            )
    for file, key in dict.fromkeys((override.file, override.key) for override, _ in old):
        where, dashes = (f"{file}: ", "") if file else ("", "--")
        notify(f"yuzogpt: {where}{dashes}{key} is now {dashes}{current_name(key)}")


def describe_invalid(
    error: ValidationError, given: Mapping[str, Override], known: Mapping[str, FieldInfo]
) -> str:
    """Return the first of pydantic's errors in one line, with what the user wrote."""
    first = error.errors()[0]
    message = first["msg"].removeprefix("Value error, ")
    location = [str(part) for part in first["loc"]]
    if len(location) < 2:
        return f"{'.'.join(location)}: {message}"
    dotted = ".".join(location[:2])
    # A union has one error for each of its members ("auto" or a number).
    of_setting = [item for item in error.errors() if item["loc"][:2] == first["loc"][:2]]
    messages = (item["msg"].removeprefix("Value error, ") for item in of_setting)
    message = " or ".join(dict.fromkeys(messages))
    return f"{given[dotted].origin}: {message} (default: {known[dotted].default!r})"


def changed_frozen(before: Mapping[str, Any], new: Section) -> list[str]:
    """List the frozen settings that differ, as `key: old -> new`.

    `before` may come from an earlier version: a setting that it lacks has its default.
    """
    after = new.model_dump()
    differences = []
    for dotted, field in leaves(type(new)):
        section, leaf = dotted.split(".")
        extra = field.json_schema_extra
        if isinstance(extra, dict) and extra["frozen"]:
            was, now = before.get(section, {}).get(leaf, field.default), after[section][leaf]
            if was != now:
                differences.append(f"{dotted}: {was} -> {now}")
    return differences


def choices(field: FieldInfo) -> str:
    """Return the values that a setting accepts, and what they are, if it lists them."""
    values = values_of(field).items()
    listed = [f"{name}: {text}" if text else name for name, text in values if name]
    return f" ({' | '.join(listed)})" if listed else ""


def to_yaml(settings: Section, without: dict[str, set[str]] | None = None) -> str:
    """Return settings as YAML that `resolve` reads back, `without` some leaves."""
    return yaml.safe_dump(settings.model_dump(exclude=without), sort_keys=False, allow_unicode=True)
