"""Prints docs/settings.md: every setting of every verb, from the settings' own help.

python docs/generate.py > docs/settings.md
"""

from collections.abc import Iterator

from pydantic.fields import FieldInfo

from yuzogpt.cli import VERBS
from yuzogpt.cli.help import shown
from yuzogpt.config.renamed import RENAMED_SECTIONS, RENAMED_SETTINGS
from yuzogpt.config.resolve import choices, leaves, preset_names, preset_summary

HEAD = """\
# Settings

<!-- Made by `python docs/generate.py > docs/settings.md`. Do not edit. -->

Settings come from three places. Each overrides the one before it:

1. the defaults below;
2. presets and YAML files, left to right: `yuzogpt train shakespeare_char mine.yaml`;
3. flags: `--learning_rate=3e-4`.

A preset is given by its name, a YAML file by its path. `--key value` means the same as
`--key=value`. A bare key finds its section by itself (`--n_layer=4`); a dotted key is exact
(`--model.n_layer=4`). The same text means the same in YAML and as a flag.

`yuzogpt VERB --help` prints the list of a verb, `yuzogpt VERB --help WORD` and `yuzogpt help WORD`
what has a word. `--dry_run` prints the resolved settings as YAML
and does nothing else. A mistake costs one line and exit status 2, before Ray starts and before a
file is written. This holds for unknown keys, wrong types, missing corpora and damaged blocks.

`--log_level=warning` leaves out what a command is doing, `--log_level=error` its warnings, too;
`--log_level=debug` tells more. A program that uses the package sets the level of the logger
`yuzogpt`.

Exit statuses: 0 done; 1 the run failed; 2 a mistake in the command or its input; 130 Ctrl-C; 143
stopped on request (SIGTERM, a closed terminal).
"""


def main() -> None:
    """Print the page."""
    print("\n".join([HEAD, *presets(), *verbs(), *renamed()]).rstrip())


def presets() -> Iterator[str]:
    """Yield the lines about presets."""
    yield "Presets (`yuzogpt/config/presets/`). Those that begin with `eval_` are for"
    yield "`yuzogpt evaluate`, the others for `train`, `tune` and `bench`.\n"
    yield "| Preset | What it is |\n|---|---|"
    yield from (f"| `{name}` | {preset_summary(name)} |" for name in preset_names())
    yield ""


def verbs() -> Iterator[str]:
    """Yield the lines about each verb; a section of an earlier verb is only named."""
    owners: dict[type, str] = {}
    for name, verb in VERBS.items():
        yield f"## yuzogpt {name}\n"
        yield f"`yuzogpt {name} {verb.usage}`".replace(" `", "`") + f": {verb.summary}.\n"
        sections: dict[str, list[str]] = {}
        shared: dict[str, list[str]] = {}
        for dotted, field in leaves(verb.schema):
            section, leaf = dotted.split(".")
            schema = verb.schema.model_fields[section].annotation
            assert schema
            if schema in owners and owners[schema] != name:
                shared.setdefault(owners[schema], [])
                if section not in shared[owners[schema]]:
                    shared[owners[schema]].append(section)
                continue
            if section not in sections:
                owners[schema] = name
                sections[section] = [
                    f"### {section} ({name})\n",
                    f"{(schema.__doc__ or '').splitlines()[0]}\n",
                    "| Setting | Default | Meaning |",
                    "|---|---|---|",
                ]
            extra = field.json_schema_extra
            unit = f" [{extra['unit']}]" if isinstance(extra, dict) and extra["unit"] else ""
            meaning = cell(f"{field.description}{choices(field)}{unit}")
            sections[section].append(f"| `--{leaf}` | {default(field)} | {meaning} |")
        for owner, names in shared.items():
            listed = ", ".join(f"[{one}](#{one}-{owner})" for one in names)
            yield f"Sections of `yuzogpt {owner}` that it takes, too: {listed}.\n"
        for lines in sections.values():
            yield from [*lines, ""]


def renamed() -> Iterator[str]:
    """Yield the lines about settings that had other names."""
    yield "## Renamed settings\n"
    yield "The old names still work, as flags and in YAML. Sections:"
    yield ", ".join(f"`{old}` is `{new}`" for old, new in RENAMED_SECTIONS.items()) + ".\n"
    yield "| Old name | Name |\n|---|---|"
    yield from (f"| `{old}` | `--{new}` |" for old, new in RENAMED_SETTINGS.items())


def default(field: FieldInfo) -> str:
    """Return a default as it is written on the command line."""
    return f"`{shown(field)}`" if shown(field) else "(empty)"


def cell(text: str) -> str:
    """Return text for a cell of a table."""
    for character, entity in (("|", "\\|"), ("<", "&lt;"), (">", "&gt;"), ("*", "\\*")):
        text = text.replace(character, entity)
    return text


if __name__ == "__main__":
    main()
