"""`yuzogpt VERB ... --key=value`: from the command line to the verbs.

Exit status: 0 done, 1 the run failed, 2 the user's mistake (one line on stderr), 130 Ctrl-C, 143
stopped by SIGTERM or a closed terminal, after writing a checkpoint if it was training (0 under
torchrun). Nothing heavy is imported before the settings are known to be valid.
"""

import atexit
import contextlib
import io
import os
import platform
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import NoReturn

from yuzogpt import __version__
from yuzogpt.cli.arguments import is_true, read_arguments, with_default_preset, without_log_level
from yuzogpt.cli.help import overview, search_all, verb_help
from yuzogpt.cli.preview import preview
from yuzogpt.cli.verbs import VERBS
from yuzogpt.cli.wrong_kind import check_kind
from yuzogpt.config import TrainSettings
from yuzogpt.config.resolve import SEARCH, resolve
from yuzogpt.console.terminal import complain, report_error, say
from yuzogpt.errors import RunFailed, Stopped, UserError, WorkerFailed, nearest
from yuzogpt.runtime.cores import limit_spinning
from yuzogpt.runtime.ranks import are_started_by_torchrun, is_first_of_node
from yuzogpt.runtime.signals import (
    STATE,
    exit_on_next_interrupt,
    hangup_as_sigterm,
    stopped_by_sigterm,
)
from yuzogpt.storage.atomic_files import expect_no_home

HELP = ("--help", "-h", "help")


def main(arguments: Sequence[str]) -> None:
    """Run one verb; UserError for the user's mistakes."""
    if text := asked_help(arguments):
        say(text)
        return
    name, *rest = arguments
    verb = VERBS[name]
    files, flags = read_arguments(name, verb, rest)
    flags = without_log_level(flags)
    searched = [flag for flag in flags if verb.is_search and flag.startswith(f"--{SEARCH}.")]
    flags = [flag for flag in flags if flag not in searched]
    dry_run = [flag for flag in flags if flag.partition("=")[0] == "--dry_run"]
    flags = [flag for flag in flags if flag not in dry_run]
    settings = resolve(verb.schema, files, flags, complain if is_first_of_node() else drop)
    if dry_run and is_true(dry_run[-1]):
        say(preview(settings, files, searched if verb.is_search else None), end="")
        return
    if isinstance(settings, TrainSettings) and not (settings.data.data_dir or settings.run.storage):
        check_kind("dataset", settings.data.dataset)
    if verb.is_search:
        verb.run(settings, files, searched)
    else:
        verb.run(settings)


def drop(_: str) -> None:
    """Print nothing: another rank of this node does."""


def asked_help(arguments: Sequence[str]) -> str:
    """Return the help, or the version, that is asked for; empty if a verb is to run."""
    if not arguments:
        return overview()
    name, *rest = arguments
    if name in ("--version", "version", "-V"):
        return version()
    if name in HELP and rest and rest[0] in VERBS:  # `help VERB [WORD]...`
        return verb_help(rest[0], rest[1:])
    if name in HELP:
        return search_all(rest) if rest else overview()
    if name not in VERBS:
        hint = nearest(name, VERBS) or f"verbs: {', '.join(VERBS)}"
        raise UserError(f"{name}: unknown verb; {hint}")
    place = next((place for place, word in enumerate(rest) if word in HELP[:2]), None)
    return "" if place is None else verb_help(name, rest[place + 1 :])


def version() -> str:
    """Return the version, and those that a report of a problem needs."""
    versions = [f"yuzogpt {__version__}", f"Python {platform.python_version()}"]
    for name in ("torch", "ray"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions.append(f"{name} {metadata.version(name)}")
    return ", ".join(versions)


def run(arguments: Sequence[str] | None = None, preset: str = "") -> NoReturn:
    """Run the command line and exit this process with its status.

    `preset`: used if the arguments name no preset.
    """
    expect_no_home()
    limit_spinning()
    STATE.is_command = True
    if isinstance(sys.stdout, io.TextIOWrapper):  # a character that cannot be encoded is no error
        sys.stdout.reconfigure(errors="replace")
    if arguments and preset:
        arguments = with_default_preset(arguments, preset)
    status: list[int] = []
    atexit.register(exit_now, status)  # registered first, so called last
    status.append(exit_status(sys.argv[1:] if arguments is None else arguments))
    for stream in filter(None, (sys.stdout, sys.stderr)):
        with contextlib.suppress(OSError):
            stream.flush()
    exit_on_next_interrupt(status[0])  # while libraries take themselves apart
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
        exit_on_next_interrupt()
        report_error(f"yuzogpt: {error}")
        # torchrun treats any other status as a failure and restarts all ranks.
        return 0 if are_started_by_torchrun() else error.status
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
