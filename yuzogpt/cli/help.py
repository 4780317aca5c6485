"""`--help`: verbs, settings by sections, presets and examples, wrapped to the terminal's width.

`yuzogpt help VERB WORD`, or `yuzogpt VERB --help WORD`, shows what of a verb's help has the word.
"""

import shutil
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from pydantic.fields import FieldInfo

from yuzogpt.cli.verbs import VERBS, Verb
from yuzogpt.config import Section
from yuzogpt.config.resolve import choices, leaves, preset_summary
from yuzogpt.errors import UserError, nearest

DEFAULT_WIDTH, MIN_WIDTH, MAX_WIDTH = 100, 40, 120  # columns
TWO_COLUMNS = 80  # columns of a terminal from which on meanings stand beside their flags
FLAG_WIDTH = 33  # columns, of a flag with its default

Pair = tuple[str, str]  # a flag or a name, and what it means

HINTS = """\
`yuzogpt VERB --help` lists the settings of a verb, `yuzogpt help WORD` those that have a word, in \
all verbs. With --dry_run a command only prints its settings. --log_level=warning leaves out what \
it is doing, --log_level=debug tells more; the others are info and error. `yuzogpt --version` \
prints the version."""


def overview() -> str:
    """Return what `yuzogpt --help` prints."""
    verbs = [(name, verb.summary) for name, verb in VERBS.items()]
    lines = ["yuzogpt VERB ... --key=value", "", *columns(verbs, 12), ""]
    return "\n".join(lines + textwrap.wrap(HINTS, terminal_width()))


def verb_help(name: str, words: Sequence[str] = ()) -> str:
    """Return a verb's help: all of it, or the settings and presets that have all the words."""
    verb = VERBS[name]
    words = [word.lower() for word in words if not word.startswith("-")]
    presets = [(preset, preset_summary(preset)) for preset in verb.preset_names]
    presets = [pair for pair in presets if has_all(words, *pair)]
    lines = list(settings_help(verb.schema, words))
    if presets:
        lines += ["", "presets: settings by name", *columns(presets, 27)]
    if words:
        return "\n".join(lines).strip("\n") or nothing_found(words, [verb])
    head = [f"yuzogpt {name} {verb.usage} --key=value ...", verb.summary, ""]
    examples = ["", "examples:", *(f"  yuzogpt {name} {line}" for line in verb.examples)]
    return "\n".join([*head, "\n".join(lines).lstrip("\n"), *(examples if verb.examples else [])])


def search_all(words: Sequence[str]) -> str:
    """Return the settings of all verbs that have all the words; shared sections once."""
    words, found, seen = [word.lower() for word in words], list[str](), set[object]()
    for name, verb in VERBS.items():
        lines = list(settings_help(verb.schema, words, seen))
        found += ["", f"== yuzogpt {name}", *lines[1:]] if lines else []
    return "\n".join(found[1:]) or nothing_found(words, VERBS.values())


def nothing_found(words: Sequence[str], verbs: Iterable[Verb]) -> str:
    """Raise UserError with the setting whose name is nearest to what was searched."""
    names = {dotted.split(".")[1] for verb in verbs for dotted, _ in leaves(verb.schema)}
    hint = nearest(words[-1], names) or "`yuzogpt --help` lists the verbs"
    raise UserError(f"{' '.join(words)}: in no setting's help; {hint}")


def settings_help(
    schema: type[Section], words: Sequence[str] = (), seen: set[object] | None = None
) -> Iterator[str]:
    """Yield the help of settings by sections, an empty line before each.

    `words`: only of settings that have all of them; `seen`: sections to leave out, and those done.
    """
    sections: dict[str, list[Pair]] = {}
    for dotted, field in leaves(schema):
        section, leaf = dotted.split(".")
        extra: Any = field.json_schema_extra
        unit = f" [{extra['unit']}]" if extra["unit"] else ""
        pair = f"--{leaf}={shown(field)}", f"{field.description}{choices(field)}{unit}"
        if has_all(words, dotted, *pair):
            sections.setdefault(section, []).append(pair)
    for section, pairs in sections.items():
        annotation = schema.model_fields[section].annotation
        if seen is None or annotation not in seen:
            title = f"{section}: {(annotation.__doc__ or '').splitlines()[0]}"
            yield from ["", *textwrap.wrap(title, terminal_width()), *columns(pairs, FLAG_WIDTH)]
            if seen is not None:
                seen.add(annotation)


def columns(pairs: Sequence[Pair], width: int) -> Iterator[str]:
    """Yield lines of two columns, the first `width` wide; on a narrow terminal one below the other.

    There too, names stay beside their meaning if that leaves room.
    """
    of_terminal = terminal_width()
    indent = " " * (width + 2)
    is_narrow = of_terminal < TWO_COLUMNS and width > of_terminal // 4
    for name, meaning in pairs:
        first = f"  {name}"
        if is_narrow or len(first) >= len(indent):
            yield first
            first = ""
        indent_now = "      " if is_narrow else indent
        lines = textwrap.wrap(meaning, of_terminal - len(indent_now)) or [""]
        yield f"{first:<{len(indent_now)}}{lines[0]}".rstrip()
        yield from (indent_now + line for line in lines[1:])


def terminal_width() -> int:
    """Return the columns to fill."""
    found = shutil.get_terminal_size((DEFAULT_WIDTH, 24)).columns
    return max(MIN_WIDTH, min(MAX_WIDTH, found))


def has_all(words: Iterable[str], *texts: str) -> bool:
    """Return whether all words are in the texts."""
    return all(word in " ".join(texts).lower() for word in words)


def shown(field: FieldInfo) -> str:
    r"""Return a setting's default as it is typed: `a,b`, and `'\n'` for a line end."""
    value = field.default
    if isinstance(value, tuple):
        value = ",".join(map(str, value))
    return repr(value) if value == "\n" else str(value)
