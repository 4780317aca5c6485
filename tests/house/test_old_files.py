"""What version e909652 wrote is read, and a run of its is resumed as it would have resumed it.

fixtures/e909652: a corpus of characters, and a run of 5 steps with dropout and Muon. That version
itself then made steps 6 to 10 with the losses below.
"""

import json
import shutil

import pytest

from tests.conftest import REPOSITORY
from yuzogpt.cli import main
from yuzogpt.runs.event_log import read_records

OLD = REPOSITORY / "tests/fixtures/e909652"
# The flags of its command, with the names that settings had then.
FLAGS = (
    "--n_layer=1 --n_head=2 --n_embd=8 --block_size=8 --batch_size=2 "
    "--gradient_accumulation_steps=1 --eval_iters=2 --device=cpu --dtype=float32 --threads=1 "
    "--compile=False --dropout=0.1 --num_workers=0 --optimizer=muon --matrix_rate=2.0 "
    "--embedding_rate=0.5 --max_skipped=5 --hang_timeout=100 --decay_lr=False "
    "--eval_interval=5 --log_interval=1"
).split()
LOSSES = [
    2.955777645111084,
    2.9399476051330566,
    2.9462618827819824,
    2.9483628273010254,
    2.948603868484497,
]
VAL_LOSS = 2.9433320186756275


@pytest.fixture
def old(tmp_path):
    """A copy of the old corpus and run."""
    shutil.copytree(OLD, tmp_path / "old")
    return tmp_path / "old"


@pytest.mark.slow
def test_an_old_run_is_resumed_and_learns_the_same(old):
    places = [f"--data_dir={old / 'corpus'}", f"--out_dir={old / 'run'}"]
    main(["train", *FLAGS, *places, "--max_iters=10"])
    records = read_records(old / "run" / "metrics.jsonl")
    losses = [r["loss"] for r in records if r["kind"] == "train" and r["step"] > 5]
    assert losses == pytest.approx(LOSSES, rel=1e-5)
    assert records[-1]["val_loss"] == pytest.approx(VAL_LOSS, rel=1e-5)


@pytest.mark.slow
def test_its_settings_file_is_read(old):
    """settings.yaml of a run is a preset for the next command."""
    places = [f"--data_dir={old / 'corpus'}", f"--out_dir={old / 'again'}"]
    main(["train", str(old / "run/settings.yaml"), *places])
    before, after = (read_records(old / name / "metrics.jsonl") for name in ("run", "again"))
    assert after[-1]["val_loss"] == pytest.approx(before[-1]["val_loss"], rel=1e-5)


@pytest.mark.slow
def test_every_verb_that_reads_runs_reads_it(old, capsys):
    run = str(old / "run")
    main(["inspect", str(old / "corpus")])
    main(["sample", f"--out_dir={run}", "--num_samples=1", "--max_new_tokens=3", "--start=t"])
    main(["report", run])
    main(["export", run, "--to=huggingface", str(old / "hf")])
    main(["sample", f"{run}/checkpoints/step-5", "--num_samples=1", "--start=t"])
    assert json.loads((old / "hf/config.json").read_text())["n_embd"] == 8
    assert "val loss" in capsys.readouterr().out
