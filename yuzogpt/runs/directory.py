"""The files of a run, the one command that writes them, and how a run gives way to another.

In: settings. Out: out_dir, held for this command alone.
"""

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path

from yuzogpt import checkpoints
from yuzogpt.checkpoints import remote
from yuzogpt.config import TrainSettings, with_changes
from yuzogpt.config.resolve import to_yaml
from yuzogpt.errors import RunFailed, UserError
from yuzogpt.runs.event_log import append_record
from yuzogpt.storage import mirrors
from yuzogpt.storage.filesystems import scheme_of
from yuzogpt.storage.lease import Lease, holder_of
from yuzogpt.storage.untrusted import read_file

METRICS = "metrics.jsonl"
EVALUATIONS = "evaluations.jsonl"  # of `--eval_tasks`; the same kind of records
CURVE = "loss.png"
REPORT = "report.html"
SETTINGS = "settings.yaml"
ERRORS = "errors.log"
SIGNATURE = "# Written by `yuzogpt train`: the settings of this run.\n"
COMMAND = "# Begun or resumed by the command "  # and its id
DELETING = "# The rest is of the run before, and is being deleted (--overwrite).\n"
WANDB_ID = "wandb-id.txt"
STOP = "stop"  # a file that asks the run to stop; may hold the reason
FAILED = ".failed"  # a line: why workers of this command are not to be started again
PAUSE = ".pause"  # the same, of the launcher, which will start the workers again


def directory_of(settings: TrainSettings) -> Path:
    """Return where the process that the user started finds out_dir."""
    return mirrors.directory_of(settings.run.out_dir, mirrors.DRIVER)


def directory_of_reader(out_dir: str) -> Path:
    """Return where a process that only reads finds a run: what was asked for, and what it says."""
    directory = mirrors.directory_of(out_dir, mirrors.READER)
    try:
        for name in (METRICS, EVALUATIONS, SETTINGS):
            mirrors.pull(directory / name, if_changed=True)
    except OSError as error:
        raise UserError(f"{out_dir}: not within reach: {error.strerror}") from None
    return directory


def is_stored(settings: TrainSettings) -> bool:
    """Tell whether out_dir is in an object store."""
    return bool(scheme_of(settings.run.out_dir))


def pull(run: Path) -> None:
    """Bring what a mirror needs of its run: all but tensors."""
    for name in (SETTINGS, METRICS, WANDB_ID):
        mirrors.pull(run / name, if_changed=True)
    remote.pull_heads(run)


@contextlib.contextmanager
def writing(settings: TrainSettings, command: str = "") -> Iterator[Path]:
    """Hold out_dir for this command alone; a run that gives way to it is still whole.

    `command`: its id, if it holds out_dir more than once; else the lease's is taken.
    """
    run = directory_of(settings)
    with Lease(run) as lease:
        command = command or lease.holder["id"]
        remote.sweep(run)
        for name in (STOP, PAUSE, FAILED):
            mirrors.delete(run / name)
        if not gives_way(settings, run, command):
            begin(settings, run, command)
        try:
            yield run
        except RunFailed as error:
            with contextlib.suppress(OSError):
                is_ours = holder_of(run) == lease.holder["id"]  # not into another's records
                if is_ours and not gives_way(settings, run, command):
                    append_record(run / METRICS, "failure", str(error), reason="gave up")
            raise
        finally:
            with contextlib.suppress(OSError):
                mirrors.delete(run / STOP)
                mirrors.delete(run / FAILED)


# --- how a run gives way to another (`--overwrite`)
#
# A command is refused, or fails, until its workers have met and loaded their weights; until then
# the run in out_dir is whole. Then rank 0 calls `begin`, before it writes anything else. The head
# of settings.yaml says how far that went, in one file that is replaced at once:
#
#     another command's id    nothing is deleted yet
#     DELETING                some of it may be: no run is left that could go on, whoever asks
#     this command's id       the run is this command's; workers that it starts again go on with it


def gives_way(settings: TrainSettings, run: Path, command: str) -> bool:
    """Return whether there is a run in out_dir that this command is to delete, and has not yet."""
    head = header(run)
    if DELETING in head:
        return True
    is_there = bool(head) or has_checkpoints(run)
    return settings.run.overwrite and is_there and f"{COMMAND}{command}\n" not in head


def begin(settings: TrainSettings, run: Path, command: str) -> None:
    """Make out_dir this command's, and delete the run that gives way to it; call it on rank 0."""
    is_new = not header(run)
    if gives_way(settings, run, command):
        write_settings(settings, run, DELETING)
        clear(run)
        is_new = True
    # What is only to be evaluated keeps its settings: they say how it was trained.
    if is_new or not settings.evaluation.eval_only:
        write_settings(settings, run, f"{COMMAND}{command}\n")


def header(run: Path) -> list[str]:
    """Return the lines that begin settings.yaml and are no settings; none if there is no file."""
    path = run / SETTINGS
    try:
        content = mirrors.read(path) if mirrors.uri_of(path) else read_file(path)
    except FileNotFoundError:
        return []
    lines = content.decode(errors="replace").splitlines(keepends=True)
    return list(itertools.takewhile(lambda line: line.startswith("#"), lines))


def has_checkpoints(run: Path) -> bool:
    """Return whether there are checkpoints, broken ones too."""
    return bool(checkpoints.candidates(run)) or remote.has_broken(run)


def write_settings(settings: TrainSettings, run: Path, state: str) -> None:
    """Write settings.yaml, which the same command can be given again."""
    # To train from this file again must not delete the run.
    content = SIGNATURE + state + to_yaml(without_overwriting(settings))
    mirrors.write(run / SETTINGS, content.encode())


def without_overwriting(settings: TrainSettings) -> TrainSettings:
    """Return the settings of a command that goes on with what it finds."""
    return with_changes(settings, {"run.overwrite": False})


def clear(run: Path) -> None:
    """Delete what earlier runs wrote in out_dir, and nothing else; settings.yaml stays."""
    remote.clear(run)
    for name in (METRICS, EVALUATIONS, CURVE, REPORT, ERRORS, WANDB_ID):
        mirrors.delete(run / name)
