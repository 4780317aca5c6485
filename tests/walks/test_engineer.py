"""An engineer's walk: find, compare, stop and resume runs."""

import json
import re
from pathlib import Path

import pytest

from tests.conftest import TINY
from tests.waiting import wait_until
from tests.walks.terminal import CTRL_C, Terminal

pytestmark = pytest.mark.slow

# Steps far apart from any checkpoint that is written by itself.
ENDLESS = "--max_iters=1000000 --eval_interval=1000000"


def losses(run: Path) -> dict[int, float]:
    """Return the loss of each step that was logged."""
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {record["step"]: record["loss"] for record in records if record["kind"] == "train"}


def test_runs_are_listed_and_compared(corpus_dir, tmp_path):
    train = f"yuzogpt train {' '.join(TINY)} --data_dir={corpus_dir} --num_workers=0 --max_iters=20"
    with Terminal(tmp_path) as terminal:
        for lr in ("1e-2", "1e-3"):
            assert terminal.run(f"{train} --learning_rate={lr} --out_dir=out-{lr}")[0] == 0
        status, shown = terminal.run("yuzogpt list")
        assert status == 0
        assert re.search(r"out-1e-2 .*20", shown)
        status, shown = terminal.run("yuzogpt report out-1e-2 out-1e-3")
        assert status == 0
        assert re.search(r"learning_rate.*0\.01.*0\.001", shown)


def test_ctrl_c_and_a_closed_window_lose_no_step(corpus_dir, tmp_path):
    flags = [flag for flag in TINY if not flag.startswith("--eval_interval")]
    train = f"yuzogpt train {' '.join(flags)} --data_dir={corpus_dir} --num_workers=0 {ENDLESS}"
    with Terminal(tmp_path) as terminal:
        terminal.type(f"{train} --out_dir=out-stopped")
        terminal.wait_for(r"\b\d{2,}/1000000")
        terminal.press(CTRL_C)
        terminal.wait_for("kept in")
        terminal.press(CTRL_C)  # impatient, while the command is about to end
        status, shown = terminal.finish()
        assert status == 130
        assert "Traceback" not in shown
        kept = int(re.search(r"at step (\d+): kept", shown)[1])
        terminal.type(f"{train} --out_dir=out-stopped")
        terminal.wait_for(rf"\b(?!{kept}/)\d{{2,}}/1000000")
    # The window is closed, with the run in it.
    wait_until(lambda: stopped_at(tmp_path / "out-stopped") > kept)
    last = stopped_at(tmp_path / "out-stopped") + 1
    with Terminal(tmp_path) as terminal:
        for name in ("out-stopped", "out-undisturbed"):
            assert terminal.run(f"{train} --max_iters={last} --out_dir={name}")[0] == 0
    assert losses(tmp_path / "out-stopped") == losses(tmp_path / "out-undisturbed")


def stopped_at(run: Path) -> int:
    """Return the step at which a run was stopped last."""
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return max((record["step"] for record in records if record["kind"] == "stop"), default=0)


def test_help_fits_the_terminal_and_finds_a_setting(tmp_path):
    with Terminal(tmp_path, columns=60) as terminal:
        status, shown = terminal.run("yuzogpt train --help warmup")
        assert status == 0
        assert "--warmup_iters" in shown
        assert "--n_layer" not in shown
        assert re.search(r"yuzogpt \d+\.\d+", terminal.run("yuzogpt --version")[1])
        status, shown = terminal.run("yuzogpt train --warmup_itres=3")
        assert status == 2
        assert "did you mean warmup_iters" in shown.replace("\n", "")
