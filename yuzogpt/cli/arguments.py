"""What the words of a command line are: presets and files, and flags.

In: the words after the verb. Out: names of YAML files and presets, and `--key=value` flags.
"""

from collections.abc import Iterator, Sequence

from yuzogpt.cli.verbs import VERBS, Verb
from yuzogpt.cli.wrong_kind import check_kind
from yuzogpt.config.renamed import current_name
from yuzogpt.config.resolve import leaves, preset_names
from yuzogpt.console.terminal import LEVELS, set_log_level
from yuzogpt.errors import UserError

COMMAND_FLAGS = ("dry_run", "json", "help")  # of the command itself
BOOLEANS = ("true", "false", "yes", "no", "on", "off", "1", "0")  # as pydantic reads them


def without_log_level(flags: Sequence[str]) -> list[str]:
    """Set the level of the log if a flag names one; return the other flags."""
    for flag in flags:
        key, _, level = flag.partition("=")
        if key == "--log_level":
            if level not in LEVELS:
                raise UserError(f"{flag}: choose one of {', '.join(LEVELS)}")
            set_log_level(level)
    return [flag for flag in flags if flag.partition("=")[0] != "--log_level"]


def read_arguments(name: str, verb: Verb, arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the presets and YAML files, and the flags; positional settings become flags."""
    arguments = list(join_flags_and_values(verb, arguments))
    flags = [argument for argument in arguments if argument.startswith("-")]
    plain = [argument for argument in arguments if not argument.startswith("-")]
    if verb.has_json:
        flags = ["--output=json" if flag == "--json" else flag for flag in flags]
    if not verb.positional and verb.presets:
        for word in plain:
            if not is_yaml(word):
                check_kind(name, word)
        return plain, flags
    files = []
    if verb.presets:
        named = [flag for flag in flags if flag.startswith("--preset=")]
        flags = [flag for flag in flags if flag not in named]
        given = [word for word in plain if word in verb.preset_names or is_yaml(word)]
        files = [flag.partition("=")[2] for flag in named] + given
        plain = [word for word in plain if word not in given]
    if len(plain) > len(verb.positional):
        reason = f"{verb.takes} at a time" if verb.takes else "takes --key=value only"
        raise UserError(f"{name} {' '.join(plain)}: {reason}")
    for word in plain[:1]:
        check_kind(name, word)
    named = []
    for key, word in zip(verb.positional, plain, strict=False):
        setting, holds = verb.or_else or ("", bool)
        flag = f"--{setting if setting and holds(word) else key}="
        if twice := next((other for other in flags if other.startswith(flag)), None):
            raise UserError(f"{name} {word} {twice}: {verb.takes} at a time")
        named.append(flag + word)
    return files, named + flags


def join_flags_and_values(verb: Verb, arguments: Sequence[str]) -> Iterator[str]:
    """Yield the arguments, with `--key value` as `--key=value`."""
    types = {
        name: str(field.annotation)
        for dotted, field in leaves(verb.schema)
        for name in (dotted, dotted.split(".")[1])
    }

    def is_value(key: str, word: str) -> bool:
        if word.startswith("--") or key in COMMAND_FLAGS:
            return False
        if "bool" in types.get(key, ""):  # a boolean flag may stand alone
            return word.lower() in BOOLEANS or (word == "auto" and "'auto'" in types[key])
        # Also after a misspelt key, so that the key is what the error names.
        is_file = is_yaml(word) or word in preset_names()
        return key in types or key in ("preset", "log_level") or not (is_file or verb.positional)

    words = list(arguments)
    while words:
        word = words.pop(0)
        is_key = word.startswith("--") and "=" not in word
        if is_key and words and is_value(current_name(word[2:]), words[0]):
            word = f"{word}={words.pop(0)}"
        yield word


def is_true(flag: str) -> bool:
    """Return the value of a boolean flag of the command itself; it may stand alone."""
    value = flag.partition("=")[2].lower()
    if value and value not in BOOLEANS:
        raise UserError(f"{flag}: give true or false")
    return value not in ("false", "no", "off", "0")


def is_yaml(word: str) -> bool:
    """Return whether an argument names a YAML file."""
    return word.endswith((".yaml", ".yml"))


def with_default_preset(arguments: Sequence[str], preset: str) -> Sequence[str]:
    """Return the arguments with a preset, unless they name a preset or a file."""
    name, *rest = arguments
    files, _ = read_arguments(name, VERBS[name], rest)
    return arguments if files else [name, preset, *rest]
