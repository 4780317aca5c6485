"""`yuzogpt completion SHELL`: a script with all verbs, flags, values and presets in it.

It starts no Python when a key is pressed; it is printed again after an upgrade.
"""

import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING

from yuzogpt.config.registry import values_of
from yuzogpt.config.resolve import leaves

if TYPE_CHECKING:
    from yuzogpt.cli.verbs import Verb

    Verbs = Mapping[str, Verb]

BASH = """\
_yuzogpt() {
    local word="${COMP_WORDS[COMP_CWORD]}" before="${COMP_WORDS[COMP_CWORD-1]}" words
    if [ "$COMP_CWORD" = 1 ]; then
        COMPREPLY=($(compgen -W "%(verbs)s" -- "$word")); return
    fi
    [ "$word" = = ] && word=""
    [ "$before" = = ] && before="${COMP_WORDS[COMP_CWORD-2]}"
    case "${COMP_WORDS[1]} $before" in
%(values)s
    *" --"*) ;;  # a value that no list has: a file, perhaps
    *) case "${COMP_WORDS[1]} $word" in
%(flags)s
        esac ;;
    esac
    COMPREPLY=($(compgen -W "$words" -- "$word"))
    [[ "${COMPREPLY[0]}" = *= ]] && compopt -o nospace
    [ -n "${COMPREPLY[*]}" ] && return
    local IFS=$'\\n'
    compopt -o filenames 2> /dev/null
    COMPREPLY=($(compgen -f -- "$word"))
}
complete -F _yuzogpt yuzogpt
"""


def script(shell: str, verbs: "Verbs") -> str:
    """Return the script of a shell."""
    if shell == "fish":
        return "\n".join(
            ["complete -c yuzogpt -f -n __fish_use_subcommand", *fish_lines(verbs), ""]
        )
    text = bash_script(verbs)
    return f"autoload -U +X bashcompinit && bashcompinit\n{text}" if shell == "zsh" else text


def bash_script(verbs: "Verbs") -> str:
    """Return the script of bash, which zsh's bashcompinit runs, too."""
    values, flags = [], []
    for name, verb in verbs.items():
        flags.append(f'        "{name} -"*) words="{" ".join(flags_of(verb))}" ;;')
        if verb.preset_names:
            flags.append(f'        "{name} "*) words="{" ".join(verb.preset_names)}" ;;')
        values += [
            f'    "{name} --{leaf}") words="{" ".join(listed)}" ;;'
            for leaf, listed in values_by_setting(verb).items()
        ]
    parts = {"verbs": " ".join(verbs), "values": "\n".join(values), "flags": "\n".join(flags)}
    return BASH % parts


def fish_lines(verbs: "Verbs") -> list[str]:
    """Return a line of fish for each verb, flag and preset."""
    lines = []
    for name, verb in verbs.items():
        lines.append(f"complete -c yuzogpt -n __fish_use_subcommand -a {name}")
        lines[-1] += f" -d {shlex.quote(verb.summary)}"
        here = f"complete -c yuzogpt -n '__fish_seen_subcommand_from {name}'"
        values = values_by_setting(verb)
        for flag in flags_of(verb):
            leaf = flag.strip("-=")
            listed = f" -x -a '{' '.join(values[leaf])}'" if leaf in values else ""
            lines.append(f"{here} -l {leaf}{listed or (' -r' if flag.endswith('=') else '')}")
        if verb.preset_names:
            lines.append(f"{here} -a '{' '.join(verb.preset_names)}'")
    return lines


def flags_of(verb: "Verb") -> list[str]:
    """Return a verb's flags, with = after those that need a value."""
    flags = ["--help", "--dry_run", *(["--json"] if verb.has_json else [])]
    for dotted, field in leaves(verb.schema):
        flags.append(f"--{dotted.split('.')[1]}{'' if field.annotation is bool else '='}")
    return flags


def values_by_setting(verb: "Verb") -> dict[str, list[str]]:
    """Return the values of each setting that lists them."""
    listed = {dotted.split(".")[1]: values_of(field) for dotted, field in leaves(verb.schema)}
    return {leaf: list(filter(None, values)) for leaf, values in listed.items() if values}
