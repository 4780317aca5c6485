"""`--eval_tasks`: checkpoints are evaluated on benchmarks while training continues."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, TINY, yuzogpt
from tests.evaluation.models import write_lambada
from tests.orchestration.clusters import started
from tests.training.worlds import records, wait_for_start
from yuzogpt.checkpoints.locations import with_absolute_paths
from yuzogpt.config import TrainSettings
from yuzogpt.orchestration.train.validation import free_cores_on_a_node

pytestmark = pytest.mark.slow

FLAGS = (
    "--num_workers=1", "--eval_tasks=lambada", "--eval_interval=20", "--max_iters=40",
    "--eval_iters=1", "--warm_spare_workers=False",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    write_lambada(folder / "lambada_test.jsonl", 20)
    return folder


def arguments(corpus, folder, out_dir, *flags):
    return ["train", *TINY, *FLAGS, f"--data_dir={corpus}", f"--benchmark_dir={folder}",
            f"--out_dir={out_dir}", *flags]  # fmt: skip


COMMAND = "from yuzogpt.cli import run\nrun()"


def start(*args, code=COMMAND, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments(*args)], env={**os.environ, **environment},
        cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def evaluations(out_dir):
    lines = (out_dir / "evaluations.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines if line]


def test_every_evaluation_has_its_figures(gpt2_corpus_dir, folder, tmp_path):
    process = start(gpt2_corpus_dir, folder, tmp_path / "run")
    printed, errors = process.communicate(timeout=180)
    assert process.returncode == 0, errors
    found = evaluations(tmp_path / "run")
    assert [(one["kind"], one["step"]) for one in found] == [
        ("tasks", 20), ("tasks", 40),
    ]  # fmt: skip
    assert f"step 40: lambada perplexity {found[1]['lambada perplexity']:.4g}" in printed
    # The same figures as of the checkpoint itself.
    checkpoint = tmp_path / "run" / "checkpoints" / "step-40"
    command = [
        "evaluate", str(checkpoint), "--tasks=lambada", f"--benchmark_dir={folder}",
        f"--out_dir={tmp_path / 'results'}", "--num_workers=0", "--threads=1", "--device=cpu",
    ]  # fmt: skip
    assert yuzogpt(*command).returncode == 0
    results = json.loads((tmp_path / "results" / "results.json").read_text())
    figures = results["tasks"]["lambada"]["figures"]
    assert found[1]["lambada perplexity"] == pytest.approx(figures["perplexity"]["value"], rel=1e-4)
    shown = yuzogpt("report", str(tmp_path / "run"))
    assert "Benchmarks" in shown.stdout


def test_a_disk_that_takes_nothing_of_rays_ends_no_run(gpt2_corpus_dir, folder, tmp_path):
    """Ray Train writes its own state at each report; a folder of that name is in its way here."""
    run = tmp_path / "run"
    process = start(gpt2_corpus_dir, folder, run)
    wait_for_start(run, 1, 1)
    (run / "checkpoint_manager_snapshot.json" / "in its way").mkdir(parents=True)
    _, errors = process.communicate(timeout=180)
    assert process.returncode == 0, errors
    assert [one["step"] for one in evaluations(run)] == [20, 40]


# The command, with a task that kills the process that computes it, as a lack of memory would.
DEADLY = """
import os, signal
from dataclasses import replace
from yuzogpt.evaluation.benchmarks.tasks import TASKS

def deadly(path, options, read=TASKS["lambada"].protocols["paper"]):
    die = lambda scores: os.kill(os.getpid(), signal.SIGKILL)
    return replace(read(path, options), compute_metrics=die)

TASKS["lambada"].protocols["paper"] = deadly
"""


def test_an_evaluation_that_dies_costs_its_figure(gpt2_corpus_dir, folder, tmp_path):
    """On nodes of which none has all that the workers leave free."""
    with started(1, 2) as cluster:
        process = start(
            gpt2_corpus_dir, folder, tmp_path / "run", "--max_iters=20",
            code=DEADLY + COMMAND, RAY_ADDRESS=cluster.address, RAY_AUTH_MODE="disabled",
        )  # fmt: skip
        try:
            _, errors = process.communicate(timeout=120)
        finally:
            process.kill()
    assert process.returncode == 0, errors
    (notice,) = evaluations(tmp_path / "run")
    assert (notice["kind"], notice["step"]) == ("notice", 20)
    assert notice["text"].startswith("!!! step 20 was not evaluated on lambada (")


@pytest.mark.parametrize(
    ("cores", "taken", "free"),
    [([8], 2, 6), ([2, 2], 1, 2), ([2, 2], 2, 1), ([1, 1, 1], 1, 1), ([1, 1], 2, 0),
     ([8, 2], 3, 5), ([4], 9, 0), ([], 1, 0)],
)  # fmt: skip
def test_what_one_node_has_free_wherever_workers_are(cores, taken, free):
    assert free_cores_on_a_node(cores, taken) == free


def test_a_run_that_is_stopped_does_not_wait_for_its_figures(gpt2_corpus_dir, tmp_path):
    """Thousands of passages would take minutes."""
    write_lambada(tmp_path / "lambada_test.jsonl", 5_000)
    out_dir = tmp_path / "run"
    process = start(gpt2_corpus_dir, tmp_path, out_dir, "--max_iters=100000")
    wait_for_start(out_dir, 1, 25)  # its first evaluation is over, and the figures are on their way
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143, errors
    assert records(out_dir, "stop")
    texts = [record["text"] for record in evaluations(out_dir)]
    assert texts[0].startswith("!!! step 20 was not evaluated on lambada")


def test_where_the_files_are_is_known_from_anywhere():
    settings = TrainSettings.model_validate({"evaluation": {"benchmark_dir": "~/files"}})
    located = with_absolute_paths(settings)
    assert located.evaluation.benchmark_dir == str(Path.home() / "files")


def test_mistakes_before_ray_starts(corpus_dir, gpt2_corpus_dir, folder, tmp_path):
    (tmp_path / "lambada_test.jsonl").touch()
    (tmp_path / "nothing").mkdir()
    for corpus, flags, message in (
        (gpt2_corpus_dir, ("--eval_tasks=lambda",), "did you mean lambada?"),
        (gpt2_corpus_dir, ("--num_workers=0",), "--num_workers=1 or more"),
        (
            gpt2_corpus_dir,
            (f"--benchmark_dir={tmp_path}/nothing",),
            "lambada_test.jsonl is missing",
        ),
        (
            gpt2_corpus_dir,
            (f"--benchmark_dir={tmp_path}",),
            "lambada_test.jsonl has nothing to score",
        ),
    ):
        result = yuzogpt(*arguments(corpus, folder, tmp_path / "run", *flags))
        assert result.returncode == 2, result.stderr
        assert message in result.stderr
        assert len(result.stderr.splitlines()) == 1
        assert not (tmp_path / "run").exists()
    process = start(corpus_dir, folder, tmp_path / "run")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "--eval_tasks=lambada: no id for" in errors
