"""What every launcher does around the loop: before it, in each worker, and after it.

First comes `runs.check`, where the user typed the command, before anything starts or is written.
`work` runs in every worker. `run_here` and `run_as_rank` are the launchers that need no other
library: this process, and the ranks that torchrun started.
"""

import contextlib
import functools
import hashlib
import threading
from collections.abc import Iterator

from yuzogpt import checkpoints, runs
from yuzogpt.checkpoints import remote
from yuzogpt.checkpoints.format import Checkpoint
from yuzogpt.checkpoints.pretrained import PUBLISHED, download
from yuzogpt.config import TrainSettings
from yuzogpt.console.terminal import complain, say
from yuzogpt.data.blocks import PreparedCorpus
from yuzogpt.errors import RunFailed, Stopped, UserError
from yuzogpt.report import loss_curve
from yuzogpt.runs import requirements
from yuzogpt.runs.event_log import (
    Listener,
    MetricsLog,
    append_record,
    last_record,
    read_records,
)
from yuzogpt.runs.stop_request import StopRequest, lost_steps, stop_source
from yuzogpt.runtime.device import choose_device
from yuzogpt.runtime.signals import (
    CTRL_C,
    StopSignals,
    announce_stop,
    end_at_once,
    interrupt,
)
from yuzogpt.runtime.watchdog import Watchdog
from yuzogpt.runtime.world import World
from yuzogpt.storage.lease import held_since, holder_of
from yuzogpt.storage.paths import as_typed
from yuzogpt.storage.run_storage import WORKER, RunStorage, open_storage
from yuzogpt.training.agreement import agree_on_start, open_same_corpus
from yuzogpt.training.hooks import LoopHooks, Report
from yuzogpt.training.loop import train
from yuzogpt.training.out_of_memory import check_no_rank_failed, explain_out_of_memory
from yuzogpt.training.progress import Display, format_loss, take_wandb_key
from yuzogpt.training.rendezvous import process_group

STALL_REPORT_TIMEOUT_S = 5.0  # storage that does not answer must not keep a hung process alive


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
    """Run one worker: open and verify the corpus, find the checkpoint to resume from, train.

    `command`: as in `runs.hold_run_dir`. `is_restarted`: whether a launcher starts a single worker
    again that ends because it hangs. Returns why the run stopped early, if it was asked to. A
    UserError of any rank is raised on all.
    """
    run = open_storage(settings.run.out_dir, WORKER)
    corpus = open_same_corpus(settings.data, world)
    with world.raise_on_all_ranks():
        if world.local_rank == 0:  # hashed once per node
            corpus.verify()
    check_directory_is_shared(run, world)
    check_no_rank_failed(world, run)
    session = RunSession(run, world, command, listener)
    resume = session.find_checkpoint(settings, corpus)
    if resume:
        settings = runs.with_recorded_start(settings, resume)
    elif settings.run.init_from in PUBLISHED:
        with world.raise_on_all_ranks():  # once per node, before the watchdog's timeout runs
            if world.local_rank == 0:
                download(settings.run.init_from)
    start = None if resume else agree_on_start(settings.run.init_from, world)
    with world.raise_on_all_ranks():
        requirements.check_world(settings.batch, world.size, resume)
    watchdog = Watchdog(world, settings.workers.hang_timeout_s, session.report_stall)
    with watchdog if world.size > 1 or is_restarted else contextlib.nullcontext():
        try:
            hooks = LoopHooks(run, report, session.check_still_holder, stop, watchdog)
            open_log = functools.partial(session.open_log, settings, resume)
            with explain_out_of_memory(settings, world, run):
                return train(settings, world, corpus, resume, start, open_log, hooks)
        finally:
            if world.local_rank == 0:
                remote.drop_local_tensors(run)
            session.close()


