"""Finetuning and a sweep, from nothing: is the tuned recipe better than the one it began with?

    python benchmarks/finetuning.py DIR --webtext FOLDER --shakespeare FILE

A GPT-2 of 4 layers reads web text for some minutes (to be a pretrained model at all), becomes a
Hugging Face folder, and is finetuned on Shakespeare in a sweep. Out: the winner and the default on
fresh seeds, on the half of the val split that the search never saw; and what a trial costs beyond
its training. DIR keeps all of it; the same command goes on. Flags that this script does not know
go to `yuzogpt tune`.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

SHAPE = "--n_layer=4 --n_head=4 --n_embd=64 --block_size=128 --bias=True".split()
CPU = "--device=cpu --dtype=float32".split()
PRETRAINING = (
    "--batch_size=8 --gradient_accumulation_steps=1 --max_iters=400 --lr_decay_iters=400 "
    "--warmup_iters=40 --learning_rate=3e-3 --min_lr=3e-4 --eval_interval=200 --eval_iters=20 "
    "--num_workers=0"
).split()
# nanoGPT's finetuning recipe, for a smaller model: a constant rate, one row after the other.
FINETUNING = (
    "--batch_size=8 --gradient_accumulation_steps=1 --block_size=128 --max_iters=60 "
    "--eval_interval=10 --eval_iters=5 --learning_rate=3e-5 --decay_lr=False --dropout=0.0 "
    "--num_workers=1"
).split()
SPACE = (
    "--search.learning_rate={loguniform:[1e-5,1e-2]}",
    "--search.dropout={uniform:[0,0.3]}",
    "--search.weight_decay={choice:[0.0,0.01,0.1]}",
    "--search.layer_lr_decay={uniform:[0.7,1.0]}",
)


def yuzogpt(*arguments: str) -> None:
    """Run the command line, and show what it prints."""
    subprocess.run([sys.executable, "-m", "yuzogpt", *arguments], check=True)


def pretrain(directory: Path, webtext: Path) -> Path:
    """Return a Hugging Face folder of a small GPT-2 that has read some web text."""
    corpus, run, folder = (directory / name for name in ("webtext", "pretraining", "pretrained"))
    named = ("prepare", "webtext", f"--source={webtext}", f"--data_dir={corpus}")
    yuzogpt(*named, "--tokenizer=gpt2", "--num_workers=0")
    yuzogpt("train", *SHAPE, *CPU, *PRETRAINING, f"--data_dir={corpus}", f"--out_dir={run}")
    if not folder.exists():
        yuzogpt("export", str(run), str(folder))
    return folder


def cost_of_a_trial(sweep: Path) -> float:
    """Return the seconds from a trial's last record to the first of the one in its place, median.

    From the end of its training to the start of the next one's loop: what it costs besides.
    """
    spans: list[tuple[float, float]] = []
    for path in sorted(sweep.glob("trials/*/metrics.jsonl")):
        times = [json.loads(line)["time"] for line in path.read_text().splitlines() if line]
        spans.append((times[0], times[-1]))
    ends, gaps = sorted(end for _, end in spans), []
    for begin, _ in sorted(spans):
        before = [end for end in ends if end <= begin]
        if before:  # else the trial has begun with the sweep
            gaps.append(begin - before[-1])
            ends.remove(before[-1])
    return statistics.median(gaps)


def main() -> None:
    """Do all of it, and print what came out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--webtext", type=Path, required=True, help="parquet files, or plain text")
    parser.add_argument("--shakespeare", type=Path, required=True, help="tinyshakespeare's file")
    wanted, flags = parser.parse_known_args()
    directory = wanted.directory.absolute()
    folder = pretrain(directory, wanted.webtext.absolute())
    corpus, sweep = directory / "shakespeare", directory / "sweep"
    source = f"--source={wanted.shakespeare.absolute()}"
    yuzogpt("prepare", "shakespeare", source, f"--data_dir={corpus}")
    places = [f"--data_dir={corpus}", f"--out_dir={sweep}", f"--init_from={folder}"]
    began = time.time()
    yuzogpt("tune", *CPU, *FINETUNING, *SPACE, "--num_samples=12", *places, *flags)
    found = json.loads((sweep / "sweep.json").read_text())
    states = [trial["state"] for trial in found["trials"]]
    print(f"{time.time() - began:.0f} s in all; {states.count('stopped')} of {len(states)} stopped")
    print(f"a trial costs {cost_of_a_trial(sweep):.2f} s beyond its training")
    print(json.dumps(found["comparison"], indent=2))


if __name__ == "__main__":
    main()
