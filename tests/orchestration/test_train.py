"""Ray Train: the same losses as without it, and what a user sees of its failures.

That one worker gives the bits of one process, check_quickstart.py holds.
"""

import contextlib
import os
import random
import re
import signal
import stat
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from ray.train.torch import TorchTrainer

from tests.conftest import tiny_settings
from tests.orchestration.clusters import newest_worker
from tests.training.worlds import (
    losses,
    records,
    run_world,
    wait_for_start,
    wait_for_step,
    wait_until,
    weights,
)
from yuzogpt import runs
from yuzogpt.config import with_changes
from yuzogpt.errors import RunFailed, Stopped, UserError
from yuzogpt.orchestration.cluster import connected
from yuzogpt.orchestration.train import failures
from yuzogpt.orchestration.train import trainer as orchestration_train
from yuzogpt.orchestration.train.single_node import single_node_trainer
from yuzogpt.orchestration.train.trainer import set_environment, train_connected
from yuzogpt.runs.stop_request import ask_to_stop
from yuzogpt.storage.run_storage import LocalStorage

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def embedded_ray():
    """One embedded Ray for the module."""
    set_environment()
    with connected("", 3):
        yield


def checked_run(corpus_dir, out_dir, *flags):
    return runs.check(tiny_settings(corpus_dir, out_dir, "--dropout=0.1", *flags))


def train_on_ray(run):
    with run.hold():
        train_connected(run)


def test_the_token_is_private(embedded_ray):
    token = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert stat.S_IMODE(token.parent.stat().st_mode) == 0o700
    assert os.environ["RAY_AUTH_MODE"] == "token"


def test_one_of_two_workers_killed_and_one_stopped_give_the_same_bits(
    embedded_ray, corpus_dir, tmp_path, capfd
):
    flags = ("--max_iters=300", "--eval_interval=25", "--num_workers=2", "--hang_timeout_s=5")
    on_ray = checked_run(corpus_dir, tmp_path / "ray", *flags)
    seconds: dict[str, float] = {}
    victims: dict[str, int] = {}
    faults = threading.Thread(
        target=disturb, args=(tmp_path / "ray", seconds, victims), daemon=True
    )
    faults.start()
    train_on_ray(on_ray)
    faults.join(60)
    print(f"\nseconds from a fault to the next step: {seconds}")  # benchmarks/soak.py has the bar
    run_world(2, checked_run(corpus_dir, tmp_path / "plain", *flags).settings)
    assert losses(tmp_path / "ray") == losses(tmp_path / "plain")
    assert weights(tmp_path / "ray", 300) == weights(tmp_path / "plain", 300)
    printed = capfd.readouterr().out
    started_anew = [start for start in records(tmp_path / "ray", "start") if start["step"] == 0]
    assert printed.count("weights: scratch") == len(started_anew)  # nothing is printed twice
    assert "best checkpoint: " in printed
    left = {path.name for path in (tmp_path / "ray").iterdir()}
    assert left == {"checkpoints", "errors.log", "loss.png", "metrics.jsonl", "settings.yaml"}
    killed, stopped = records(tmp_path / "ray", "failure")
    assert killed["text"].startswith(f"!!! worker {killed['rank']} failed")
    errors = (tmp_path / "ray" / "errors.log").read_text()
    dead = re.search(r"rank (\d): A worker health check failed.*?pid=(\d+)", errors, re.DOTALL)
    assert dead
    assert dead.groups() == (str(killed["rank"]), str(victims["SIGKILL"]))
    assert re.match(r"!!! worker [01] on .* sent no heartbeat", stopped["text"])
    assert len(records(tmp_path / "ray", "start")) == 3


def disturb(run: Path, seconds: dict[str, float], victims: dict[str, int]) -> None:
    """Kill a worker at a random step, then stop one of the next; note which, and take the time."""
    made = 0
    for sign in (signal.SIGKILL, signal.SIGSTOP):
        wait_for_step(run, made + random.randrange(10, 100))
        starts = len(records(run, "start"))
        began = time.time()
        victims[sign.name] = newest_worker()
        os.kill(victims[sign.name], sign)
        wait = threading.Event()
        while len(records(run, "start")) == starts:
            wait.wait(0.02)
        made = records(run, "start")[-1]["step"]
        wait_for_step(run, made + 1)
        first = next(record for record in records(run, "train") if record["step"] == made + 1)
        seconds[sign.name] = first["time"] - began


@pytest.fixture
def worker_that_stands_still(embedded_ray):
    """A worker that has answered once, and then got SIGSTOP."""
    import ray

    class Worker:
        def get_metadata(self):
            return os.getpid()

    worker = ray.remote(num_cpus=0)(Worker).remote()
    process = psutil.Process(ray.get(worker.get_metadata.remote(), timeout=60))
    process.suspend()
    yield worker, process
    ray.kill(worker)