class RunSession:
    """A worker's part in a run: its checkpoint, its log, and whether it may write to out_dir."""

    def __init__(
        self, run: RunStorage, world: World, command: str, listener: Listener | None
    ) -> None:
        """`command`: as in `runs.hold_run_dir`."""
        self.run, self.world, self.command, self.listener = run, world, command, listener
        self.holder: str | None = None  # of the lease of out_dir, on rank 0
        self.quarantined: list[str] = []  # a notice for each corrupt checkpoint
        self.has_begun = threading.Event()
        self.log: MetricsLog | None = None

    def find_checkpoint(self, settings: TrainSettings, corpus: PreparedCorpus) -> Checkpoint | None:
        """Return the checkpoint to resume from, on every rank; None for a new run."""
        resume: Checkpoint | None = None
        with self.world.raise_on_all_ranks():
            if self.world.rank == 0:  # only rank 0 commits checkpoints
                self.holder = holder_of(self.run)
                self.command = self.command or self.holder or ""
                runs.download_run(self.run)
                checkpoints.sweep(self.run)
                if not runs.gives_way(settings.run, self.run, self.command):
                    resume = runs.find_resume(settings, corpus, self.run, self._quarantine)
        newest = self.world.broadcast(resume.directory.name if resume else None)
        if not newest:
            return None
        return remote.read_on_all_ranks(self.run / "checkpoints" / newest, self.world)

    def _quarantine(self, checkpoint: RunStorage, reason: str) -> None:
        now = checkpoints.quarantine(checkpoint)
        text = f"!!! checkpoint {checkpoint.name} is corrupt ({reason}): now {now}"
        self.quarantined.append(text)

    def open_log(self, settings: TrainSettings, resume: Checkpoint | None) -> MetricsLog | None:
        """Begin or resume the run in out_dir once all ranks are ready; return rank 0's log."""
        self.world.gather(None)  # a rank that could not load its weights does not get here
        if self.world.rank == 0:
            if runs.gives_way(settings.run, self.run, self.command):
                self.check_still_holder()
            runs.begin(settings, self.run, self.command)
            step, rows_seen = (resume.state.step, resume.state.rows_seen) if resume else (-1, 0)
            is_read_only = settings.evaluation.eval_only  # records after `step` are kept
            self.log = MetricsLog(
                self.run / runs.METRICS,
                None if is_read_only else step,
                self.listener,
                rows_seen,
                is_evaluated=not resume or "val_loss_estimate" in resume.state.metrics,
            )
            self.log.begun = held_since(self.run)
            for line in self.quarantined:
                self.log.write("notice", max(step, 0), text=line)
        self.world.gather(None)
        self.has_begun.set()
        return self.log

    def close(self) -> None:
        if self.log:
            self.log.close()

    def check_still_holder(self) -> None:
        """Raise RunFailed if another command writes to out_dir: this one's was killed.

        OSError if there is no lease: this rank's command writes it again if it still runs.
        """
        holder = holder_of(self.run)
        if holder is None and self.holder:
            raise OSError(f"{self.run.display_name}: nobody holds it, its lease is gone")
        if holder != self.holder:
            raise RunFailed(f"{self.run.display_name}: another command has taken over")

    def report_stall(self, line: str) -> None:
        """Print which rank hangs, and record it if the run has begun and storage answers."""
        thread = threading.Thread(target=self._report_stall, args=(f"!!! {line}",), daemon=True)
        thread.start()
        thread.join(STALL_REPORT_TIMEOUT_S)

    def _report_stall(self, line: str) -> None:
        complain(line)
        if self.has_begun.is_set():
            with contextlib.suppress(OSError):
                append_record(self.run / runs.METRICS, "failure", line)


