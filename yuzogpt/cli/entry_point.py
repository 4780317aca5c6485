"""`yuzogpt VERB ... --key=value`: from the command line to the verbs.

In: arguments. Out: an exit status: 0 done, 1 a run that failed, 2 the user's mistake (one line on
stderr), 130 Ctrl-C, 143 stopped when asked to (SIGTERM, a closed terminal), with a checkpoint where
it trains (under torchrun 0).
Nothing heavy is imported before the settings are known to be right.
"""

import atexit
import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NoReturn

from yuzogpt.cli import commands
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
from yuzogpt.config.resolve import SEARCH, help_text, leaves, preset_names, resolve, to_yaml
from yuzogpt.console.terminal import complain, say
from yuzogpt.errors import RunFailed, Stopped, UserError, WorkerFailed, nearest
from yuzogpt.runtime.ranks import are_started_by_torchrun, is_first_of_node
from yuzogpt.runtime.signals import (
    exit_on_next_interrupt,
    hangup_as_sigterm,
    stopped_by_sigterm,
)
from yuzogpt.storage.atomic_files import expect_no_home

OWN = ("dry_run", "json", "help")  # flags of the command itself
BOOLEANS = ("true", "false", "yes", "no", "on", "off", "1", "0")  # what pydantic takes for one


@dataclass(frozen=True)
class Verb:
    """One thing that the command does."""

    usage: str
    summary: str
    schema: type[Section]
    run: Callable[..., None]
    positional: tuple[str, ...] = ()  # settings that are given without their names, in this order
    one: str = ""  # what these are
    takes_presets: bool = False
    goes_on: bool = False  # where it was interrupted, when it is called again


