"""`yuzogpt bench` as a user runs it: real runs, a table, JSON, a trace."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import REPOSITORY
from tests.training.worlds import wait_for_step
from yuzogpt import cli, tokenization
from yuzogpt.bench.bench import (
    Row,
    break_even,
    build_table,
    count_devices,
    in_directory,
    make_row,
    short_run,
)
from yuzogpt.bench.hardware_rate import flops_per_token, median_and_deciles
from yuzogpt.bench.launchers import Timing, find_error, measure
from yuzogpt.bench.synthetic import MAX_CHARACTERS, make_tokenizer
from yuzogpt.config import BenchSettings, ModelSettings, with_changes
from yuzogpt.config.resolve import resolve
from yuzogpt.errors import RunFailed, Stopped, UserError
from yuzogpt.model.gpt import GPT
from yuzogpt.runtime.cores import available_cores
from yuzogpt.runtime.device import Hardware
from yuzogpt.storage.paths import SUBMITTED_JOB

FLAGS = (
    "--n_layer=2 --n_head=2 --n_embd=32 --block_size=16 --batch_size=4 --vocab_size=40 "
    "--gradient_accumulation_steps=2 --device=cpu --dtype=float32 --threads=1 --steps=4 "
    "--warmup_steps=1"
).split()
CORES = available_cores()


def bench(*flags: str) -> None:
    cli.main(["bench", *FLAGS, *flags])


def settings_of(*flags) -> BenchSettings:
    return resolve(BenchSettings, [], [*FLAGS, *flags])


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Call bench from an empty directory, and have it make its own in another."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield tmp_path / "here"
    assert not list(tmp_path.glob("yuzogpt-bench-*"))


@pytest.mark.slow
def test_bare_and_torchrun_are_measured_and_nothing_is_left(here, capsys):
    bench("--launchers=bare,torchrun", "--world_sizes=2", "--json", "--trace=trace.json")
    found = json.loads(capsys.readouterr().out)
    assert [(row["launcher"], row["workers"]) for row in found["rows"]] == [
        ("bare", 1),
        ("torchrun", 2),
    ]
    assert found["tokens_per_step"] == 4 * 2 * 16
    for one in found["rows"]:
        assert one["ms_low"] <= one["ms_per_step"] <= one["ms_high"]
        seconds = found["tokens_per_step"] / one["tokens_per_second"]
        assert 1e3 * seconds == pytest.approx(one["ms_per_step"])
        assert one["devices"] == min(one["workers"], available_cores())  # a thread each
        rate = found["flops_per_token"] * one["tokens_per_second"] / one["devices"]
        assert one["mfu"] == pytest.approx(rate / found["matrix_flops_per_second"])
        assert 0 < one["mfu"] < 1
    trace = json.loads((here / "trace.json").read_text())
    names = {event.get("name") for event in trace["traceEvents"]}
    assert "aten::scaled_dot_product_attention" in names
    assert [path.name for path in here.iterdir()] == ["trace.json"]


@pytest.mark.slow
def test_a_person_gets_a_table(here, capsys, monkeypatch):
    """In a submitted job, too: nothing is read or left where relative paths lead."""
    monkeypatch.setenv(SUBMITTED_JOB, "{}")
    held = np.ones(2**27)  # 1 GiB, which the run's memory has nothing to do with
    bench()
    shown = capsys.readouterr().out
    assert "GFLOP/s" in shown
    (line,) = [line for line in shown.splitlines() if line.split()[:2] == ["bare", "1"]]
    memory, unit = line.split()[-2:]
    assert unit == "MiB"
    assert 100 < float(memory.replace(",", "")) < held.nbytes / 2**20
    assert not list(here.iterdir())


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--launchers=mpi", "unknown; known: bare, torchrun, ray"),
        ("--world_sizes=0", "world_sizes of 1 or more"),
        ("--world_sizes=two", "valid integer"),
        ("--n_head=3", "not a multiple of n_head"),
        ("--synthetic=False", "no prepared corpus here"),
        ("--trace=t.json --launchers=torchrun", "needs bare among the launchers"),
        ("--trace=t.json --steps=2", "needs more than 3 steps in all"),
        ("--trace=no/such/t.json", "a directory that exists"),
        ("--launchers=torchrun --world_sizes=1,9", "too small for 9 workers"),
        ("--launchers=ray --ray_address=127.0.0.1:9", "that all nodes share with --storage"),
        ("--init_from=gpt2 --freeze_layers=3", "--freeze_layers=0"),
        ("--vocab_size=1100000", "at most 1,092,096"),
    ],
)
def test_mistakes_are_one_line(here, flags, words):
    with pytest.raises(UserError) as caught:
        bench(*flags.split())
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(here.iterdir())


@pytest.mark.slow
def test_ctrl_c_leaves_no_process_and_no_file(tmp_path):
    mark = f"bench-{tmp_path.name}-{os.getpid()}"
    flags = "--launchers=torchrun", "--world_sizes=2", "--steps=100000"
    process = subprocess.Popen(
        [sys.executable, "-m", "yuzogpt", "bench", *FLAGS, *flags],
        env={**os.environ, "TMPDIR": str(tmp_path), "MARK": mark},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_for_step(wait_for_run(tmp_path), 1)
        assert len(marked(mark)) >= 4  # bench, torchrun, two ranks
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=100)
        assert marked(mark) == []
    finally:
        for left in marked(mark):
            os.kill(left, signal.SIGKILL)
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "yuzogpt: interrupted"  # no hint at resuming: it cannot


@pytest.mark.slow
def test_sigterm_ends_what_runs(tmp_path, monkeypatch):
    mark = f"bench-{tmp_path.name}-{os.getpid()}"
    monkeypatch.setenv("MARK", mark)

    def ask() -> None:
        wait_for_step(wait_for_run(tmp_path), 1)
        os.kill(os.getpid(), signal.SIGTERM)

    asking = threading.Thread(target=ask)
    asking.start()
    with pytest.raises(Stopped):
        bench("--steps=100000")
    asking.join()
    assert marked(mark) == []


def wait_for_run(directory: Path) -> Path:
    """Wait until a row of bench has begun; return its run."""
    wait, deadline = threading.Event(), time.monotonic() + 60
    while time.monotonic() < deadline:
        if found := list(directory.glob("yuzogpt-bench-*/*/metrics.jsonl")):
            return found[0].parent
        wait.wait(0.02)
    raise AssertionError("no run within a minute")


def marked(mark: str) -> list[int]:
    """Return the processes that inherited a variable of that value."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (process / "environ").read_bytes():
                found.append(int(process.name))
        except OSError:  # it has ended, or is another user's
            continue
    return found