def check_directory_is_shared(run: RunStorage, world: World) -> None:
    """Raise UserError on all ranks unless all see the out_dir that the launcher wrote to.

    The ranks read checkpoints there, and the launcher reads the metrics.
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


def run_here(run: runs.ResolvedRun) -> None:
    """Train in this process."""
    settings, key = run.settings, take_wandb_key(run.settings.log)
    choose_device(settings.device.device, World())  # fails before a file is written
    with (
        run.hold(),
        stop_requests(run.storage, World()) as stop,
        Display(settings, key) as display,
    ):
        reason = work(settings, World(), lambda *_: None, display, stop)
    conclude(run, reason)


def work_here(settings: TrainSettings, run: RunStorage, listener: Listener) -> str | None:
    """Be the only worker, in this process; return why the run stopped early, if so."""
    with stop_requests(run, World()) as stop:
        return work(settings, World(), lambda *_: None, listener, stop)


def run_as_rank(settings: TrainSettings) -> None:
    """Train as one of torchrun's ranks; `settings` are not checked yet."""
    world = World.of_torchrun()
    group = process_group(world, settings)
    with group as command, contextlib.ExitStack() as stack:
        open_same_corpus(settings.data, world)
        for turn in (world.local_rank == 0, world.local_rank > 0):  # blocks are read once per node
            with world.raise_on_all_ranks():
                if turn:
                    run = runs.check(settings, command)
        settings = run.settings
        if run.is_finished and not settings.evaluation.eval_only:
            if world.rank == 0:
                say(run.finished_line)
            return
        listener, key = None, take_wandb_key(settings.log)
        with world.raise_on_all_ranks():
            if world.rank == 0:
                stack.enter_context(run.hold())
                is_new = runs.gives_way(settings.run, run.storage, command)
                listener = stack.enter_context(Display(settings, key, is_new=is_new))
        stop = stack.enter_context(stop_requests(run.storage, world))
        reason = work(settings, world, lambda *_: None, listener, stop, command=command)
    if world.rank == 0:
        conclude(run, reason)


@contextlib.contextmanager
def stop_requests(run: RunStorage, world: World) -> Iterator[StopRequest]:
    """Yield this rank's request to stop: from SIGTERM, Ctrl-C, and on rank 0 a file in out_dir."""
    stop = StopRequest(*([stop_source(run)] if world.rank == 0 else []))

    def ask(reason: str) -> bool:
        if reason == CTRL_C and not stop.will_answer_soon():
            return False
        stop.set(reason)
        if reason == CTRL_C and world.rank == 0:
            announce_stop()
        return True

    def end(number: int) -> None:
        end_at_once(number, lambda: "" if world.rank else lost_steps(run, stop.step or 0))

    try:
        with StopSignals(ask, interrupt, end):
            yield stop
    finally:
        stop.close()


def stopped(run: RunStorage, reason: str, *, is_recorded: bool) -> Stopped:
    """Return what to raise for a run that was asked to stop; it says which step is kept."""
    (run / runs.METRICS).download(if_changed=True)
    record = last_record(run / runs.METRICS, "stop") if is_recorded else None
    what, status = ("interrupted", 130) if reason == CTRL_C else (f"stopped ({reason})", 143)
    if record and record["step"]:
        what += f" at step {record['step']}"
        kept = record.get("kept")
        if kept != record["step"]:  # its weights are not finite
            what += f", which is not kept{f'; step {kept} is' if kept else ''}"
        else:
            what += f": kept in {as_typed(run.display_name)}"
    return Stopped(f"{what}; the same command resumes it", status)


def conclude(run: runs.ResolvedRun, reason: str | None) -> None:
    """Draw the loss curve, and print the best checkpoint and how to sample from it.

    Raises Stopped if the run was asked to stop, for `reason`.
    """
    evaluation, name = run.settings.evaluation, run.settings.run.out_dir
    metrics = run.storage / runs.METRICS
    if reason:
        raise stopped(run.storage, reason, is_recorded=not evaluation.eval_only)
    metrics.download(if_changed=True)
    records = read_records(metrics.local)
    part = evaluation.val_part
    over = "over the whole split" if part == "whole" else f"of val_part={part}"
    if evaluation.eval_only:
        say(f"val loss {format_loss(records[-1]['val_loss'])} {over}")
        return
    finals = [record for record in records if record["kind"] == "final"]
    if not finals:
        raise RunFailed(f"{name}: trained to its end, but {runs.METRICS} was deleted meanwhile")
    final = finals[-1]
    curve = run.storage / runs.CURVE
    loss_curve.draw(records, curve.local)
    curve.upload()
    say(f"step {final['step']}: val loss {format_loss(final['val_loss'])} {over}")
    say(f"curves: {name}/{runs.CURVE}")
    best = f"{name}/checkpoints/step-{final['best_step']}"
    say(
        f"best checkpoint: {best} (val loss {format_loss(final['best_val_loss'])}); "
        f"sample from it: yuzogpt sample {as_typed(name)}"
    )
