"""Evaluation: our metrics and time against lm-evaluation-harness's own model, on the same texts.

    python benchmarks/evaluation.py FILES                     # a random GPT-2 124M
    python benchmarks/evaluation.py FILES RUN DIR --passages 0 --pages 0

FILES: a folder with lambada_test.jsonl and wikitext2_test.txt; RUN, DIR: runs, or Hugging Face
folders (a run is exported for the other side). `--passages` and `--pages`: how many are read, 0:
all. The sides take turns in each round, in float32 with the same batch size. Reading and encoding
the texts is timed, loading a model is not.

    YuzoGPT    evaluation/scoring.py, protocol `harness`
    lm_eval    its `hf` model: transformers' GPT2LMHeadModel
"""

import argparse
import json
import logging
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"

import lm_eval
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from yuzogpt.checkpoints import huggingface
from yuzogpt.checkpoints.export import to_huggingface
from yuzogpt.checkpoints.load import load_model
from yuzogpt.checkpoints.pretrained import CONFIG
from yuzogpt.checkpoints.resolve import resolve_model
from yuzogpt.config import DeviceSettings, ModelSettings
from yuzogpt.evaluation.benchmarks import formats
from yuzogpt.evaluation.benchmarks.readers import TaskOptions
from yuzogpt.evaluation.benchmarks.tasks import TASKS
from yuzogpt.evaluation.scoring import score
from yuzogpt.model.gpt import GPT
from yuzogpt.model.initialization import initialize
from yuzogpt.runtime.device import choose_hardware
from yuzogpt.runtime.world import World
from yuzogpt.tokenization import huggingface as tokenizer_files
from yuzogpt.tokenization.tokenizer import gpt2_tokenizer

HARNESS = Path(__file__).parents[1] / "tests" / "evaluation" / "harness"
BATCH = 8
Figures = dict[str, float]
# By task: the harness's name, and by our metric the harness's.
NAMES = {
    "lambada": ("lambada_here", {"perplexity": "perplexity", "accuracy": "acc"}),
    "wikitext2": (
        "wikitext_here",
        {name: name for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")},
    ),
}


def cut(files: Path, to: Path, passages: int, pages: int) -> None:
    """Write the part of the files that is read, and the harness's tasks for it."""
    lines = formats.lines(files / "lambada_test.jsonl")[: passages or None]
    (to / "lambada_test.jsonl").write_text("".join(f"{line}\n" for line in lines))
    articles = formats.wikitext_pages(files / "wikitext2_test.txt")[: pages or None]
    shorter = to / "wikitext2_test.txt"
    shorter.write_text("\n".join(articles))
    pages_read = formats.wikitext_pages(shorter)  # both sides read what our side will find there
    rows = "".join(json.dumps({"page": page}) + "\n" for page in pages_read)
    (to / "pages.jsonl").write_text(rows)
    (to / "pages.py").write_text((HARNESS / "pages.py").read_text())
    for task, _ in NAMES.values():
        text = (HARNESS / f"{task}.yaml").read_text()
        text = text.replace("LAMBADA", str(to / "lambada_test.jsonl"))
        (to / f"{task}.yaml").write_text(text.replace("WIKITEXT", str(to / "pages.jsonl")))


def ours(model: GPT, name: str, files: Path, task: str) -> tuple[Figures, float]:
    """Return our metrics and the seconds that they took."""
    reference = resolve_model(name)
    hardware = choose_hardware(DeviceSettings(device="cpu", dtype="float32"), World())
    began = time.perf_counter()
    options = TaskOptions(reference.tokenizer(), reference.shape.block_size, 1, False)
    prepared = TASKS[task].protocols["harness"](files / TASKS[task].file, options)
    metrics = prepared.compute_metrics(score(model, prepared.passages, BATCH, hardware))
    seconds = time.perf_counter() - began
    return {metric.name: metric.value for metric in metrics}, seconds


def theirs(model: HFLM, manager: TaskManager, task: str) -> tuple[Figures, float]:
    """Return the harness's metrics and the seconds that they took."""
    their_task, names = NAMES[task]
    began = time.perf_counter()
    found: dict[str, Any] = lm_eval.simple_evaluate(
        model=model, tasks=[their_task], task_manager=manager, bootstrap_iters=0
    )
    seconds = time.perf_counter() - began
    values = found["results"][their_task]
    return {name: values[f"{their_name},none"] for name, their_name in names.items()}, seconds


def compare(name: str, files: Path, rounds: int) -> None:
    """Print the metrics and times of one model on each task."""
    folder, label = name, Path(name).name
    if not Path(name, CONFIG).is_file():
        folder = str(files / "exported")
        to_huggingface(resolve_model(name), Path(folder))
    ours_loaded, theirs_loaded = (
        load_model(resolve_model(name)),
        HFLM(folder, device="cpu", dtype="float32", batch_size=BATCH),
    )
    manager = TaskManager(include_path=str(files), include_defaults=False)
    for task in NAMES:
        turns = [
            (ours(ours_loaded, name, files, task), theirs(theirs_loaded, manager, task))
            for _ in range(rounds)
        ]
        (mine, _), (other, _) = turns[0]
        for metric, value in other.items():
            change = mine[metric] / value - 1 if value else mine[metric]
            print(
                f"{label} {task} {metric}: {mine[metric]:.6f}, lm_eval {value:.6f} ({change:+.1e})"
            )
        seconds = [[side[1] for side in turn] for turn in turns]
        ratio = statistics.median(b / a for a, b in seconds)
        medians = [statistics.median(column) for column in zip(*seconds, strict=True)]
        print(f"{label} {task}: {medians[0]:.1f} s, lm_eval {medians[1]:.1f} s: {ratio:.2f} times")


def random_gpt2(folder: Path) -> str:
    """Write a Hugging Face folder of GPT-2's 124M shape with random weights."""
    model = GPT(ModelSettings(vocab_size=50257, bias=True))
    initialize(model, 1)
    tokenizer = gpt2_tokenizer()
    huggingface.save(model, folder, tokenizer.end_of_text)
    for name, content in tokenizer_files.to_files(tokenizer, model.settings.block_size).items():
        (folder / name).write_bytes(content)
    return str(folder)


def main() -> None:
    """Compare each model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", type=Path)
    parser.add_argument("models", nargs="*")
    parser.add_argument("--passages", type=int, default=200)
    parser.add_argument("--pages", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    print(f"torch {torch.__version__}, lm_eval {lm_eval.__version__}, batches of {BATCH}")
    with tempfile.TemporaryDirectory() as directory:
        cut(arguments.files, Path(directory), arguments.passages, arguments.pages)
        for model in arguments.models or [random_gpt2(Path(directory, "gpt2"))]:
            compare(model, Path(directory), arguments.rounds)


if __name__ == "__main__":
    main()
