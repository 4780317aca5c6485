"""Ranks that were given different things say so, and train nothing."""

import os
import shutil
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.conftest import (
    REPOSITORY,
    TINY,
    make_text,
    prepare_char_corpus,
    tiny_settings,
)
from tests.training.worlds import exit_codes, records, start_world, train_here
from yuzogpt.errors import UserError


def two_nodes(*flags):
    """Run torchrun as two nodes of one rank each; return how each ended, and its yuzogpt lines."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"

    def run_node(own):
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=1"]
        command += ["--nnodes=2", "--rdzv_backend=c10d", f"--rdzv_endpoint={endpoint}"]
        command += ["--rdzv_conf=join_timeout=60,last_call_timeout=1", "-m", "yuzogpt.training"]
        result = subprocess.run(
            [*command, *TINY, *own],
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        said = [line for line in result.stderr.splitlines() if line.startswith("yuzogpt: ")]
        return "exitcode  : 2" in result.stderr, said

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(run_node, flags))


@pytest.mark.slow
def test_nodes_with_other_settings_say_which(corpus_dir, tmp_path):
    places = [f"--data_dir={corpus_dir}", f"--out_dir={tmp_path / 'run'}"]
    ended = two_nodes([*places, "--log_interval=3"], [*places, "--log_interval=3", "--beta1=0.8"])
    for is_mistake, lines in ended:
        assert is_mistake, ended
        (line,) = lines
        assert "optimizer.beta1: " in line
        assert all(f"{value} on rank " in line for value in (0.9, 0.8))
        assert socket.gethostname() in line
    assert not (tmp_path / "run").exists()


@pytest.fixture
def other_corpus(tmp_path):
    """A corpus of other text in the same characters."""
    (tmp_path / "t.txt").write_text(make_text(20_000, seed=9))
    return prepare_char_corpus(tmp_path / "t.txt", tmp_path / "corpus")


class Instead:
    """Gives rank 1 another value of a setting; mistakes go into a file, exit status 2."""

    def __init__(self, errors, section, **values):
        self.errors, self.section, self.values = errors, section, values

    def __call__(self, rank):
        """Be the fault of a rank."""
        from yuzogpt.training import launch

        real = launch.run_as_rank

        def run_as_rank(settings):
            if rank == 1:
                own = getattr(settings, self.section).model_copy(update=self.values)
                settings = settings.model_copy(update={self.section: own})
            try:
                real(settings)
            except UserError as error:
                with self.errors.open("a") as file:
                    file.write(f"{error}\n")
                raise SystemExit(2) from None

        launch.run_as_rank = run_as_rank


def test_ranks_with_other_corpora_train_nothing(corpus_dir, other_corpus, tmp_path):
    settings = tiny_settings(corpus_dir, tmp_path / "run", "--max_iters=3")
    instead = Instead(tmp_path / "errors", "data", data_dir=str(other_corpus))
    assert exit_codes(start_world(2, settings, instead)) == [2, 2]
    one, other = (tmp_path / "errors").read_text().splitlines()
    assert one == other
    assert f"rank 1 on {socket.gethostname()} has another corpus in {other_corpus}" in one
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_same_corpus_may_be_elsewhere(corpus_dir, tmp_path):
    shutil.copytree(corpus_dir, tmp_path / "copy")
    settings = tiny_settings(corpus_dir, tmp_path / "run", "--max_iters=3")
    elsewhere = Instead(tmp_path / "errors", "data", data_dir=str(tmp_path / "copy"))
    assert exit_codes(start_world(2, settings, elsewhere)) == [0, 0]


class BetterMeanwhile:
    """Puts a better checkpoint into the run that is started from, after rank 0 looked."""

    def __init__(self, run):
        self.run = run

    def __call__(self, rank):
        """Be the fault of a rank."""
        from yuzogpt.training import agreement

        real = agreement.resolve_model

        def resolve_model(name, *arguments):
            if rank == 1:
                aside = self.run / "aside"
                if aside.exists():
                    aside.rename(self.run / "checkpoints" / "step-20")
            return real(name, *arguments)

        agreement.resolve_model = resolve_model


@pytest.mark.slow
def test_all_ranks_start_from_the_checkpoint_that_rank_0_named(corpus_dir, tmp_path):
    start, run = tmp_path / "start", tmp_path / "run"
    flags = ("--eval_interval=10", "--keep_best=9", "--keep_last=9")
    train_here(tiny_settings(corpus_dir, start, "--max_iters=20", *flags))
    (start / "checkpoints" / "step-20").rename(start / "aside")
    settings = tiny_settings(corpus_dir, run, f"--init_from={start}", "--max_iters=2")
    assert exit_codes(start_world(2, settings, BetterMeanwhile(start))) == [0, 0]
    assert (start / "checkpoints" / "step-20").exists()
    (record,) = records(run, "start")
    assert record["weights"] == str(start / "checkpoints" / "step-10")
    assert len(record["weights_sha256"]) == 64


@pytest.mark.slow
def test_another_model_on_another_rank_is_refused(corpus_dir, tmp_path):
    for seed in (1, 2):
        out_dir = tmp_path / f"seed-{seed}"
        train_here(tiny_settings(corpus_dir, out_dir, "--max_iters=3", f"--seed={seed}"))
    flags = (f"--init_from={tmp_path / 'seed-1'}", "--max_iters=3")
    settings = tiny_settings(corpus_dir, tmp_path / "run", *flags)
    instead = Instead(tmp_path / "errors", "run", init_from=str(tmp_path / "seed-2"))
    assert exit_codes(start_world(2, settings, instead)) == [2, 2]
    assert f"other weights in {tmp_path / 'seed-2'}" in (tmp_path / "errors").read_text()