def test_what_is_measured_is_the_presets_model_at_its_whole_batch(pretrained, tmp_path):
    settings = resolve(BenchSettings, [], [
        f"--init_from={pretrained}", "--dropout=0.1", "--batch_schedule=linear",
        "--batch_start_rows=12", "--batch_ramp_iters=9", "--eval_tasks=lambada",
        "--dataset=shakespeare_char", "--steps=1",
    ])  # fmt: skip
    run = short_run(settings, tmp_path)
    assert (run.model.n_layer, run.model.n_embd, run.model.dropout) == (3, 48, 0.1)
    assert run.run.init_from == "scratch"
    assert run.batch.batch_schedule == "constant"
    assert run.evaluation.eval_tasks == ()


@pytest.mark.slow
def test_a_row_that_fails_says_why(tmp_path):
    run = in_directory(short_run(settings_of(), tmp_path), str(tmp_path), "torchrun-1")
    changed = with_changes(run, {"data.data_dir": str(tmp_path / "none")})
    with pytest.raises(RunFailed, match=r"torchrun, 1 worker.*no prepared corpus here"):
        measure("torchrun", changed, 1)


def test_of_a_log_the_line_that_says_it_is_shown():
    rank = ["[rank1]:   File x", "[rank1]: torch.OutOfMemoryError: CUDA out of memory", "W1126 ..."]
    end = ["elastic.errors.ChildFailedError: ", "=====", "exitcode : 1", "====="]
    assert find_error([*rank, *end]) == rank[1]
    assert find_error(["yuzogpt: too hot", *rank, *end]) == "too hot"
    assert find_error(["hm", "-----", ""]) == "hm"
    assert find_error([]) == ""


