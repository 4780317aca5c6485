"""Two checkouts compute the same: the losses and the weights of seeded runs, to the last bit.

    git worktree add --detach ../before COMMIT
    python benchmarks/same_numbers.py ../before [--only muon fsdp ...]

The presets are made small: two layers of 32 channels, ten to twenty steps on a corpus of 30,000
characters. Each is trained by both checkouts in processes of their own, and then compared: the
records of metrics.jsonl without times, and the SHA-256 of the weights. The corpora, too, are
prepared by both. It prints one line for each, and ends with status 1 if one of them differs.
"""

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
SHAPE = "--n_layer=2 --n_head=2 --n_embd=32 --block_size=16 --batch_size=4".split()
TINY = [*SHAPE, *"--eval_iters=2 --device=cpu --dtype=float32 --threads=1 --compile=False".split()]
STEPS = "--max_iters=20 --eval_interval=10 --log_interval=1".split()
ALONE = "--num_workers=0"
FIGURES = ("loss", "val_loss", "val_loss_estimate", "grad_norm", "lr", "rows_seen")
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]

# Of each run: the preset, its flags, the corpus, and what starts it ("" is this process).
RUNS: dict[str, tuple[str, list[str], str, str]] = {
    "dropout": ("shakespeare_char_cpu", ["--dropout=0.2", ALONE], "char", ""),
    "muon": ("shakespeare_char_fast", [ALONE], "char", ""),
    "gpt2_124m": ("gpt2_124m", ["--gradient_accumulation_steps=2", ALONE], "gpt2", ""),
    "gpt2_124m_fast": ("gpt2_124m_fast", ["--gradient_accumulation_steps=2", ALONE], "gpt2", ""),
    "ddp": ("shakespeare_char_cpu", ["--dropout=0.1"], "char", "torchrun"),
    "fsdp": ("shakespeare_char_cpu", ["--dropout=0.1", "--parallel=fsdp"], "char", "torchrun"),
    "elastic": ("shakespeare_char_cpu", ["--num_workers=1..2"], "char", ""),
    "finetuning": (
        "finetune_shakespeare",
        ["--gradient_accumulation_steps=2", "--freeze_layers=1", "--layer_lr_decay=0.9", ALONE],
        "gpt2",
        "init_from",
    ),
    "trial": ("finetune_shakespeare", ["--gradient_accumulation_steps=2"], "gpt2", "tune"),
}


def run(checkout: Path, work: Path, *arguments: str) -> None:
    """Run one command of a checkout; end with its words if it fails."""
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=work,
        env={**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode:
        sys.exit(f"{checkout}: {' '.join(arguments)}\n{result.stdout}{result.stderr}")


def prepare(checkout: Path, work: Path) -> None:
    """Prepare the corpora."""
    generator = random.Random(0)
    words = "thou art the king of night and all that ends Well.".split()
    lines = (" ".join(generator.choice(words) for _ in range(8)) for _ in range(800))
    (work / "text.txt").write_text("\n".join(lines))
    for tokenizer in ("char", "gpt2"):
        flags = [f"--source={work / 'text.txt'}", f"--data_dir={work / tokenizer}", ALONE]
        run(checkout, work, "-m", "yuzogpt", "prepare", "mine", f"--tokenizer={tokenizer}", *flags)


def train(checkout: Path, work: Path, name: str) -> dict[str, str]:
    """Train one of RUNS; return what it computed."""
    preset, flags, corpus, start = RUNS[name]
    out = work / name
    command = [preset, *TINY, *STEPS, f"--data_dir={work / corpus}", f"--out_dir={out}", *flags]
    if start == "torchrun":
        run(checkout, work, *TORCHRUN, "-m", "yuzogpt.training", *command)
    elif start == "tune":
        # A sweep of one combination beside the settings' own.
        flags = ["--num_samples=1", f"--init_from={pretrained(checkout, work)}"]
        run(checkout, work, "-m", "yuzogpt", "tune", *command, *flags)
        (trial,) = sorted((out / "trials").glob("*"))[:1]
        return results(trial)
    elif start == "init_from":
        begin = f"--init_from={pretrained(checkout, work)}"
        run(checkout, work, "-m", "yuzogpt", "train", *command, begin)
    else:
        run(checkout, work, "-m", "yuzogpt", "train", *command)
    return results(out)


def pretrained(checkout: Path, work: Path) -> Path:
    """Return a run to start from, which is made once."""
    if not (work / "gpt2_124m").exists():
        train(checkout, work, "gpt2_124m")
    return work / "gpt2_124m"


def results(run_dir: Path) -> dict[str, str]:
    """Return the figures of a run, and the SHA-256 of its newest weights."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    figures = [
        [record["kind"], record.get("step"), *(record.get(name) for name in FIGURES)]
        for record in records
        if record["kind"] in ("train", "eval", "final")
    ]
    steps = (run_dir / "checkpoints").glob("step-*")
    newest = max(steps, key=lambda path: int(path.name.removeprefix("step-")))
    weights = hashlib.sha256()
    for path in sorted(newest.glob("model*.safetensors")):
        weights.update(path.read_bytes())
    return {
        "loss": next(str(figure[2]) for figure in figures[::-1] if figure[0] == "train"),
        "weights": weights.hexdigest()[:16],
        "records": hashlib.sha256(json.dumps(figures).encode()).hexdigest()[:16],
    }


def hashes(directory: Path) -> dict[str, str]:
    """Return the SHA-256 of each file of a corpus."""
    files = sorted(path for path in directory.glob("*") if path.suffix in (".arrow", ".json"))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in files}


def main() -> None:
    """Compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("--only", nargs="+", default=list(RUNS), choices=RUNS)
    arguments = parser.parse_args()
    differ = False
    with tempfile.TemporaryDirectory() as folder:
        sides = {"before": arguments.before.resolve(), "now": REPOSITORY}
        work = {side: Path(folder) / side for side in sides}
        for side, checkout in sides.items():
            work[side].mkdir()
            prepare(checkout, work[side])
        for corpus in ("char", "gpt2"):
            before, now = (hashes(work[side] / corpus) for side in sides)
            differ |= before != now
            word = "same" if before == now else f"DIFFERENT  {before}"
            print(f"{word:<10} corpus {corpus:<8} {now}", flush=True)
        for name in arguments.only:
            before, now = (train(checkout, work[side], name) for side, checkout in sides.items())
            differ |= before != now
            word = "same" if before == now else f"DIFFERENT  {before}"
            print(f"{word:<10} {name:<15} {now}", flush=True)
    sys.exit(differ)


if __name__ == "__main__":
    main()
