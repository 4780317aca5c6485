"""What every launcher does around the loop: before it, in each worker, and after it.

In: settings with absolute paths. Out: a finished run. `runs.check` comes first, where the user
typed the command, before anything starts or is written; `work` runs in every worker; `run_here`
and `run_as_rank` are the launchers that need nothing else: this process, and the ranks that
torchrun started.
"""

import contextlib
import hashlib
import shlex
import threading
from collections.abc import Iterator

from yuzogpt import checkpoints, runs
from yuzogpt.checkpoints import remote
from yuzogpt.checkpoints.format import Checkpoint
from yuzogpt.checkpoints.pretrained import PUBLISHED, download
from yuzogpt.config import TrainSettings
from yuzogpt.console.terminal import complain, say
from yuzogpt.errors import RunFailed, Stopped, UserError
from yuzogpt.report import loss_curve
from yuzogpt.runs import requirements
from yuzogpt.runs.event_log import Listener, MetricsLog, append_record, read_records
from yuzogpt.runs.stop_request import StopRequest, stop_source
from yuzogpt.runtime.device import choose_device
from yuzogpt.runtime.signals import DeferredKeyboardInterrupt, on_sigterm
from yuzogpt.runtime.watchdog import Watchdog
from yuzogpt.runtime.world import World
from yuzogpt.storage.lease import holder_of
from yuzogpt.storage.run_storage import WORKER, RunStorage, open_storage
from yuzogpt.training.agreement import agree_on_start, open_same_corpus
from yuzogpt.training.hooks import LoopHooks, Report
from yuzogpt.training.loop import train
from yuzogpt.training.out_of_memory import explained, fail_if_a_rank_failed
from yuzogpt.training.progress import Display, number, take_wandb_key
from yuzogpt.training.rendezvous import process_group

TOLD_WITHIN = 5.0  # seconds; storage that does not answer must not keep a hung process alive


def work(
    settings: TrainSettings,
    world: World,
    report: Report,
    listener: Listener | None,
    stop: StopRequest,
    *,
    command: str = "",
    is_restarted: bool = False,
) -> str | None:
    """Do one worker's part: open and verify the corpus, find the checkpoint, train.

    `command`: as in `runs.hold_run_dir`. `is_restarted`: whether an only worker is started again
    when it ends because it stands still. Returns why the run stopped before its end, if it was
    asked to. A UserError of any rank is raised on all.
    """
    run = open_storage(settings.run.out_dir, WORKER)
    corpus = open_same_corpus(settings, world)
    with world.raise_on_all_ranks():
        if world.local_rank == 0:  # hashed once a node
            corpus.verify()
    check_directory_is_shared(run, world)
    fail_if_a_rank_failed(world, run)
    broken: list[str] = []

    def quarantine(checkpoint: RunStorage, reason: str) -> None:
        now = checkpoints.quarantine(checkpoint)
        broken.append(f"!!! checkpoint {checkpoint.name} is corrupt ({reason}): now {now}")

    resume: Checkpoint | None = None
    holder = None
    with world.raise_on_all_ranks():
        if world.rank == 0:  # it alone commits checkpoints
            holder = holder_of(run)
            command = command or holder or ""
            runs.download_run(run)
            checkpoints.sweep(run)
            if not runs.gives_way(settings, run, command):
                resume = runs.find_resume(settings, corpus, run, quarantine)
    newest = world.broadcast(resume.directory.name if resume else None)
    if newest:
        resume = remote.read_on_all_ranks(run / "checkpoints" / newest, world)
        settings = runs.with_recorded_start(settings, resume)
    elif settings.run.init_from in PUBLISHED:
        with world.raise_on_all_ranks():  # once a node, before the watchdog counts the seconds
            if world.local_rank == 0:
                download(settings.run.init_from)
    start = None if resume else agree_on_start(settings, world)
    with world.raise_on_all_ranks():
        requirements.check_world(settings, world.size, resume)
    ending = contextlib.ExitStack()
    is_begun = threading.Event()

    def begin() -> MetricsLog | None:
        world.gather(None)  # a rank that could not load its weights is not here
        log = None
        if world.rank == 0:
            if runs.gives_way(settings, run, command):
                refuse_other(run, holder)
            runs.begin(settings, run, command)
            step, rows_seen = (resume.state.step, resume.state.rows_seen) if resume else (-1, 0)
            is_read = settings.evaluation.eval_only  # what is evaluated stays as it is
            log = MetricsLog(
                run / runs.METRICS,
                None if is_read else step,
                listener,
                rows_seen,
                is_evaluated=not resume or "val_loss_estimate" in resume.state.metrics,
            )
            ending.callback(log.close)
            for line in broken:
                log.write("notice", max(step, 0), text=line)
        world.gather(None)
        is_begun.set()
        return log

    def tell(line: str) -> None:
        arguments = (run if is_begun.is_set() else None, line)
        telling = threading.Thread(target=tell_of_stall, args=arguments, daemon=True)
        telling.start()
        telling.join(TOLD_WITHIN)

    watchdog = Watchdog(world, settings.workers.hang_timeout, tell)
    with watchdog if world.size > 1 or is_restarted else contextlib.nullcontext():
        try:
            outside = LoopHooks(run, report, lambda: refuse_other(run, holder), stop, watchdog)
            with explained(settings, world, run):
                return train(settings, world, corpus, resume, start, begin, outside)
        finally:
            if world.local_rank == 0:
                remote.drop_local_tensors(run)
            ending.close()


