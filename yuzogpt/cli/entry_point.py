"""`yuzogpt VERB ... --key=value`: from the command line to the verbs.

Exit status: 0 done, 1 the run failed, 2 the user's mistake (one line on stderr), 130 Ctrl-C, 143
stopped by SIGTERM or a closed terminal, after writing a checkpoint if it was training (0 under
torchrun). Nothing heavy is imported before the settings are known to be valid.
"""

import atexit
import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NoReturn

from yuzogpt.checkpoints.pretrained import PUBLISHED
from yuzogpt.cli import commands
from yuzogpt.cli.wrong_kind import check_kind
from yuzogpt.config import (
    BenchSettings,
    DoctorSettings,
    EvaluateSettings,
    ExportSettings,
    InspectSettings,
    PrepareSettings,
    ReportSettings,
    SampleSettings,
    Section,
    ServeSettings,
    TrainSettings,
    TuneSettings,
)
from yuzogpt.config.renamed import current_name
from yuzogpt.config.resolve import SEARCH, help_text, leaves, preset_names, resolve, to_yaml
from yuzogpt.console.terminal import LEVELS, complain, report_error, say, set_log_level
from yuzogpt.data.preparation.own_text import is_source, named_after_source
from yuzogpt.errors import RunFailed, Stopped, UserError, WorkerFailed, nearest
from yuzogpt.runs.own_corpus import with_own_out_dir
from yuzogpt.runtime.cores import limit_spinning
from yuzogpt.runtime.ranks import are_started_by_torchrun, is_first_of_node
from yuzogpt.runtime.signals import (
    exit_on_next_interrupt,
    hangup_as_sigterm,
    stopped_by_sigterm,
)
from yuzogpt.storage.atomic_files import expect_no_home

COMMAND_FLAGS = ("dry_run", "json", "help")  # of the command itself
BOOLEANS = ("true", "false", "yes", "no", "on", "off", "1", "0")  # as pydantic reads them


@dataclass(frozen=True)
class Verb:
    """One thing that the command does."""

    usage: str
    summary: str
    schema: type[Section]
    run: Callable[..., None]
    positional: tuple[str, ...] = ()  # settings that can be given without their names, in order
    takes: str = ""  # what the positional settings are, for messages
    or_else: tuple[str, Callable[[str], bool]] | None = None  # takes words for which this holds
    presets: Literal["", "train", "eval"] = ""  # which presets it takes
    is_resumable: bool = False  # the same command continues after an interruption
    is_search: bool = False  # takes `search:` and --search.KEY=...
    has_json: bool = False  # takes --json, short for --output=json


VERBS = {
    "prepare": Verb(
        "CORPUS | FILE", "turn text into a corpus of Arrow blocks",
        PrepareSettings, commands.prepare,
        ("dataset",), "one corpus", ("source", is_source), is_resumable=True,
    ),
    "inspect": Verb(
        "DIR", "show what is in a prepared corpus", InspectSettings, commands.inspect,
        ("data_dir",), "one corpus",
    ),
    "train": Verb(
        "[PRESET | FILE.yaml]...", "train a model on a prepared corpus",
        TrainSettings, commands.train, presets="train", is_resumable=True,
    ),
    "tune": Verb(
        "[PRESET | FILE.yaml]...", "search for the best training settings",
        TuneSettings, commands.tune, presets="train", is_resumable=True, is_search=True,
    ),
    "report": Verb(
        "OUT_DIR", "summarize a run and write report.html", ReportSettings, commands.report,
        ("out_dir",), "one run",
    ),
    "evaluate": Verb(
        "RUN | DIR | gpt2 | PRESET", "score a model on benchmarks",
        EvaluateSettings, commands.evaluate,
        ("model",), "one model", presets="eval", is_resumable=True,
    ),
    "bench": Verb(
        "[PRESET | FILE.yaml]...", "measure how long a training step takes",
        BenchSettings, commands.bench, presets="train", has_json=True,
    ),
    "sample": Verb(
        "RUN | DIR | gpt2", "generate text with a model", SampleSettings, commands.sample,
        ("out_dir",), "one model", ("init_from", PUBLISHED.__contains__),
    ),
    "serve": Verb(
        "RUN | DIR | gpt2", "serve a model over HTTP, with a web page",
        ServeSettings, commands.serve, ("model",), "one model",
    ),
    "doctor": Verb(
        "", "check that a cluster is healthy", DoctorSettings, commands.doctor, has_json=True
    ),
    "export": Verb(
        "RUN --to=huggingface DIR", "write a checkpoint as a Hugging Face folder",
        ExportSettings, commands.export, ("out_dir", "hf_dir"), "one run, and one folder,",
    ),
}  # fmt: skip


def main(arguments: Sequence[str]) -> None:
    """Run one verb; UserError for the user's mistakes."""
    if not arguments or arguments[0] in ("--help", "-h", "help"):
        say(overview())
        return
    name, *rest = arguments
    verb = VERBS.get(name)
    if verb is None:
        hint = nearest(name, VERBS) or f"verbs: {', '.join(VERBS)}"
        raise UserError(f"{name}: unknown verb; {hint}")
    if "--help" in rest or "-h" in rest:
        say(f"yuzogpt {name} {verb.usage} --key=value ...\n{verb.summary}\n")
        say(help_text(verb.schema))
        if verb.presets:
            say(f"\npresets: {', '.join(presets_of(verb))}")
        return
    files, flags = read_arguments(name, verb, rest)
    flags = without_log_level(flags)
    searched = [flag for flag in flags if verb.is_search and flag.startswith(f"--{SEARCH}.")]
    flags = [flag for flag in flags if flag not in searched]
    dry_run = [flag for flag in flags if flag.partition("=")[0] == "--dry_run"]
    flags = [flag for flag in flags if flag not in dry_run]
    settings = resolve(verb.schema, files, flags, complain if is_first_of_node() else drop)
    if dry_run and not dry_run[-1].lower().endswith(("=false", "=0", "=no")):
        space = search_space_yaml(settings, files, searched) if verb.is_search else ""
        say(preview(settings) + space, end="")
        return
    if isinstance(settings, TrainSettings) and not settings.data.data_dir:
        check_kind("dataset", settings.data.dataset)
    if verb.is_search:
        verb.run(settings, files, searched)
    else:
        verb.run(settings)


