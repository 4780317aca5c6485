"""Benchmarks as Ray tasks: a worker that is killed changes nothing."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from tests.conftest import REPOSITORY
from tests.evaluation.models import random_model, write_lambada, write_wikitext
from tests.evaluation.test_evaluate import command, results
from yuzogpt.cli import main
from yuzogpt.config import EvaluateSettings
from yuzogpt.errors import UserError
from yuzogpt.orchestration.evaluate import share_out


def workers(process):
    """Return the processes that compute shards now."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "ray::score_shard" in " ".join(child.cmdline()):
                found.append(child.pid)
    return found


@pytest.mark.slow
def test_a_killed_worker_changes_nothing(tmp_path):
    model = random_model(tmp_path / "run", n_layer=6, n_embd=192, n_head=4)
    write_lambada(tmp_path / "lambada_test.jsonl", 300)
    write_wikitext(tmp_path / "wikitext2_test.txt", 10)
    out_dir = tmp_path / "ray"
    process = subprocess.Popen(
        [sys.executable, "-m", "yuzogpt", *command(model, tmp_path, out_dir, "--num_workers=2")],
        cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    wait, deadline = threading.Event(), time.monotonic() + 120
    while len(list(out_dir.glob("shards/*/*.json"))) < 3 or not workers(process):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        wait.wait(0.02)
    os.kill(workers(process)[0], signal.SIGKILL)
    printed = process.communicate(timeout=120)[0]
    assert process.returncode == 0, printed
    main(command(model, tmp_path, tmp_path / "here", "--num_workers=0"))
    expected, found = results(tmp_path / "here"), results(out_dir)
    assert found["model"] == expected["model"]
    for task, values in expected["tasks"].items():
        for name, figure in values["figures"].items():
            other = found["tasks"][task]["figures"][name]
            assert other["counted"] == figure["counted"]
            assert other["value"] == pytest.approx(figure["value"], rel=1e-6)


@pytest.mark.parametrize(
    ("wanted", "gpus", "cores", "expected"),
    [
        ("auto", 0, [8], (1, {"num_cpus": 8}, 8)),
        ("auto", 0, [8, 8], (2, {"num_cpus": 8}, 8)),
        (1, 0, [8, 8], (1, {"num_cpus": 8}, 8)),
        (3, 0, [4, 4, 4, 4], (3, {"num_cpus": 4}, 4)),
        (6, 0, [16], (6, {"num_cpus": 2}, 2)),
        (2, 0, [8, 2], (2, {"num_cpus": 2}, 2)),  # either may be on the smaller node
        (9, 0, [2], (9, {"num_cpus": 1}, 1)),
        ("auto", 4, [64], (4, {"num_gpus": 1}, 0)),
        (2, 4, [64], (2, {"num_gpus": 1}, 0)),
    ],
)
def test_what_a_worker_asks_for_is_what_every_node_has(monkeypatch, wanted, gpus, cores, expected):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    settings = EvaluateSettings.model_validate({"workers": {"num_workers": wanted}})
    assert share_out(settings, gpus, cores) == expected


def test_omp_num_threads_is_heeded_and_threads_wins(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert share_out(EvaluateSettings(), 0, [8]) == (1, {"num_cpus": 8}, 3)
    settings = EvaluateSettings.model_validate({"device": {"threads": 2}})
    assert share_out(settings, 0, [8]) == (1, {"num_cpus": 8}, 2)


def test_a_gpu_that_ray_has_not_is_one_line():
    settings = EvaluateSettings.model_validate({"device": {"device": "cuda"}})
    with pytest.raises(UserError, match="Ray has no GPU; use --device=cpu"):
        share_out(settings, 0, [8])