def test_a_worker_that_dies_is_replaced_by_the_spare_which_slept(
    embedded_ray, corpus_dir, tmp_path, monkeypatch
):
    from yuzogpt.orchestration.train import warm_workers

    monkeypatch.setattr(warm_workers, "WARM_UP_AFTER_S", 0.0)
    run, spare, newest = tmp_path / "run", [], []

    def disturb() -> None:
        wait_for_start(run, 1, 1)
        spare.append(wait_until(asleep))
        os.kill(newest_worker(), signal.SIGKILL)
        wait_for_start(run, 2, 1)
        newest.append(newest_worker())
        ask_to_stop(LocalStorage(run), "seen enough")

    faults = threading.Thread(target=disturb, daemon=True)
    faults.start()
    with pytest.raises(Stopped, match="seen enough"):
        train_on_ray(checked_run(corpus_dir, run, "--max_iters=1000000", "--num_workers=1"))
    faults.join(10)
    assert newest == spare


def asleep() -> int:
    """Return an idle process of Ray's that waits for a lock; 0 if there is none."""
    waits = [line.split() for line in Path("/proc/locks").read_text().splitlines() if "->" in line]
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            is_idle = "ray::IDLE" in " ".join(process.cmdline())
            if is_idle and any(str(process.pid) in fields for fields in waits):
                return process.pid
    return 0


def test_spares_wait_for_no_worker_that_stands_still(worker_that_stands_still):
    """The controller calls this, and must not be held up by it."""
    from yuzogpt.orchestration.train.warm_workers import WARM_UP_AFTER_S, WarmWorkers

    worker, _ = worker_that_stands_still

    class Group:
        def execute_single_async(self, rank, fn):
            return worker.get_metadata.remote()

    class Status:
        errors = {}  # noqa: RUF012

    warm_workers = WarmWorkers()
    warm_workers.after_worker_group_training_start(Group())
    warm_workers.trains_since -= WARM_UP_AFTER_S + 1
    poll = threading.Thread(
        target=warm_workers.after_worker_group_poll_status, args=(Status(),), daemon=True
    )
    poll.start()
    poll.join(10)
    assert not poll.is_alive()
    assert warm_workers.group is None  # it does not try for ever


def test_a_resize_waits_for_no_worker_that_stands_still(worker_that_stands_still, tmp_path):
    """An only worker: no other names it, and none ends it."""
    from yuzogpt.orchestration.train.elastic import Elastic

    worker, process = worker_that_stands_still
    elastic = Elastic(LocalStorage(tmp_path), reply_timeout_s=2)
    elastic.workers = [worker]
    resize = threading.Thread(
        target=elastic.before_controller_execute_resize_decision, args=(None,), daemon=True
    )
    resize.start()
    resize.join(30)
    assert not resize.is_alive()
    (failure,) = records(tmp_path, "failure")
    assert failure["text"].startswith("!!! worker 0 gives no sign of life for ")
    assert not (tmp_path / runs.PAUSE).exists()
    process.wait(30)  # its CPU is free for the next


def test_a_resize_is_asked_for_until_that_can_be_written(embedded_ray, tmp_path, monkeypatch):
    """Workers that were not asked write no checkpoint; out_dir is a file here, for a while."""
    import ray

    from yuzogpt.orchestration.train import elastic

    class Worker:
        def get_metadata(self):
            return os.getpid()

    monkeypatch.setattr(elastic, "RETRY_INTERVAL_S", 0.1)
    run = tmp_path / "run"
    run.touch()
    resizing = elastic.Elastic(LocalStorage(run), reply_timeout_s=60)
    resizing.workers = [ray.remote(num_cpus=0)(Worker).remote()]
    tried = threading.Event()
    ask = elastic.ask_to_stop

    def watched(*arguments):
        is_requested = ask(*arguments)
        tried.set()
        return is_requested

    monkeypatch.setattr(elastic, "ask_to_stop", watched)
    resize = threading.Thread(
        target=resizing.before_controller_execute_resize_decision, args=(None,), daemon=True
    )
    resize.start()
    assert tried.wait(30)
    run.unlink()
    run.mkdir()
    wait_until((run / runs.PAUSE).exists)
    assert resize.is_alive()
    elastic.answer_pause(LocalStorage(run), 0)
    resize.join(30)
    assert not resize.is_alive()
    ray.kill(resizing.workers[0])


