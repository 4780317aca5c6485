"""`--overwrite`: what it may delete, when it does, and what is left where it does not."""

import os
import shutil
import subprocess
import sys

import psutil
import pytest

from tests.conftest import REPOSITORY, TINY, tiny_settings, yuzogpt
from tests.training.worlds import records, train_here, wait_for_start
from tests.waiting import wait_until
from yuzogpt import checkpoints, runs
from yuzogpt.cli import exit_status
from yuzogpt.errors import UserError
from yuzogpt.storage.run_storage import LocalStorage


def tree(directory):
    """Return every file below a directory, with its content."""
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def old_run(corpus_dir, tmp_path_factory):
    """A finished run. Copy it before it is changed."""
    out_dir = tmp_path_factory.mktemp("old") / "run"
    train_here(tiny_settings(corpus_dir, out_dir, "--max_iters=4", "--eval_interval=2"))
    return out_dir


@pytest.mark.parametrize(
    ("out_dir", "start"),
    [("run", "link"), ("link", "run"), ("run", "other/../run"), ("run", "link/checkpoints/step-4")],
)
def test_what_a_run_starts_from_is_known_whatever_its_path(
    old_run, corpus_dir, tmp_path, out_dir, start
):
    (tmp_path / "run").symlink_to(old_run)
    (tmp_path / "link").symlink_to(tmp_path / "run")
    (tmp_path / "other").mkdir()
    flags = ("--overwrite", f"--init_from={tmp_path / start}")
    with pytest.raises(UserError, match="--overwrite would delete"):
        runs.check(tiny_settings(corpus_dir, tmp_path / out_dir, *flags))


@pytest.mark.parametrize("flag", ["--overwrite", "--overwrite=False"])
@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "loss.png", "errors.log", "stop", "checkpoints/step-3/weights.bin"]
)
def test_a_file_of_the_users_under_a_name_of_ours_is_refused(corpus_dir, tmp_path, name, flag):
    run = tmp_path / "run"
    (run / name).parent.mkdir(parents=True)
    (run / name).write_text('{"kind": "theirs", "step": 1}\n')
    before = tree(run)
    with pytest.raises(UserError, match=r"its \S+ is not of a run; choose another"):
        runs.check(tiny_settings(corpus_dir, run, flag))
    assert tree(run) == before


def test_settings_that_are_no_file_are_refused_at_once(corpus_dir, tmp_path):
    os.mkfifo(tmp_path / "settings.yaml")
    with pytest.raises(UserError, match="not a regular file"):
        runs.check(tiny_settings(corpus_dir, tmp_path))


def test_a_run_that_lost_its_settings_goes_on(old_run, corpus_dir, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(old_run, run)
    (run / runs.SETTINGS).unlink()
    train_here(tiny_settings(corpus_dir, run, "--max_iters=6", "--eval_interval=2"))
    assert [start["step"] for start in records(run, "start")] == [0, 4]


def under_torchrun(*flags):
    """Start it as the only rank of torchrun's, which starts it again twice."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max_restarts=2"]
    return subprocess.Popen(
        [*torchrun, "--nproc_per_node=1", "-m", "yuzogpt.training", *TINY, *flags],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def places(corpus_dir, out_dir):
    return [f"--data_dir={corpus_dir}", f"--out_dir={out_dir}"]


@pytest.mark.slow
def test_a_run_is_whole_until_the_new_ones_weights_are_loaded(
    old_run, corpus_dir, pretrained, tmp_path
):
    run, start = tmp_path / "run", tmp_path / "hf"
    shutil.copytree(old_run, run)
    shutil.copytree(pretrained, start)
    content = (start / "model.safetensors").read_bytes()
    (start / "model.safetensors").write_bytes(content[:-4])  # found when it is read
    before = tree(run)
    flags = [flag for flag in TINY if not flag.startswith(("--n_", "--block_size"))]
    flags += [*places(corpus_dir, run), "--overwrite", f"--init_from={start}"]
    result = yuzogpt("train", *flags, "--num_workers=0")
    assert result.returncode != 0
    assert "safetensors" in result.stderr.lower()
    assert tree(run) == before


def test_a_command_killed_while_it_deletes_a_run_leaves_none(old_run, corpus_dir, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(old_run, run)
    settings = tiny_settings(corpus_dir, run, "--max_iters=4", "--eval_interval=2")
    runs.write_settings(settings, LocalStorage(run), runs.DELETING)
    shutil.rmtree(run / "checkpoints" / "step-4")
    resume = runs.check(settings).resume
    assert resume is None  # not the old run's step 2
    train_here(settings)
    assert [start["step"] for start in records(run, "start")] == [0]


@pytest.mark.slow
def test_torchrun_with_one_rank_overwrites_once(old_run, corpus_dir, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(old_run, run)
    flags = ["--max_iters=100000", "--eval_interval=10", "--seed=7", "--overwrite"]
    agent = under_torchrun(*places(corpus_dir, run), *flags)
    wait_until(lambda: "seed: 7" in (run / "settings.yaml").read_text(), agent)
    wait_for_start(run, 1, 20)
    wait_until(lambda: any(map(checkpoints.step_of, checkpoints.candidates(run))), agent)
    (rank,) = psutil.Process(agent.pid).children()
    rank.kill()
    wait_for_start(run, 2, 1)
    (run / runs.STOP).write_text("enough for today")
    output, _ = agent.communicate(timeout=60)
    assert agent.returncode == 0, output
    first, second = records(run, "start")
    assert first["step"] == 0 < 10 <= second["step"]


@pytest.mark.parametrize("inside", ["checkpoints", "checkpoints/step-20", "checkpoints/a/b"])
def test_nothing_is_put_where_a_run_deletes(old_run, corpus_dir, inside):
    with pytest.raises(UserError, match="lies in the checkpoints of"):
        runs.check(tiny_settings(corpus_dir, old_run / inside))
    exported = ["export", str(old_run), "--to=huggingface", str(old_run / inside / "hf")]
    assert exit_status(exported) == 2


def test_a_corpus_is_no_place_for_a_run(corpus_dir):
    with pytest.raises(UserError, match="holds a corpus"):
        runs.check(tiny_settings(corpus_dir, corpus_dir))
