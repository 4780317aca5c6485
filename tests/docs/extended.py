"""What docs/extending.md adds works; test_extending.py runs this where its diffs are applied.

tests/training/test_choices.py trains the values that are not here.
"""

import hashlib
import json

import pytest

from tests.conftest import tiny_settings
from tests.training.worlds import records
from yuzogpt import runs
from yuzogpt.cli.help import verb_help
from yuzogpt.data.preparation.corpora import find_corpus
from yuzogpt.data.preparation.splits import Split
from yuzogpt.evaluation.benchmarks.readers import TaskOptions
from yuzogpt.evaluation.benchmarks.tasks import prepare
from yuzogpt.evaluation.passages import Score
from yuzogpt.tokenization.tokenizer import gpt2_tokenizer
from yuzogpt.training.launch import run_here


def train(corpus, out_dir, *flags):
    """Train as the command does, in this process; return the losses."""
    run_here(runs.check(tiny_settings(corpus, out_dir, "--num_workers=0", *flags)))
    return [record["loss"] for record in records(out_dir, "train")]


def test_help_has_what_is_added():
    text = " ".join(verb_help("train").split())
    for name in ("silu: x * sigmoid(x)", "rms_plain:", "none:", "sgd:", "sqrt:", "jump:"):
        assert name in text
    assert "tinystories: 2 million" in " ".join(verb_help("prepare").split())


def test_a_run_by_the_optimizer_is_resumed(corpus_dir, tmp_path):
    flags = ("--optimizer=sgd", "--eval_interval=4")
    whole = train(corpus_dir, tmp_path / "whole", *flags, "--max_iters=8")
    train(corpus_dir, tmp_path / "halves", *flags, "--max_iters=4")
    assert train(corpus_dir, tmp_path / "halves", *flags, "--max_iters=8") == whole


def test_the_split_rule_holds_out_its_share():
    digests = [hashlib.sha256(str(number).encode()).digest() for number in range(20_000)]
    masks = [Split(rule, 0.25, None).is_val(None, digests) for rule in ("hash", "second_hash")]
    assert [mask.mean() for mask in masks] == pytest.approx([0.25, 0.25], abs=0.02)
    assert (masks[0] != masks[1]).any()


def test_the_corpus_is_known():
    assert find_corpus("tinystories", "", False).source.startswith("hf://datasets/roneneldan")


def test_the_benchmark_is_read_and_counted(tmp_path):
    options = [{"text": "the moon", "label": "A"}, {"text": "the sun", "label": "B"}]
    row = {"question": {"stem": "What shines?", "choices": options}, "answerKey": "B"}
    path = tmp_path / "ARC-Easy-Test.jsonl"
    path.write_text(f"{json.dumps(row)}\n")
    task = prepare("arc_easy", "harness", path, TaskOptions(gpt2_tokenizer(), 64, 32, False))
    scores = [Score(-2.0, False, False), Score(-1.0, False, False)]
    assert task.compute_metrics(scores)[0].value == 1.0


def test_the_logger_gets_the_losses(corpus_dir, tmp_path):
    train(corpus_dir, tmp_path / "run", "--loggers=tensorboard", "--max_iters=3")
    (file,) = (tmp_path / "run" / "tensorboard").iterdir()
    assert b"train/loss" in file.read_bytes()
