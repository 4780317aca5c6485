"""Our metrics equal lm-evaluation-harness's own, for the same weights and texts."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import REPOSITORY
from tests.evaluation.models import (
    end_with_greedy_words,
    exported,
    random_model,
    write_hellaswag,
    write_lambada,
    write_wikitext,
)
from yuzogpt.cli import main
from yuzogpt.errors import UserError

pytestmark = pytest.mark.slow

lm_eval = pytest.importorskip("lm_eval")

HARNESS = Path(__file__).parent / "harness"  # tasks for lm-evaluation-harness, of these files
TASKS = ("lambada_here", "wikitext_here", "hellaswag_here", "until_here")
NEW = 8  # tokens that continue each passage, as in until_here.yaml


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A Hugging Face folder of a random GPT-2 with GPT-2's own tokens."""
    return exported(random_model(tmp_path_factory.mktemp("model") / "run"))


@pytest.fixture(scope="module")
def adapter(folder):
    """Our model, in the harness's interface."""
    from yuzogpt.evaluation.lm_eval import YuzoGPT

    return YuzoGPT(str(folder), batch_size=4, device="cpu", threads=1)


def generate(adapter, *texts, **wanted):
    """Return the texts that the adapter generates after these."""
    from lm_eval.api.instance import Instance

    requests = [Instance("generate_until", {}, (text, wanted), 0) for text in texts]
    return adapter.generate_until(requests)


@pytest.fixture(scope="module")
def files(tmp_path_factory, folder, adapter) -> Path:
    """Small benchmark files of random words, and the harness's tasks for them."""
    own = str(folder)
    folder = tmp_path_factory.mktemp("files")
    write_lambada(folder / "lambada_test.jsonl")
    end_with_greedy_words(folder / "lambada_test.jsonl", own)
    write_hellaswag(folder / "hellaswag_val.jsonl")
    lines = (folder / "lambada_test.jsonl").read_text().splitlines()
    said = generate(adapter, *(json.loads(line)["text"] for line in lines[:9]), max_gen_toks=NEW)
    stops = sorted({text[place : place + 2] for text in said for place in (9, 14)})
    stops = [stop for stop in stops if re.fullmatch("[A-Za-z]{2}", stop)][:5]
    assert len(stops) > 1, said
    pages = write_wikitext(folder / "wikitext2_test.txt")
    rows = "".join(json.dumps({"page": page}) + "\n" for page in pages)
    (folder / "pages.jsonl").write_text(rows)
    for name in ("pages.py", "scenes.py"):
        (folder / name).write_text((HARNESS / name).read_text())
    for name in TASKS:
        text = (HARNESS / f"{name}.yaml").read_text()
        text = text.replace("LAMBADA", str(folder / "lambada_test.jsonl"))
        text = text.replace("WIKITEXT", str(folder / "pages.jsonl"))
        text = text.replace("HELLASWAG", str(folder / "hellaswag_val.jsonl"))
        text = text.replace("UNTIL", json.dumps(stops))
        (folder / f"{name}.yaml").write_text(text)
    return folder


