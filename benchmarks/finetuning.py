"""Finetuning and a sweep, from scratch: is the tuned recipe better than the default?

    python benchmarks/finetuning.py DIR --webtext FOLDER --shakespeare FILE

A GPT-2 of 4 layers is pretrained on web text for some minutes, exported as a Hugging Face folder,
and finetuned on Shakespeare in a sweep. The script prints the losses of the winner and of the
default with fresh seeds, on the half of the val split that the search never saw, and the seconds
that a trial costs beyond its training. DIR keeps everything; the same command resumes. Flags that
this script does not know are passed to `yuzogpt tune`.
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
# nanoGPT's finetuning recipe for a smaller model, with a constant learning rate.
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
    """Run the command line; its output is shown."""
    subprocess.run([sys.executable, "-m", "yuzogpt", *arguments], check=True)


def pretrain(directory: Path, webtext: Path) -> Path:
    """Return a Hugging Face folder of a small GPT-2 that is pretrained on web text."""
    corpus, run, folder = (directory / name for name in ("webtext", "pretraining", "pretrained"))
    prepare = ("prepare", "webtext", f"--source={webtext}", f"--data_dir={corpus}")
    yuzogpt(*prepare, "--tokenizer=gpt2", "--num_workers=0")
    yuzogpt("train", *SHAPE, *CPU, *PRETRAINING, f"--data_dir={corpus}", f"--out_dir={run}")
    if not folder.exists():
        yuzogpt("export", str(run), str(folder))
    return folder


def trial_overhead(sweep: Path) -> float:
    """Return the median seconds from a trial's last record to the next trial's first one.

    That is the cost of a trial besides its training loop.
    """
    spans: list[tuple[float, float]] = []
    for path in sorted(sweep.glob("trials/*/metrics.jsonl")):
        times = [json.loads(line)["time"] for line in path.read_text().splitlines() if line]
        spans.append((times[0], times[-1]))
    ends, gaps = sorted(end for _, end in spans), []
    for begin, _ in sorted(spans):
        before = [end for end in ends if end <= begin]
        if before:  # otherwise the trial started with the sweep
            gaps.append(begin - before[-1])
            ends.remove(before[-1])
    return statistics.median(gaps)


def main() -> None:
    """Pretrain, finetune in a sweep, and print the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--webtext", type=Path, required=True, help="parquet files, or plain text")
    parser.add_argument("--shakespeare", type=Path, required=True, help="tinyshakespeare's file")
    options, flags = parser.parse_known_args()
    directory = options.directory.absolute()
    folder = pretrain(directory, options.webtext.absolute())
    corpus, sweep = directory / "shakespeare", directory / "sweep"
    source = f"--source={options.shakespeare.absolute()}"
    yuzogpt("prepare", "shakespeare", source, f"--data_dir={corpus}")
    places = [f"--data_dir={corpus}", f"--out_dir={sweep}", f"--init_from={folder}"]
    began = time.time()
    yuzogpt("tune", *CPU, *FINETUNING, *SPACE, "--num_samples=12", *places, *flags)
    found = json.loads((sweep / "sweep.json").read_text())
    states = [trial["state"] for trial in found["trials"]]
    print(f"{time.time() - began:.0f} s in all; {states.count('stopped')} of {len(states)} stopped")
    print(f"a trial costs {trial_overhead(sweep):.2f} s beyond its training")
    print(json.dumps(found["comparison"], indent=2))


if __name__ == "__main__":
    main()