VERBS = {
    "prepare": Verb(
        "CORPUS", "text -> Arrow blocks", PrepareSettings, commands.prepare,
        ("dataset",), "one corpus", goes_on=True,
    ),
    "inspect": Verb(
        "DIR", "what is in a prepared corpus", InspectSettings, commands.inspect,
        ("data_dir",), "one corpus",
    ),
    "train": Verb(
        "[PRESET | FILE.yaml]...", "Arrow blocks -> checkpoints", TrainSettings, commands.train,
        takes_presets=True, goes_on=True,
    ),
    "tune": Verb(
        "[PRESET | FILE.yaml]...", "which settings are best?", TuneSettings, commands.tune,
        takes_presets=True, goes_on=True,
    ),
    "report": Verb(
        "OUT_DIR", "what a run did -> report.html", ReportSettings, commands.report,
        ("out_dir",), "one run",
    ),
    "evaluate": Verb(
        "RUN | DIR | gpt2 | PRESET", "checkpoint -> benchmarks",
        EvaluateSettings, commands.evaluate,
        ("model",), "one model", takes_presets=True, goes_on=True,
    ),
    "bench": Verb(
        "[PRESET | FILE.yaml]...", "what a training step costs", BenchSettings, commands.bench,
        takes_presets=True,
    ),
    "sample": Verb("", "checkpoint -> text", SampleSettings, commands.sample),
    "serve": Verb(
        "RUN | DIR | gpt2", "checkpoint -> HTTP and a page", ServeSettings, commands.serve,
        ("model",), "one model",
    ),
    "doctor": Verb("", "is a cluster sound?", DoctorSettings, commands.doctor),
    "export": Verb(
        "RUN --to=huggingface DIR", "checkpoint -> folder", ExportSettings, commands.export,
        ("out_dir", "hf_dir"), "one run, and one folder,",
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
        if verb.takes_presets:
            say(f"\npresets: {', '.join(presets_of(verb))}")
        return
    files, flags = read_arguments(name, verb, rest)
    searched = [flag for flag in flags if flag.startswith(f"--{SEARCH}.")]
    if verb.schema is TuneSettings:
        flags = [flag for flag in flags if flag not in searched]
    dry_run = [flag for flag in flags if flag.partition("=")[0] == "--dry_run"]
    settings = resolve(verb.schema, files, [flag for flag in flags if flag not in dry_run])
    if dry_run and not dry_run[-1].lower().endswith(("=false", "=0", "=no")):
        more = space_of(settings, files, searched) if isinstance(settings, TuneSettings) else ""
        say(preview(settings) + more, end="")
        return
    if verb.schema is TuneSettings:
        verb.run(settings, files, searched)
    else:
        verb.run(settings)


def read_arguments(name: str, verb: Verb, arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the presets and YAML files, and the flags, of which some came without their names."""
    arguments = list(in_one_word(verb, arguments))
    flags = [argument for argument in arguments if argument.startswith("-")]
    plain = [argument for argument in arguments if not argument.startswith("-")]
    if verb.schema in (BenchSettings, DoctorSettings):
        flags = ["--output=json" if flag == "--json" else flag for flag in flags]
    if not verb.positional and verb.takes_presets:
        return plain, flags
    files = []
    if verb.takes_presets:
        named = [flag for flag in flags if flag.startswith("--preset=")]
        flags = [flag for flag in flags if flag not in named]
        is_file = {one: one in presets_of(verb) or one.endswith((".yaml", ".yml")) for one in plain}
        files = [flag.partition("=")[2] for flag in named] + [one for one in plain if is_file[one]]
        plain = [one for one in plain if not is_file[one]]
    if len(plain) > len(verb.positional):
        what = f"{verb.one} at a time" if verb.one else "takes --key=value only"
        raise UserError(f"{name} {' '.join(plain)}: {what}")
    named = [f"--{key}={value}" for key, value in zip(verb.positional, plain, strict=False)]
    return files, named + flags


def in_one_word(verb: Verb, arguments: Sequence[str]) -> Iterator[str]:
    """Yield the arguments, but `--key value` as `--key=value`."""
    types = {
        name: str(field.annotation)
        for dotted, field in leaves(verb.schema)
        for name in (dotted, dotted.split(".")[1])
    }

    def is_value(key: str, word: str) -> bool:
        if word.startswith("--") or key in OWN:
            return False
        if "bool" in types.get(key, ""):  # which may stand alone
            return word.lower() in BOOLEANS or (word == "auto" and "'auto'" in types[key])
        # After a misspelt key, too: that is the mistake then.
        is_file = word.endswith((".yaml", ".yml")) or word in preset_names()
        return key in types or key == "preset" or not (is_file or verb.positional)

    words = list(arguments)
    while words:
        word = words.pop(0)
        is_key = word.startswith("--") and "=" not in word
        if is_key and words and is_value(word[2:], words[0]):
            word = f"{word}={words.pop(0)}"
        yield word


def with_preset(arguments: Sequence[str], preset: str) -> Sequence[str]:
    """Return the arguments with a preset if they name none, and no file."""
    name, *rest = arguments
    files, _ = read_arguments(name, VERBS[name], rest)
    return arguments if files else [name, preset, *rest]


def presets_of(verb: Verb) -> list[str]:
    """Return the presets that a verb takes."""
    of_evaluation = verb.schema is EvaluateSettings
    return [name for name in preset_names() if name.startswith("eval_") == of_evaluation]


def space_of(settings: TuneSettings, files: Sequence[str], searched: Sequence[str]) -> str:
    """Return the search space as YAML that `tune` reads back."""
    from yuzogpt.tuning.space import read_space

    return read_space(settings, files, searched).to_yaml()


def preview(settings: Section) -> str:
    """Return the resolved settings as YAML, without the shape that another model will give."""
    if isinstance(settings, TrainSettings) and settings.run.init_from != "scratch":
        own = {"dropout", *settings.model.model_fields_set}
        return to_yaml(settings, {"model": set(type(settings.model).model_fields) - own})
    return to_yaml(settings)


def overview() -> str:
    """Return what `yuzogpt --help` prints."""
    lines = ["yuzogpt VERB ... --key=value", ""]
    lines += [f"  {name:<8} {verb.usage:<24} {verb.summary}" for name, verb in VERBS.items()]
    return "\n".join([*lines, "", "`yuzogpt VERB --help` lists every setting of a verb."])


def run(arguments: Sequence[str] | None = None, preset: str = "") -> NoReturn:
    """Run the command line in a process of its own, and end that with its status.

    `preset`: taken if the arguments name none.
    """
    expect_no_home()
    if isinstance(sys.stdout, io.TextIOWrapper):  # what its encoding lacks is no reason to end
        sys.stdout.reconfigure(errors="replace")
    if arguments and preset:
        arguments = with_preset(arguments, preset)
    ended: list[int] = []
    atexit.register(end_now, ended)  # the first that is registered is called last
    ended.append(status_of(sys.argv[1:] if arguments is None else arguments))
    sys.exit(ended[0])


def end_now(ended: Sequence[int]) -> None:
    """End where all else is done: to take torch and Ray apart would take another second."""
    if ended:
        with contextlib.suppress(OSError):  # what cannot be written is told of by Python's own end
            for stream in filter(None, (sys.stdout, sys.stderr)):  # None: it was begun without
                stream.flush()
            os._exit(ended[0])


def status_of(arguments: Sequence[str]) -> int:
    """Run the command line; return its status, and say on stderr why it is not 0."""
    goes_on = any(verb.goes_on for name, verb in VERBS.items() if name in arguments[:1])
    more = "; the same command goes on" if goes_on else ""
    try:
        with hangup_as_sigterm(), contextlib.ExitStack() as stack:
            # A rank that waits for others in compiled code would not hear of it: it ends at once.
            if not are_started_by_torchrun():
                stack.enter_context(stopped_by_sigterm(f"stopped (SIGTERM){more}"))
            main(arguments)
    except UserError as error:
        if is_first_of_node():  # under torchrun, all ranks find the same mistake
            complain(f"yuzogpt: {error}")
        return 2
    except (RunFailed, WorkerFailed) as error:
        complain(f"yuzogpt: {error}")
        return 1
    except Stopped as error:
        complain(f"yuzogpt: {error}")
        # torchrun takes any other status for a failure, and starts all ranks again.
        return 0 if are_started_by_torchrun() else 143
    except BrokenPipeError:  # `| head`: whoever read has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        reason = error.strerror or str(error)
        complain(f"yuzogpt: {error.filename or 'the system says'}: {reason}")
        return 1
    except KeyboardInterrupt:
        # A second one would only spoil the end, unless a thread holds that up: then it is the end.
        exit_on_next_interrupt()
        complain(f"yuzogpt: interrupted{more}")
        return 130
    return 0