def test_synthetic_text_has_any_vocabulary_that_unicode_has_characters_for():
    for size in (40, 50_000, MAX_CHARACTERS):
        tokenizer = make_tokenizer("openwebtext", size)
        assert tokenizer.vocab_size == size
        assert tokenization.to_bytes(tokenizer)
    with pytest.raises(UserError, match="at most 1,092,096"):
        make_tokenizer("openwebtext", MAX_CHARACTERS + 1)


@pytest.mark.parametrize(
    ("device", "threads", "workers", "devices"),
    [
        ("cuda", CORES, 4, 4),
        ("cpu", CORES, 4, 1),  # which they share
        ("cpu", 1, 1, 1),
        ("cpu", 1, CORES, CORES),
        ("cpu", 1, 2 * CORES, CORES),
        ("cpu", 2 * CORES, 4, 1),
    ],
)
def test_workers_have_a_gpu_or_threads_each_as_far_as_there_are_cores(
    device, threads, workers, devices
):
    assert count_devices(workers, hardware_of(device, threads)) == devices


def hardware_of(device: str, threads: int) -> Hardware:
    return Hardware(torch.device(device), None, False, threads, ())


def test_shares_are_of_the_ideal_and_of_all_devices():
    shape = ModelSettings(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=40)
    timing = Timing([0.5, 0.5], tokens=1000, seconds_to_first_step=1.0, memory_bytes=None)

    def apart(workers: int) -> Row:
        return make_row("torchrun", workers, timing, shape, hardware_of("cuda", CORES), 1e9, 0)

    def shared(workers: int) -> Row:
        return make_row("torchrun", workers, timing, shape, hardware_of("cpu", CORES), 1e9, 0)

    assert apart(2).mfu == apart(1).mfu / 2
    assert shared(2).mfu == apart(1).mfu

    def ideal(*rows: Row) -> list[str]:
        drawn = build_table([vars(row) for row in rows])
        column = next(column for column in drawn.columns if str(column.header) == "of ideal")
        return [str(cell) for cell in column.cells]

    assert ideal(shared(2), shared(4)) == ["1.00", "1.00"]
    assert ideal(apart(2), apart(4)) == ["1.00", "0.50"]
    assert ideal(apart(4), apart(1)) == ["0.25", "1.00"]


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_operations_are_those_of_the_matrices(activation):
    """Two for each weight and token forward, twice that backward: counted by torch itself."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    shape = ModelSettings(
        n_layer=3, n_head=2, n_embd=64, block_size=32, vocab_size=128, activation=activation
    )
    ids = torch.zeros(2, 32, dtype=torch.long)
    # The counter does not know the CPU's fused attention.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        GPT(shape)(ids, ids).sum().backward()
    norms = 6 * 64 * (2 * 3)  # the formula takes norms for matrices, as PaLM's does
    assert 64 * (flops_per_token(shape) - norms) == pytest.approx(
        counter.get_total_flops(), rel=0.05
    )


def test_compiling_pays_off_when_its_seconds_are_won_back():
    def row(name, ms, first):
        return Row(name, 1, 1, ms, ms, ms, 1.0, 0.1, first, None)

    rows = [row("bare", 80.0, 41.0), row("bare, eager", 100.0, 1.0)]
    assert break_even(rows) == pytest.approx(2000)
    assert break_even([row("bare", 120.0, 41.0), rows[1]]) is None
    assert break_even(rows[:1]) is None


def test_the_spread_of_few_values():
    assert median_and_deciles([3.0]) == (3.0, 3.0, 3.0)
    assert median_and_deciles([5.0, 1.0, 3.0]) == (3.0, 1.4, 4.6)