def theirs(model, files: Path) -> dict[str, dict]:
    """Return the harness's results."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(files), include_defaults=False)
    found = lm_eval.simple_evaluate(
        model=model, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0, log_samples=True
    )
    results = dict(found["results"])
    results["texts"] = [sample["filtered_resps"] for sample in found["samples"]["until_here"]]
    return results


def test_figures_are_the_harness_own(files, folder, adapter, tmp_path, capsys):
    from lm_eval.models.huggingface import HFLM

    hf = HFLM(str(folder), device="cpu", dtype="float32", batch_size=4)
    expected = theirs(hf, files)
    through_adapter = theirs(adapter, files)
    out_dir = tmp_path / "results"
    main([
        "evaluate", str(folder), "--tasks=lambada,wikitext2,hellaswag", "--protocol=harness",
        f"--benchmark_dir={files}", f"--out_dir={out_dir}", "--num_workers=0", "--threads=1",
        "--device=cpu", "--batch_size=3", "--shard_size=8",
    ])  # fmt: skip
    ours = json.loads((out_dir / "results.json").read_text())["tasks"]
    ours = {
        task: {k: f["value"] for k, f in found["figures"].items()} for task, found in ours.items()
    }
    for task, here, names in (
        ("lambada_here", "lambada-harness", {"perplexity": "perplexity", "acc": "accuracy"}),
        ("wikitext_here", "wikitext2-harness", {n: n for n in ("word_perplexity", "byte_perplexity",
                                                       "bits_per_byte")}),
        ("hellaswag_here", "hellaswag", {"acc": "accuracy", "acc_norm": "accuracy_by_length"}),
    ):  # fmt: skip
        for theirs_name, our_name in names.items():
            value = expected[task][f"{theirs_name},none"]
            assert ours[here][our_name] == pytest.approx(value, rel=1e-4)
            assert through_adapter[task][f"{theirs_name},none"] == pytest.approx(value, rel=1e-4)
    # None of this is trivially equal.
    assert all(0 < expected[task]["acc,none"] < 1 for task in ("lambada_here", "hellaswag_here"))
    assert through_adapter["texts"] == expected["texts"]
    whole = [json.loads(line)["text"] for line in (files / "lambada_test.jsonl").open()]
    lengths = [len(text) for text in generate(adapter, *whole, max_gen_toks=NEW)]
    assert any(len(text) < n for (text,), n in zip(expected["texts"], lengths, strict=True))
    printed = capsys.readouterr().out
    assert re.search(r"lambada\s+harness\s+perplexity", printed)


def test_requests_are_read_as_the_harness_own_model_reads_them(folder, adapter):
    from transformers import AutoTokenizer

    # The token that ends a text, not its letters.
    text = "the king<|endoftext|> of night<|endoftext|>"
    assert adapter.tok_encode(text) == AutoTokenizer.from_pretrained(folder).encode(text)
    # Samples of one text are several, and come again.
    drawn = generate(adapter, *["the king"] * 3, do_sample=True, temperature=1.0, max_gen_toks=NEW)
    assert len(set(drawn)) == 3
    assert generate(adapter, *["the king"] * 3, temperature=1.0, max_gen_toks=NEW) == drawn
    greedy = generate(adapter, "the king", max_gen_toks=NEW)
    assert greedy not in [[text] for text in drawn]
    asked = {"do_sample": False, "temperature": 1.0, "max_new_tokens": NEW}
    assert generate(adapter, "the king", **asked) == greedy
    assert generate(adapter, "the king", max_gen_toks=0) == [""]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_the_harness_command_runs_without_a_gpu(folder, files, tmp_path):
    """It requests cuda:0 if no device is named."""
    command = [
        sys.executable, "-m", "yuzogpt.evaluation.lm_eval", "run", "--tasks", "lambada_here",
        "--include_path", str(files), "--model_args", f"model={folder},threads=1", "--limit", "2",
        "--output_path", str(tmp_path / "found"),
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert "yuzogpt: no CUDA device; using the CPU" in result.stderr
    (found,) = (tmp_path / "found").rglob("results*.json")
    assert "acc,none" in json.loads(found.read_text())["results"]["lambada_here"]


@pytest.mark.parametrize(
    ("given", "message"),
    [({"dtype": "foo"}, "--model_args dtype=foo: "), ({"batch_size": 0}, "--batch_size=0: "),
     ({"batch_size": "many"}, "--batch_size=many: "), ({"depth": 3}, "depth is not known")],
)  # fmt: skip
def test_mistakes_are_the_users(folder, given, message):
    from yuzogpt.evaluation.lm_eval import YuzoGPT

    with pytest.raises(UserError, match=message):
        YuzoGPT(str(folder), **{"device": "cpu", **given})


@pytest.mark.parametrize(
    ("arguments", "ours"),
    [("run --tasks a", True), ("--tasks a", True), ("--tasks=a", True), ("ls tasks", False),
     ("validate --tasks a", False), ("run -M hf --tasks a", False), ("run", False), ("", False),
     ("run --model hf", False), ("--model=hf --tasks a", False), ("--help", False),
     ("run --config a.yaml", False)],
)  # fmt: skip
def test_our_model_is_taken_where_none_is_named(arguments, ours):
    from yuzogpt.evaluation.lm_eval import with_our_model

    given = arguments.split()
    assert with_our_model(given) == [*given, *(["--model", "yuzogpt"] if ours else [])]
