"""`yuzogpt bench` as its user calls it: real runs, a table, JSON, a trace."""

import json
import subprocess
import sys

import pytest
import torch

from yuzogpt.bench.bench import Row, break_even
from yuzogpt.bench.hardware_rate import flops_per_token, spread
from yuzogpt.config import ModelSettings
from yuzogpt.model.gpt import GPT

FLAGS = (
    "--n_layer=2 --n_head=2 --n_embd=32 --block_size=16 --batch_size=4 --vocab_size=40 "
    "--gradient_accumulation_steps=2 --device=cpu --dtype=float32 --threads=1 --steps=4 "
    "--warmup_steps=1"
).split()


def bench(*flags, cwd) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "yuzogpt", "bench", *FLAGS, *flags]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def test_bare_and_torchrun_are_measured_and_nothing_is_left(tmp_path):
    flags = ("--launchers=bare,torchrun", "--world_sizes=2", "--json", "--trace=trace.json")
    ended = bench(*flags, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert [(row["launcher"], row["workers"]) for row in found["rows"]] == [
        ("bare", 1),
        ("torchrun", 2),
    ]
    assert found["tokens_per_step"] == 4 * 2 * 16
    for row in found["rows"]:
        assert row["ms_low"] <= row["ms_per_step"] <= row["ms_high"]
        seconds = found["tokens_per_step"] / row["tokens_per_second"]
        assert 1e3 * seconds == pytest.approx(row["ms_per_step"])
        rate = found["flops_per_token"] * row["tokens_per_second"]
        assert row["mfu"] == pytest.approx(rate / found["matrix_flops_per_second"])
        assert 0 < row["mfu"] < 1
    trace = json.loads((tmp_path / "trace.json").read_text())
    names = {event.get("name") for event in trace["traceEvents"]}
    assert "aten::scaled_dot_product_attention" in names
    assert sorted(path.name for path in tmp_path.iterdir()) == ["trace.json"]


def test_a_person_gets_a_table(tmp_path):
    ended = bench(cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "GFLOP/s" in ended.stdout
    (line,) = [line for line in ended.stdout.splitlines() if line.split()[:2] == ["bare", "1"]]
    assert line.rstrip().endswith("MiB")


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--launchers=mpi", "not one of bare, torchrun, ray"),
        ("--world_sizes=0", "at least one worker"),
        ("--world_sizes=two", "valid integer"),
        ("--n_head=3", "not a multiple of n_head"),
        ("--synthetic=False", "no prepared corpus here"),
    ],
)
def test_mistakes_are_one_line(tmp_path, flag, words):
    ended = bench(flag, cwd=tmp_path)
    assert ended.returncode == 2
    assert words in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


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
        return Row(name, 1, ms, ms, ms, 1.0, 0.1, first, None)

    rows = [row("bare", 80.0, 41.0), row("bare, eager", 100.0, 1.0)]
    assert break_even(rows) == pytest.approx(2000)
    assert break_even([row("bare", 120.0, 41.0), rows[1]]) is None
    assert break_even(rows[:1]) is None


def test_the_spread_of_few_values():
    assert spread([3.0]) == (3.0, 3.0, 3.0)
    assert spread([5.0, 1.0, 3.0]) == (3.0, 1.4, 4.6)
