"""The CPU recipes on Shakespeare, from start to end: val loss, and the time of each part.

    python benchmarks/shakespeare.py --seeds 1337 1 2 --dataset shakespeare_char
    python benchmarks/shakespeare.py --presets shakespeare_char_cpu shakespeare_char_fast
    python benchmarks/shakespeare.py --nanogpt ~/nanoGPT      # its train.py, in turn with ours

Presets take turns, seed by seed; the ratio is the first preset's wall time over the last one's.

Flags that this script does not know are passed to `yuzogpt train`. A checkout of nanoGPT must have
its data/shakespeare_char prepared.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from yuzogpt.runs.event_log import seconds_of_step

NANOGPT = (
    "train.py config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 "
    "--log_interval=1 --block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 "
    "--max_iters=2000 --lr_decay_iters=2000 --dropout=0.0"
)


def run_ours(preset: str, dataset: str, seed: int, flags: list[str]) -> dict[str, float]:
    """Train once; return the val loss and the seconds of each part."""
    with tempfile.TemporaryDirectory() as out_dir:
        command = [sys.executable, "-m", "yuzogpt", "train", preset]
        command += [f"--dataset={dataset}", f"--out_dir={out_dir}/run", f"--seed={seed}", *flags]
        began = time.time()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        ended = time.time()
        lines = (Path(out_dir) / "run" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    train = [record for record in records if record["kind"] == "train"]
    interval = train[0]["step"]
    seconds_in_steps = sum(interval * seconds_of_step(record) for record in train)
    first, last = records[0]["time"], records[-1]["time"]
    return {
        "val_loss": records[-1]["val_loss"],
        "wall": ended - began,
        "start-up": first - began,
        "steps": seconds_in_steps,
        "evaluation": last - first - seconds_in_steps,
        "end": ended - last,
        "ms/step": 1e3 * seconds_in_steps / train[-1]["step"],
    }


def run_nanogpt(checkout: Path) -> dict[str, float]:
    """Run nanoGPT's own train.py with the same recipe."""
    began = time.time()
    result = subprocess.run(
        [sys.executable, *NANOGPT.split()], cwd=checkout, check=True, capture_output=True, text=True
    )
    times = [float(found) for found in re.findall(r"time ([\d.]+)ms", result.stdout)]
    val = [float(found) for found in re.findall(r"val loss ([\d.]+)", result.stdout)]
    return {
        "val_loss": min(val),
        "wall": time.time() - began,
        "ms/step": statistics.median(times),
    }


def main() -> None:
    """Print the values of each run, then the medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="shakespeare_char")
    parser.add_argument("--presets", nargs="+", default=["shakespeare_char_cpu"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1337])
    parser.add_argument("--nanogpt", type=Path)
    arguments, flags = parser.parse_known_args()
    presets = arguments.presets
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in (*presets, "nanogpt")}
    for seed in arguments.seeds:
        for preset in presets:
            rows[preset].append(run_ours(preset, arguments.dataset, seed, flags))
        if arguments.nanogpt:
            rows["nanogpt"].append(run_nanogpt(arguments.nanogpt))
        for name, found in rows.items():
            for key, value in (found[-1] if found else {}).items():
                print(f"{name} seed {seed} {key}: {value:.5g}", flush=True)
    for name, found in rows.items():
        for key in found[0] if found else []:
            values = [row[key] for row in found]
            print(
                f"{name} {key}: median {statistics.median(values):.5g} "
                f"({min(values):.5g} to {max(values):.5g}, {len(values)} runs)"
            )
    if len(presets) > 1:
        pairs = zip(rows[presets[0]], rows[presets[-1]], strict=True)
        ratios = [first["wall"] / last["wall"] for first, last in pairs]
        print(
            f"wall time of {presets[0]} over {presets[-1]}: median "
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        )


if __name__ == "__main__":
    main()
