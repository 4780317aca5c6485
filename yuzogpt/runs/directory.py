"""The files of a run, the one command that writes them, and how a run is replaced by another.

In: settings. Out: out_dir, held for this command alone.
"""

import contextlib
import itertools
from collections.abc import Iterator

from yuzogpt import checkpoints
from yuzogpt.checkpoints import remote
from yuzogpt.config import RunSettings, TrainSettings, with_changes
from yuzogpt.config.resolve import to_yaml
from yuzogpt.errors import RunFailed, UserError
from yuzogpt.runs.event_log import append_record
from yuzogpt.storage.lease import Lease, holder_of
from yuzogpt.storage.run_storage import DRIVER, READER, RunStorage, open_storage
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
FAILED = ".failed"  # a line: why workers of this command must not be started again
PAUSE = ".pause"  # as STOP, but from the launcher, which will start the workers again


def open_run(options: RunSettings) -> RunStorage:
    """Return out_dir for the process that the user started."""
    return open_storage(options.out_dir, DRIVER)


def open_for_reading(out_dir: str) -> RunStorage:
    """Return a run for a process that only reads its settings and records; download these."""
    run = open_storage(out_dir, READER)
    try:
        for name in (METRICS, EVALUATIONS, SETTINGS):
            (run / name).download(if_changed=True)
    except OSError as error:
        raise UserError(f"{out_dir}: not within reach: {error.strerror}") from None
    return run


def download_run(run: RunStorage) -> None:
    """Download what a process needs of its run: all but tensors."""
    for name in (SETTINGS, METRICS, WANDB_ID):
        (run / name).download(if_changed=True)
    remote.download_metadata(run)


@contextlib.contextmanager
def hold_run_dir(settings: TrainSettings, command: str = "") -> Iterator[RunStorage]:
    """Hold out_dir for this command alone; a run that it will replace is not deleted yet.

    `command`: its id, if it holds out_dir more than once; default: the lease's.
    """
    run = open_run(settings.run)
    with Lease(run) as lease:
        command = command or lease.holder["id"]
        checkpoints.sweep(run)
        for name in (STOP, PAUSE, FAILED):
            (run / name).delete()
        if not gives_way(settings.run, run, command):
            begin(settings, run, command)
        try:
            yield run
        except RunFailed as error:
            with contextlib.suppress(OSError):
                is_ours = holder_of(run) == lease.holder["id"]  # not into another's records
                if is_ours and not gives_way(settings.run, run, command):
                    append_record(run / METRICS, "failure", str(error), reason="gave up")
            raise
        finally:
            with contextlib.suppress(OSError):
                (run / STOP).delete()
                (run / FAILED).delete()


# --- how a run is replaced by another (`--overwrite`)
#
# A command may be refused, or fail, until its workers have met and loaded their weights; until then
# the run in out_dir is complete. Then rank 0 calls `begin`, before it writes anything else. The
# head of settings.yaml says how far that went, in one file that is replaced at once:
#
#     another command's id    nothing is deleted yet
#     DELETING                some of it may be deleted: no command can resume this run
#     this command's id       the run is this command's; workers that it starts again resume it


def gives_way(options: RunSettings, run: RunStorage, command: str) -> bool:
    """Return whether there is a run in out_dir that this command must delete, and has not yet."""
    head = header(run)
    if DELETING in head:
        return True
    is_there = bool(head) or has_checkpoints(run)
    return options.overwrite and is_there and f"{COMMAND}{command}\n" not in head


def begin(settings: TrainSettings, run: RunStorage, command: str) -> None:
    """Make out_dir this command's, and delete the run that it replaces; call it on rank 0."""
    is_new = not header(run)
    if gives_way(settings.run, run, command):
        write_settings(settings, run, DELETING)
        clear(run)
        is_new = True
    # A run that is only evaluated keeps its settings: they say how it was trained.
    if is_new or not settings.evaluation.eval_only:
        write_settings(settings, run, f"{COMMAND}{command}\n")


def header(run: RunStorage) -> list[str]:
    """Return the comment lines at the top of settings.yaml; none if there is no file."""
    file = run / SETTINGS
    try:
        content = file.read() if file.is_remote else read_file(file.local)
    except FileNotFoundError:
        return []
    lines = content.decode(errors="replace").splitlines(keepends=True)
    return list(itertools.takewhile(lambda line: line.startswith("#"), lines))


def has_checkpoints(run: RunStorage) -> bool:
    """Return whether there are checkpoints, broken ones too."""
    return bool(checkpoints.candidates(run.local)) or checkpoints.has_quarantined(run)


def write_settings(settings: TrainSettings, run: RunStorage, state: str) -> None:
    """Write settings.yaml, which the same command accepts as its configuration."""
    # Without --overwrite: to train from this file again must not delete the run.
    content = SIGNATURE + state + to_yaml(with_changes(settings, {"run.overwrite": False}))
    (run / SETTINGS).write(content.encode())


def clear(run: RunStorage) -> None:
    """Delete what earlier runs wrote in out_dir, and nothing else; settings.yaml stays."""
    checkpoints.clear(run)
    for name in (METRICS, EVALUATIONS, CURVE, REPORT, ERRORS, WANDB_ID):
        (run / name).delete()
