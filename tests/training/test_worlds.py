"""The same run in worlds of 1, 2 and 3 ranks: same losses, and exact resuming.

For each world, real ranks train 100 steps, and again 50 and then, as new processes, the other 50;
with dropout, accumulation and several DDP buckets.
"""

import os
import socket
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY, TINY, tiny_settings, yuzogpt
from tests.training.worlds import losses, records, run_world, weights

pytestmark = pytest.mark.slow

DROPOUT = "--dropout=0.1"


@pytest.fixture(scope="module")
def runs(corpus_dir, tmp_path_factory):
    """Train in each world; return the directory that holds the runs."""
    root = tmp_path_factory.mktemp("runs")

    def train(size, out_dir, max_iters):
        settings = tiny_settings(corpus_dir, root / out_dir, DROPOUT, f"--max_iters={max_iters}")
        run_world(size, settings)

    for size in (1, 2, 3):
        train(size, f"{size}-whole", 100)
        train(size, f"{size}-parts", 50)
        train(size, f"{size}-parts", 100)
    return root


@pytest.mark.parametrize("size", [1, 2, 3])
def test_100_steps_are_50_and_50_bit_for_bit(runs, size):
    whole, parts = runs / f"{size}-whole", runs / f"{size}-parts"
    assert losses(whole) == losses(parts)
    assert sorted(losses(whole)) == list(range(1, 101))
    assert weights(whole, 100) == weights(parts, 100)
    assert records(whole, "final")[-1]["val_loss"] == records(parts, "final")[-1]["val_loss"]


def test_buckets_are_several(runs):
    # 0.02 MiB a bucket; the gradients of this model are several times that.
    size = len(weights(runs / "1-whole", 100)["model.safetensors"])
    assert size > 3 * 0.02 * 2**20


def test_worlds_agree(runs):
    one, two, three = (losses(runs / f"{size}-whole") for size in (1, 2, 3))
    assert one[100] < 0.7 * one[1]  # it learns
    for step in range(1, 51):
        assert two[step] == pytest.approx(one[step], abs=1e-4)
        assert three[step] == pytest.approx(one[step], abs=1e-4)


def test_the_command_in_this_process_agrees_bit_for_bit(runs, corpus_dir, tmp_path):
    places = [f"--data_dir={corpus_dir}", f"--out_dir={tmp_path / 'run'}"]
    result = yuzogpt("train", *TINY, *places, DROPOUT, "--num_workers=0", "--max_iters=100")
    assert result.returncode == 0, result.stderr
    assert losses(tmp_path / "run") == losses(runs / "1-whole")
    assert weights(tmp_path / "run", 100) == weights(runs / "1-whole", 100)
    assert (tmp_path / "run" / "loss.png").stat().st_size > 10_000
    assert "sample from it: yuzogpt sample " in result.stdout


def test_torchrun_on_two_nodes_agrees_bit_for_bit(runs, corpus_dir, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def start_node(rank):
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=1"]
        command += ["--nnodes=2", f"--node_rank={rank}", "--master_addr=127.0.0.1"]
        command += [f"--master_port={port}", "-m", "yuzogpt.training", *TINY, DROPOUT]
        command += [f"--data_dir={corpus_dir}", f"--out_dir={tmp_path / 'run'}", "--max_iters=100"]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        return subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    nodes = [start_node(0), start_node(1)]
    outputs = [node.communicate(timeout=120) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert outputs[0][0].count("model: ") == 1
    assert outputs[1][0] == ""  # nothing is printed twice
    assert losses(tmp_path / "run") == losses(runs / "2-whole")
    assert weights(tmp_path / "run", 100) == weights(runs / "2-whole", 100)
