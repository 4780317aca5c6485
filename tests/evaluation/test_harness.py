"""Our figures beside lm-evaluation-harness's own, of the same weights and the same texts."""

import json
import re
from pathlib import Path

import pytest

from tests.evaluation.models import exported, random_model, some_lambada, some_wikitext
from yuzogpt.cli import main

lm_eval = pytest.importorskip("lm_eval")

HARNESS = Path(__file__).parent / "harness"  # tasks for lm-evaluation-harness, of these files
TASKS = ("lambada_here", "wikitext_here", "until_here")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """Small parts of the benchmarks in the tests' own words, and the harness's tasks for them."""
    folder = tmp_path_factory.mktemp("files")
    some_lambada(folder / "lambada_test.jsonl")
    pages = some_wikitext(folder / "wikitext2_test.txt")
    rows = "".join(json.dumps({"page": page}) + "\n" for page in pages)
    (folder / "pages.jsonl").write_text(rows)
    (folder / "pages.py").write_text((HARNESS / "pages.py").read_text())
    for name in TASKS:
        text = (HARNESS / f"{name}.yaml").read_text()
        text = text.replace("LAMBADA", str(folder / "lambada_test.jsonl"))
        text = text.replace("WIKITEXT", str(folder / "pages.jsonl"))
        (folder / f"{name}.yaml").write_text(text)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A Hugging Face folder of a random GPT-2 with GPT-2's own tokens."""
    return exported(random_model(tmp_path_factory.mktemp("model") / "run"))


def theirs(model, files: Path) -> dict[str, dict]:
    """Return what the harness finds."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(files), include_defaults=False)
    found = lm_eval.simple_evaluate(
        model=model, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0, log_samples=True
    )
    results = dict(found["results"])
    results["texts"] = [sample["filtered_resps"] for sample in found["samples"]["until_here"]]
    return results


def test_figures_are_the_harness_own(files, folder, tmp_path, monkeypatch, capsys):
    from lm_eval.models.huggingface import HFLM

    from yuzogpt.evaluation.harness import YuzoGPT

    hf = HFLM(str(folder), device="cpu", dtype="float32", batch_size=4)
    expected = theirs(hf, files)
    adapter = theirs(YuzoGPT(str(folder), batch_size=4, device="cpu", threads=1), files)
    out_dir = tmp_path / "results"
    main([
        "evaluate", str(folder), "--tasks=lambada,wikitext2", "--protocol=harness",
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
    ):  # fmt: skip
        for theirs_name, our_name in names.items():
            value = expected[task][f"{theirs_name},none"]
            assert ours[here][our_name] == pytest.approx(value, rel=1e-4)
            assert adapter[task][f"{theirs_name},none"] == pytest.approx(value, rel=1e-4)
    assert adapter["texts"] == expected["texts"]
    printed = capsys.readouterr().out
    assert re.search(r"lambada\s+harness\s+perplexity", printed)
