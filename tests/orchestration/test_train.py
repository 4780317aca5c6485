"""Ray Train: the same losses as without it, and what a user sees of its failures.

That one worker gives the bits of one process, check_quickstart.py holds.
"""

import contextlib
import os
import stat
import threading
from pathlib import Path

import psutil
import pytest

from tests.conftest import tiny_settings
from tests.training.worlds import losses, records, run_world, weights
from yuzogpt import runs
from yuzogpt.config import WorkerSettings
from yuzogpt.errors import UserError
from yuzogpt.orchestration import train as orchestration_train
from yuzogpt.orchestration.cluster import connected
from yuzogpt.orchestration.train import FASTER_START, train_connected

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def embedded_ray():
    """One embedded Ray for the module."""
    os.environ.update(FASTER_START)
    with connected("", 3):
        yield


def settings_for(corpus_dir, out_dir, *flags):
    return runs.check(tiny_settings(corpus_dir, out_dir, "--dropout=0.1", *flags))[0]


def train_on_ray(settings):
    with runs.writing(settings):
        train_connected(settings)


def test_the_token_is_private(embedded_ray):
    token = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert stat.S_IMODE(token.parent.stat().st_mode) == 0o700
    assert os.environ["RAY_AUTH_MODE"] == "token"


def test_two_workers_one_killed_give_the_same_bits(embedded_ray, corpus_dir, tmp_path, capfd):
    flags = ("--max_iters=200", "--eval_interval=20", "--num_workers=2")
    on_ray = settings_for(corpus_dir, tmp_path / "ray", *flags)
    killed = threading.Event()
    killer = threading.Thread(target=kill_a_worker, args=(tmp_path / "ray", killed), daemon=True)
    killer.start()
    train_on_ray(on_ray)
    killer.join(60)
    assert killed.is_set()
    run_world(2, settings_for(corpus_dir, tmp_path / "plain", *flags))
    assert losses(tmp_path / "ray") == losses(tmp_path / "plain")
    assert weights(tmp_path / "ray", 200) == weights(tmp_path / "plain", 200)
    printed = capfd.readouterr().out
    assert printed.count("weights: scratch") == 1  # nothing is printed twice
    assert "best checkpoint: " in printed
    left = {path.name for path in (tmp_path / "ray").iterdir()}
    assert left == {"checkpoints", "errors.log", "loss.png", "metrics.jsonl", "settings.yaml"}
    notices = [record["text"] for record in records(tmp_path / "ray", "notice")]
    assert any("failed" in text for text in notices)
    assert any(text.startswith("resuming at step") for text in notices)


def kill_a_worker(run: Path, killed: threading.Event) -> None:
    """Send SIGKILL to a training worker once the run has a checkpoint."""
    wait = threading.Event()
    while not list((run / "checkpoints").glob("step-*")):
        wait.wait(0.02)
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "RayTrainWorker" in " ".join(process.cmdline()):
                process.kill()
                killed.set()
                return


def test_mistakes_that_only_workers_see_are_one_line(embedded_ray, corpus_dir, tmp_path):
    chosen = settings_for(
        corpus_dir,
        tmp_path / "run",
        "--batch_size=1",
        "--gradient_accumulation_steps=1",
    )
    chosen = chosen.model_copy(update={"workers": WorkerSettings(num_workers=2)})  # unchecked
    with pytest.raises(UserError, match="too small for 2 workers"):
        train_on_ray(chosen)


def test_more_workers_than_cores_are_refused_here(embedded_ray, corpus_dir, tmp_path):
    chosen = settings_for(corpus_dir, tmp_path / "run", "--num_workers=4")
    with pytest.raises(UserError, match=r"this machine has 3 CPU\(s\)"):
        train_on_ray(chosen)


def test_the_wandb_key_reaches_no_process_of_ray(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "canary")
    seen = []

    @contextlib.contextmanager
    def connected(address, cores, heavy_imports):
        seen.append(os.environ.get("WANDB_API_KEY"))
        yield

    handed_on = []
    monkeypatch.setattr(orchestration_train, "connected", connected)
    monkeypatch.setattr(
        orchestration_train, "train_connected", lambda settings, key: handed_on.append(key)
    )
    orchestration_train.run_on_ray(tiny_settings(tmp_path, tmp_path / "run"))
    assert (seen, handed_on) == ([None], ["canary"])
