"""`prepare`, `train` and `evaluate` from Python: twice in one process, as notebooks call them."""

import json
import os
import signal
import subprocess
import sys

import pytest

import yuzogpt
from tests.conftest import REPOSITORY, TINY
from tests.training.worlds import records
from tests.waiting import wait_until

SETTINGS = dict(flag.removeprefix("--").split("=") for flag in TINY)

# A notebook runs its cells inside a running event loop.
NOTEBOOK = """
import asyncio, json, signal, sys, threading
import yuzogpt

settings = json.loads(sys.argv[1])

async def cells():
{cells}

asyncio.run(cells())
print("alive", flush=True)
"""

ON_RAY = """
    import ray

    first = yuzogpt.train(**settings, max_iters=4)
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    again = yuzogpt.train(**settings, max_iters=6)
    assert again == first and again.val_loss < 10
    assert ray.is_initialized()
    ray.shutdown()
    yuzogpt.train(**settings, max_iters=8)
    settings["num_workers"] = 0
    thread = threading.Thread(target=lambda: yuzogpt.train(**settings, max_iters=10))
    thread.start()
    thread.join()
"""

INTERRUPTED = """
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        yuzogpt.train(**settings, max_iters=100_000)
    except (KeyboardInterrupt, yuzogpt.Stopped):
        print("interrupted", flush=True)
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    records = yuzogpt.Run(settings["out_dir"]).records
    kept = max(record["step"] for record in records if record["kind"] == "checkpoint")
    run = yuzogpt.train(**settings, max_iters=kept + 5)
    assert run.records[-1]["step"] == kept + 5
"""


def start(cells, corpus_dir, out_dir, num_workers, **environment):
    places = {"data_dir": str(corpus_dir), "out_dir": str(out_dir), "num_workers": num_workers}
    return subprocess.Popen(
        [sys.executable, "-c", NOTEBOOK.format(cells=cells), json.dumps(SETTINGS | places)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_a_notebook_trains_again_on_our_ray_on_its_own_and_without(corpus_dir, tmp_path):
    process = start(ON_RAY, corpus_dir, tmp_path / "run", 1, HOME=str(tmp_path))
    output, _ = process.communicate(timeout=300)
    assert output.endswith("alive\n"), output
    assert [record["step"] for record in records(tmp_path / "run", "final")] == [4, 6, 8, 10]


@pytest.mark.slow
def test_a_notebook_outlives_ctrl_c_and_resumes(corpus_dir, tmp_path):
    process = start(INTERRUPTED, corpus_dir, tmp_path, 0)
    wait_until(lambda: records(tmp_path, "checkpoint"), process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=300)
    assert "\ninterrupted\n" in output
    assert output.endswith("alive\n"), output


@pytest.mark.slow
def test_results_are_those_of_the_files(text_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    corpus = yuzogpt.prepare(text_file)
    assert corpus.directory == tmp_path / "data" / "text"
    assert corpus.train_tokens + corpus.val_tokens == 20_000
    assert corpus.is_new
    assert not yuzogpt.prepare("text", source=text_file).is_new

    run = yuzogpt.train(**SETTINGS, dataset="text", max_iters=3, num_workers=0)
    assert run.out_dir == str(tmp_path / "out-text")
    steps = [record["step"] for record in run.records if record["kind"] == "train"]
    assert steps == [1, 2, 3]
    assert run.val_loss == run.records[-1]["val_loss"]

    options = {"tasks": "loss", "dataset": "text", "num_workers": 0}
    found = yuzogpt.evaluate(run.out_dir, **options)
    stored = json.loads((tmp_path / "eval-out-text" / "results.json").read_text())
    assert found == stored["tasks"]
    assert found["loss"]["figures"]["val_loss"]["value"] == pytest.approx(run.val_loss, rel=1e-3)
    with (tmp_path / "eval.yaml").open("w") as file:
        file.write(f"model: {run.out_dir}\n")
    assert yuzogpt.evaluate("eval.yaml", **options) == found