def tell_of_stall(run: RunStorage | None, line: str) -> None:
    """Say which rank stands still, and write it down in a run that has begun, if that goes."""
    complain(f"!!! {line}")
    if run:
        with contextlib.suppress(OSError):
            append_record(run / runs.METRICS, "failure", f"!!! {line}")


def refuse_other(run: RunStorage, holder: str | None) -> None:
    """Raise RunFailed if out_dir has another writer now: this one's command was killed.

    OSError if that cannot be told: the command makes a lease that was removed anew.
    """
    found = holder_of(run)
    if found is None and holder:
        raise OSError(f"{run.display_name}: nobody holds it, its lease is gone")
    if found != holder:
        raise RunFailed(f"{run.display_name}: another command has taken over")


def check_directory_is_shared(run: RunStorage, world: World) -> None:
    """Raise UserError on all ranks unless all see the out_dir that the launcher wrote to.

    They will read checkpoints there, and the launcher the metrics.
    """
    seen = holder_of(run)
    if seen is None:
        with contextlib.suppress(FileNotFoundError):
            seen = hashlib.sha256((run / runs.SETTINGS).read()).hexdigest()
    expected = world.broadcast(seen)
    with world.raise_on_all_ranks():
        if seen is None or seen != expected:
            raise UserError(
                f"--out_dir={run.display_name}: not the same directory on every node; choose "
                "one on storage that all nodes share"
            )


def run_here(settings: TrainSettings) -> None:
    """Train in this process."""
    key = take_wandb_key(settings.log)
    choose_device(settings.device.device, World())  # a mistake here shows before a file is written
    with runs.hold_run_dir(settings) as run, Display(settings, key) as display:
        reason = work_here(settings, run, display)
    conclude(settings, reason)


def work_here(settings: TrainSettings, run: RunStorage, listener: Listener) -> str | None:
    """Be the only worker, in this process; return why the run stopped before its end, if so."""
    with stopping(run, World()) as stop:
        return work(settings, World(), lambda *_: None, listener, stop)


def run_as_rank(settings: TrainSettings) -> None:
    """Train as one of the ranks that torchrun started; the settings are not checked yet."""
    world = World.of_torchrun()
    group = process_group(world, settings)
    with group as command, contextlib.ExitStack() as stack:
        open_same_corpus(settings, world)
        for turn in (world.local_rank == 0, world.local_rank > 0):  # blocks are read once a node
            with world.raise_on_all_ranks():
                if turn:
                    settings, resume = runs.check(settings, command)
        if runs.is_finished(settings, resume) and not settings.evaluation.eval_only:
            if world.rank == 0:
                say(runs.finished_line(settings))
            return
        listener, key = None, take_wandb_key(settings.log)
        with world.raise_on_all_ranks():
            if world.rank == 0:
                run = stack.enter_context(runs.hold_run_dir(settings, command))
                is_new = runs.gives_way(settings, run, command)
                listener = stack.enter_context(Display(settings, key, is_new=is_new))
        stop = stack.enter_context(stopping(runs.open_run(settings), world))
        reason = work(settings, world, lambda *_: None, listener, stop, command=command)
    if world.rank == 0:
        conclude(settings, reason)


@contextlib.contextmanager
def stopping(run: RunStorage, world: World) -> Iterator[StopRequest]:
    """Yield what asks this rank's loop to stop: SIGTERM, and on rank 0 a file in out_dir."""
    with DeferredKeyboardInterrupt() as interruption:
        stop = StopRequest(interruption, *([stop_source(run)] if world.rank == 0 else []))
        try:
            with on_sigterm(lambda: stop.set("SIGTERM")):
                yield stop
        finally:
            stop.close()


def conclude(settings: TrainSettings, reason: str | None) -> None:
    """Draw the curves, and say where the best checkpoint is and how to sample from it.

    Stopped if the run was asked to stop, for `reason`.
    """
    run, name = runs.open_run(settings), settings.run.out_dir
    metrics = run / runs.METRICS
    if reason:
        stops = [record for record in read_records(metrics.local) if record["kind"] == "stop"]
        has_none = settings.evaluation.eval_only or (stops and stops[-1]["step"] == 0)
        what = f"stopped ({reason}){'' if has_none else ' with a checkpoint'}"
        raise Stopped(f"{what}; the same command goes on")
    metrics.download(if_changed=True)
    records = read_records(metrics.local)
    part = settings.evaluation.val_part
    over = "over the whole split" if part == "whole" else f"of val_part={part}"
    if settings.evaluation.eval_only:
        say(f"val loss {number(records[-1]['val_loss'])} {over}")
        return
    finals = [record for record in records if record["kind"] == "final"]
    if not finals:
        raise RunFailed(f"{name}: trained to its end, but {runs.METRICS} was removed meanwhile")
    final = finals[-1]
    curve = run / runs.CURVE
    loss_curve.draw(records, curve.local)
    curve.upload()
    say(f"step {final['step']}: val loss {number(final['val_loss'])} {over}")
    say(f"curves: {name}/{runs.CURVE}")
    best = f"{name}/checkpoints/step-{final['best_step']}"
    say(
        f"best checkpoint: {best} (val loss {number(final['best_val_loss'])}); "
        f"sample from it: yuzogpt sample --out_dir={shlex.quote(name)}"
    )
