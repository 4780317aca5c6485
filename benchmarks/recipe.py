"""Ablations of a recipe: the recipe, and the same with one part changed.

    python benchmarks/recipe.py --data_dir data/shakespeare_char     # of shakespeare_char_fast
    python benchmarks/recipe.py --data_dir data/shakespeare_char --table starts
    python benchmarks/recipe.py --data_dir data/shakespeare_char --table contexts
    python benchmarks/recipe.py --data_dir data/shakespeare_char --seeds 1 2 3 --only "as it is"

Runs are without Ray (`--num_workers=0`), seed by seed; tables have medians. `parts`: the val loss
over the whole split at the end of the recipe. `starts`: for each initialization, the loss in the
first 500 steps of shakespeare_char_cpu, averaged over the last 20 steps before each mark.
`contexts`: the val loss of the recipe's model over the whole split, in windows of one, two and four
times the context that it was trained with.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from yuzogpt.runs.event_log import seconds_of_step

ADAMW = ("--optimizer=adamw", "--matrix_lr_mult=1", "--learning_rate=0.004", "--warmup_iters=20")
PARTS = {
    "as it is": (),
    "learned positions": ("--pos_emb=learned",),
    "ALiBi": ("--pos_emb=alibi",),
    "ALiBi, four heads": ("--pos_emb=alibi", "--n_head=4"),
    "layer norm": ("--norm=layer",),
    "GELU": ("--activation=gelu",),
    "relu2": ("--activation=relu2",),
    "four heads": ("--n_head=4",),
    "embedding and output tied": ("--tie_embeddings=True",),
    "queries and keys not normed": ("--qk_norm=False",),
    "residual_init=scaled": ("--residual_init=scaled",),
    "AdamW, learning rate 0.004": ADAMW,
    "Muon's momentum 0.9": ("--momentum=0.9",),
    "Muon's momentum 0.95": ("--momentum=0.95",),
    "cosine": ("--lr_schedule=cosine",),
    "wsd, 60 steps of decay": ("--lr_schedule=wsd", "--cooldown_iters=60"),
    "batch from 4 to 12 in 60 steps": (
        "--batch_schedule=linear", "--batch_start_rows=4", "--batch_ramp_iters=60",
    ),
}  # fmt: skip
FIRST_500 = ("--max_iters=500", "--eval_interval=500", "--log_interval=1", "--health_interval=0")
STARTS = {
    "GPT-2's (scaled)": (),
    "plain": ("--residual_init=plain",),
    "zero": ("--residual_init=zero",),
    "init_std 0.05": ("--init_std=0.05",),
    "init_std 0.05, zero": ("--init_std=0.05", "--residual_init=zero"),
    "muP from 64 wide": ("--mup_base_width=64",),
}
MARKS = (100, 250, 500)  # steps
POSITIONS = {
    "rotary": (),
    "ALiBi": ("--pos_emb=alibi", "--n_head=4"),  # with two heads, one would see only 16 tokens back
    "learned": ("--pos_emb=learned",),
}
TRAINED_CONTEXT = 64
CONTEXTS = (64, 128, 256)


@contextmanager
def trained(preset: str, data_dir: Path, seed: int, flags: tuple[str, ...]) -> Iterator[Path]:
    """Train once; yield the run, which is deleted afterwards."""
    with tempfile.TemporaryDirectory() as directory:
        run = Path(directory) / "run"
        yuzogpt(
            "train", preset, f"--data_dir={data_dir}", f"--out_dir={run}", f"--seed={seed}",
            "--num_workers=0", *flags,
        )  # fmt: skip
        yield run


def yuzogpt(*arguments: str) -> None:
    """Run a command."""
    command = [sys.executable, "-m", "yuzogpt", *arguments]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def train(preset: str, data_dir: Path, seed: int, flags: tuple[str, ...]) -> list[dict[str, Any]]:
    """Train once; return the records."""
    with trained(preset, data_dir, seed, flags) as run:
        return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def parts(data_dir: Path, seeds: list[int], only: list[str]) -> None:
    """Print the val loss of the recipe with each part changed."""
    print("| | val loss | of seeds | ms a step |\n|---|---|---|---|")
    for name, flags in PARTS.items():
        if only and name not in only:
            continue
        losses, step_ms = [], []
        for seed in seeds:
            records = train("shakespeare_char_fast", data_dir, seed, flags)
            losses.append(records[-1]["val_loss"])
            steps = [r for r in records if r["kind"] == "train"]
            step_ms += [1e3 * seconds_of_step(r) for r in steps[2:]]
        by_seed = " ".join(f"{loss:.4f}" for loss in losses)
        loss, ms = statistics.median(losses), statistics.median(step_ms)
        print(f"| {name} | {loss:.4f} | {by_seed} | {ms:.0f} |", flush=True)


def starts(data_dir: Path, seeds: list[int], only: list[str]) -> None:
    """Print the losses of the first steps with each initialization."""
    print("| | " + " | ".join(f"step {mark}" for mark in MARKS) + " | val loss |")
    print("|---|" + "---|" * (len(MARKS) + 1))
    for name, flags in STARTS.items():
        if only and name not in only:
            continue
        rows = []
        for seed in seeds:
            records = train("shakespeare_char_cpu", data_dir, seed, (*FIRST_500, *flags))
            loss = {r["step"]: r["loss"] for r in records if r["kind"] == "train"}
            marks = [statistics.mean(loss[i] for i in range(m - 19, m + 1)) for m in MARKS]
            rows.append([*marks, records[-1]["val_loss"]])
        medians = [statistics.median(column) for column in zip(*rows, strict=True)]
        print(f"| {name} | " + " | ".join(f"{value:.3f}" for value in medians) + " |", flush=True)


def contexts(data_dir: Path, seeds: list[int], only: list[str]) -> None:
    """Print the val loss in windows of the training's context and longer ones."""
    print("| | " + " | ".join(f"windows of {context}" for context in CONTEXTS) + " |")
    print("|---|" + "---|" * len(CONTEXTS))
    for name, flags in POSITIONS.items():
        if only and name not in only:
            continue
        readable = CONTEXTS if name != "learned" else (TRAINED_CONTEXT,)
        rows = []
        for seed in seeds:
            with trained("shakespeare_char_fast", data_dir, seed, flags) as run:
                rows.append([loss_in_windows(run, data_dir, context) for context in readable])
        cells = [spread(column) for column in zip(*rows, strict=True)]
        cells += ["-"] * (len(CONTEXTS) - len(cells))
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def loss_in_windows(run: Path, data_dir: Path, context: int) -> float:
    """Return the val loss of a run's best checkpoint in windows of `context` tokens."""
    out_dir = run.with_name(f"evaluated-{context}")
    yuzogpt(
        "evaluate", str(run), "--tasks=loss", f"--data_dir={data_dir}", f"--out_dir={out_dir}",
        f"--context={context}", "--loss_windows=2000", "--batch_size=64", "--num_workers=0",
    )  # fmt: skip
    figures = json.loads((out_dir / "results.json").read_text())["tasks"]["loss"]["figures"]
    loss: float = figures["val_loss"]["value"]
    return loss


def spread(losses: tuple[float, ...]) -> str:
    """Return the median and the range."""
    return f"{statistics.median(losses):.4f} ({min(losses):.4f} to {max(losses):.4f})"


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--table", choices=["parts", "starts", "contexts"], default="parts")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1337])
    parser.add_argument("--only", nargs="+", default=[])
    options = parser.parse_args()
    table = {"parts": parts, "starts": starts, "contexts": contexts}[options.table]
    table(options.data_dir.absolute(), options.seeds, options.only)


if __name__ == "__main__":
    main()