def test_a_worker_that_dies_at_start_leaves_room_for_the_next_and_what_these_see_is_one_line(
    embedded_ray, corpus_dir, tmp_path, monkeypatch
):
    """Two of three CPUs are held by the first workers: if they stay, the next find no place.

    These find a mistake that only workers see.
    """
    import ray

    class Killer(failures.KillGroupOnFailure):
        deaths = 1

        def after_worker_group_start(self, worker_group):
            super().after_worker_group_start(worker_group)
            if self.deaths:
                self.deaths -= 1
                worker = worker_group.get_workers()[1]
                os.kill(worker.metadata.pid, signal.SIGKILL)
                ray.get(worker.actor.get_metadata.remote())  # raises: as in Ray's own callbacks

    monkeypatch.setattr(failures, "KillGroupOnFailure", Killer)
    flags = ("--batch_size=1", "--gradient_accumulation_steps=1")
    chosen = checked_run(corpus_dir, tmp_path / "run", *flags)
    too_many = with_changes(chosen.settings, {"workers.num_workers": 2})
    chosen = replace(chosen, settings=too_many)  # unchecked
    ends: list[Exception] = []

    def train():
        try:
            train_on_ray(chosen)
        except Exception as end:
            ends.append(end)

    training = threading.Thread(target=train, daemon=True)
    training.start()
    training.join(90)
    assert not training.is_alive()
    (end,) = ends
    assert isinstance(end, UserError)
    assert "too small for 2 workers" in str(end)


def test_checkpoints_in_quick_succession_do_not_hold_up_the_end(embedded_ray, corpus_dir, tmp_path):
    """Ray's controller takes one report a second; there are some hundred."""
    flags = ("--max_iters=300", "--eval_interval=300", "--checkpoint_interval=1")
    train_on_ray(checked_run(corpus_dir, tmp_path / "run", *flags))
    ended = time.time()
    assert len(records(tmp_path / "run", "checkpoint")) > 100
    assert ended - records(tmp_path / "run", "final")[-1]["time"] < 6


def test_where_rays_private_names_differ_a_run_is_the_same(
    embedded_ray, corpus_dir, tmp_path, monkeypatch
):
    """The controller has a process of its own then."""
    monkeypatch.setitem(sys.modules, "ray.train.v2._internal.execution.scaling_policy", None)
    assert single_node_trainer() is TorchTrainer
    train_on_ray(checked_run(corpus_dir, tmp_path / "run", "--max_iters=5"))
    assert records(tmp_path / "run", "final")


def test_what_is_wrong_with_the_controller_is_written_down(
    embedded_ray, corpus_dir, tmp_path, monkeypatch
):
    def fail(*_):
        raise ZeroDivisionError("in a callback")

    monkeypatch.setattr(failures.KillGroupOnFailure, "after_worker_group_start", fail)
    with pytest.raises(RunFailed, match=r"in a callback.*errors\.log"):
        train_on_ray(checked_run(corpus_dir, tmp_path / "run", "--max_iters=5"))
    written = (tmp_path / "run" / runs.ERRORS).read_text()
    assert "Traceback" in written
    assert "ZeroDivisionError: in a callback" in written


def test_a_worker_that_hangs_is_named_without_rays_advice():
    from ray.train.v2._internal.exceptions import WorkerHealthCheckTimeoutError

    from yuzogpt.orchestration.causes import cause_of

    hung = "A worker health check has been hanging for 15.01 seconds. Marking it.\nWorker info: it"
    cause = cause_of(WorkerHealthCheckTimeoutError(hung))
    assert cause == "A worker health check has been hanging for 15.01 seconds"


def test_more_workers_than_cores_are_refused_here(embedded_ray, corpus_dir, tmp_path):
    chosen = checked_run(corpus_dir, tmp_path / "run", "--num_workers=4")
    with pytest.raises(UserError, match=r"this machine has 3 CPU\(s\)"):
        train_on_ray(chosen)


def test_a_run_gives_way_to_another_when_that_can_start(embedded_ray, corpus_dir, tmp_path):
    run = tmp_path / "run"
    train_on_ray(checked_run(corpus_dir, run, "--max_iters=2", "--num_workers=1"))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    flags = ("--overwrite", "--max_iters=3", "--seed=2")
    with pytest.raises(UserError, match="this machine has 0 GPU"):
        train_on_ray(checked_run(corpus_dir, run, *flags, "--device=cuda", "--num_workers=2"))
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    train_on_ray(checked_run(corpus_dir, run, *flags, "--num_workers=1"))
    assert [start["step"] for start in records(run, "start")] == [0]
    assert sorted(losses(run)) == [1, 2, 3]


def test_the_wandb_key_reaches_no_process_of_ray(corpus_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "canary")
    seen = []

    @contextlib.contextmanager
    def connected(address, cores, heavy_imports, library):
        seen.append(os.environ.get("WANDB_API_KEY"))
        yield

    handed_on = []
    monkeypatch.setattr(orchestration_train, "connected", connected)
    monkeypatch.setattr(
        orchestration_train, "train_connected", lambda run, key, exams: handed_on.append(key)
    )
    orchestration_train.run_on_ray(runs.check(tiny_settings(corpus_dir, tmp_path / "run")))
    assert (seen, handed_on) == ([None], ["canary"])