def without_log_level(flags: Sequence[str]) -> list[str]:
    """Set the level of the log if a flag names one; return the other flags."""
    for flag in flags:
        key, _, level = flag.partition("=")
        if key == "--log_level":
            if level not in LEVELS:
                raise UserError(f"{flag}: choose one of {', '.join(LEVELS)}")
            set_log_level(level)
    return [flag for flag in flags if flag.partition("=")[0] != "--log_level"]


def drop(_: str) -> None:
    """Print nothing: another rank of this node does."""


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
        given = [word for word in plain if word in presets_of(verb) or is_yaml(word)]
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
        named.append(f"--{setting if setting and holds(word) else key}={word}")
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


def is_yaml(word: str) -> bool:
    """Return whether an argument names a YAML file."""
    return word.endswith((".yaml", ".yml"))


def with_default_preset(arguments: Sequence[str], preset: str) -> Sequence[str]:
    """Return the arguments with a preset, unless they name a preset or a file."""
    name, *rest = arguments
    files, _ = read_arguments(name, VERBS[name], rest)
    return arguments if files else [name, preset, *rest]


def presets_of(verb: Verb) -> list[str]:
    """Return the presets that a verb takes."""
    is_eval = verb.presets == "eval"
    return [name for name in preset_names() if name.startswith("eval_") == is_eval]


def search_space_yaml(settings: Section, files: Sequence[str], searched: Sequence[str]) -> str:
    """Return the search space as YAML that `tune` reads back."""
    from yuzogpt.tuning.space import read_space

    assert isinstance(settings, TuneSettings)
    return read_space(settings, files, searched).to_yaml()


def preview(settings: Section) -> str:
    """Return the resolved settings as YAML, without the shape that init_from's model decides."""
    if isinstance(settings, PrepareSettings):
        settings = named_after_source(settings)
    if isinstance(settings, TrainSettings):
        settings = with_own_out_dir(settings)
    if isinstance(settings, TrainSettings) and settings.run.init_from != "scratch":
        kept = {"dropout", *settings.model.model_fields_set}
        return to_yaml(settings, {"model": set(type(settings.model).model_fields) - kept})
    return to_yaml(settings)


def overview() -> str:
    """Return what `yuzogpt --help` prints."""
    lines = ["yuzogpt VERB ... --key=value", ""]
    lines += [f"  {name:<8} {verb.usage:<27} {verb.summary}" for name, verb in VERBS.items()]
    lines += ["", "`yuzogpt VERB --help` lists the settings of a verb."]
    lines += ["With --dry_run a command only prints its settings. --log_level=warning leaves out"]
    lines += ["what it is doing, --log_level=debug tells more; the others are info and error."]
    return "\n".join(lines)


def run(arguments: Sequence[str] | None = None, preset: str = "") -> NoReturn:
    """Run the command line and exit this process with its status.

    `preset`: used if the arguments name no preset.
    """
    expect_no_home()
    limit_spinning()
    if isinstance(sys.stdout, io.TextIOWrapper):  # a character that cannot be encoded is no error
        sys.stdout.reconfigure(errors="replace")
    if arguments and preset:
        arguments = with_default_preset(arguments, preset)
    status: list[int] = []
    atexit.register(exit_now, status)  # registered first, so called last
    status.append(exit_status(sys.argv[1:] if arguments is None else arguments))
    sys.exit(status[0])


def exit_now(status: Sequence[int]) -> None:
    """Exit at once: tearing down torch and Ray would take another second."""
    if status:
        with contextlib.suppress(OSError):  # Python reports it when it exits by itself
            for stream in filter(None, (sys.stdout, sys.stderr)):  # None: started without it
                stream.flush()
            os._exit(status[0])


def exit_status(arguments: Sequence[str]) -> int:
    """Run the command line and return its status; print on stderr why it is not 0."""
    is_resumable = any(VERBS[name].is_resumable for name in arguments[:1] if name in VERBS)
    hint = "; the same command resumes it" if is_resumable else ""
    try:
        with hangup_as_sigterm(), contextlib.ExitStack() as stack:
            # A rank that waits for others in compiled code would not notice: SIGTERM kills it.
            if not are_started_by_torchrun():
                stack.enter_context(stopped_by_sigterm(f"stopped (SIGTERM){hint}"))
            main(arguments)
    except UserError as error:
        if is_first_of_node():  # under torchrun, all ranks find the same mistake
            report_error(f"yuzogpt: {error}")
        return 2
    except (RunFailed, WorkerFailed) as error:
        report_error(f"yuzogpt: {error}")
        return 1
    except Stopped as error:
        report_error(f"yuzogpt: {error}")
        # torchrun treats any other status as a failure and restarts all ranks.
        return 0 if are_started_by_torchrun() else 143
    except BrokenPipeError:  # `| head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        reason = error.strerror or str(error)
        report_error(f"yuzogpt: {error.filename or 'I/O error'}: {reason}")
        return 1
    except KeyboardInterrupt:
        # A second one would only spoil the end, unless a thread holds that up: then it is the end.
        exit_on_next_interrupt()
        report_error(f"yuzogpt: interrupted{hint}")
        return 130
    return 0
