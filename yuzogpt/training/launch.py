"""What every launcher does around the loop: before it, in each worker, and after it.

In: settings with absolute paths. Out: a finished run. `check` runs where the user typed the
command, before anything starts or is written; `work` runs in every worker; `run_here` is the
launcher that needs nothing else: this process, or the ranks that torchrun started.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from yuzogpt import checkpoints, runs
from yuzogpt.checkpoints import Checkpoint
from yuzogpt.config import TrainSettings
from yuzogpt.data.blocks import open_corpus
from yuzogpt.errors import UserError
from yuzogpt.files import write_durably
from yuzogpt.lease import Lease
from yuzogpt.metrics import Listener, MetricsLog, read_records
from yuzogpt.overrides import to_yaml
from yuzogpt.training import curves
from yuzogpt.training.display import Display
from yuzogpt.training.loop import Report, train
from yuzogpt.training.parallel import process_group
from yuzogpt.world import World


@contextlib.contextmanager
def writing(settings: TrainSettings) -> Iterator[Path]:
    """Hold out_dir for this command alone; with `--overwrite`, empty it first."""
    run = Path(settings.run.out_dir)
    with Lease(run):
        if settings.run.overwrite:
            runs.clear(run)
        write_durably(run / runs.SETTINGS, to_yaml(settings).encode())
        yield run


def work(settings: TrainSettings, world: World, report: Report, listener: Listener | None) -> None:
    """Do one worker's part: open and verify the corpus, find the checkpoint, train.

    A UserError of any rank is raised on all.
    """
    run = Path(settings.run.out_dir)
    with world.all_or_none():
        corpus = open_corpus(Path(settings.data.data_dir))
        if world.local_rank == 0:  # once a node
            corpus.verify()
        if settings.batch.global_rows < world.size:
            raise UserError(
                f"a global batch of {settings.batch.global_rows} rows is too small for "
                f"{world.size} workers; raise --batch_size"
            )
    broken: list[str] = []

    def set_aside(directory: Path, reason: str) -> None:
        moved = checkpoints.quarantine(directory)
        broken.append(f"!!! checkpoint {directory.name} is corrupt ({reason}): now {moved.name}")

    resume: Checkpoint | None = None
    with world.all_or_none():
        if world.rank == 0:
            resume = runs.find_resume(settings, corpus, set_aside)
    place = world.from_rank_0(str(resume.directory) if resume else None)
    if world.rank > 0 and place:
        resume = checkpoints.verify(Path(place))
    log: MetricsLog | None = None
    if world.rank == 0:
        step = resume.state.step if resume else -1
        log = MetricsLog(run / runs.METRICS, step, listener)
        for line in broken:
            log.write("notice", max(step, 0), text=line)
    try:
        train(settings, world, corpus, report, resume, log)
    finally:
        if log:
            log.close()


def run_here(settings: TrainSettings) -> None:
    """Train in this process, or as one of the ranks that torchrun started."""
    world = World.of_torchrun()
    with process_group(world, settings.device.device):
        if world.rank > 0:
            with world.all_or_none():  # rank 0 takes the lease
                pass
            work(settings, world, lambda *_: None, None)
            return
        with contextlib.ExitStack() as stack:
            with world.all_or_none():
                stack.enter_context(writing(settings))
            display = stack.enter_context(Display(settings))
            work(settings, world, lambda *_: None, display)
    conclude(settings)


def conclude(settings: TrainSettings) -> None:
    """Draw the curves, and say where the best checkpoint is and how to sample from it."""
    run = Path(settings.run.out_dir)
    records = read_records(run / runs.METRICS)
    final = [record for record in records if record["kind"] == "final"][-1]
    if settings.evaluation.eval_only:
        print(f"val loss {final['val_loss']:.4f} over the whole split")
        return
    curves.draw(records, run / runs.CURVE)
    print(f"step {final['step']}: val loss {final['val_loss']:.4f} over the whole split")
    print(f"curves: {run / runs.CURVE}")
    best = run / "checkpoints" / f"step-{final['best_step']}"
    print(
        f"best checkpoint: {best} (val loss {final['best_val_loss']:.4f}); "
        f"sample from it: yuzogpt sample --out_dir={run}"
    )
