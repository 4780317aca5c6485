"""Hold what `make quickstart` left to its promises: python tests/check_quickstart.py.

The val loss over the whole split must be what the recipe reaches on its corpus, and the losses
under Ray Train must be those of the same command in one process, bit for bit.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

# Measured at 2,000 steps (benchmarks/README.md): 1.8876 and 1.9059 with the default seed. Other
# seeds are up to 0.024 away; the default one repeats itself.
LIMITS = {"shakespeare_char": 1.91, "shakespeare_plays_char": 1.93}
STEPS_COMPARED = 50


def read_records(run: Path) -> list[dict[str, float | str]]:
    """Return the records of a run."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> dict[float | str, float | str]:
    """Return the loss of each step that was logged."""
    return {r["step"]: r["loss"] for r in read_records(run) if r["kind"] == "train"}


def main() -> None:
    """Check the one run that is there."""
    (run,) = Path().glob("out-quickstart-*")
    corpus = run.name.removeprefix("out-quickstart-")
    final = read_records(run)[-1]
    assert final["kind"] == "final"
    assert final["step"] == 2000
    assert float(final["val_loss"]) <= LIMITS[corpus], final
    assert (run / "loss.png").exists()
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "-m", "yuzogpt", "train", "shakespeare_char_cpu"]
        command += [f"--dataset={corpus}", f"--out_dir={directory}", "--num_workers=0"]
        command += [f"--max_iters={STEPS_COMPARED}"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        in_process, on_ray = losses(Path(directory)), losses(run)
    assert len(in_process) == STEPS_COMPARED // 10
    assert all(on_ray[step] == loss for step, loss in in_process.items())
    print(f"quickstart: val loss {final['val_loss']:.4f} on {corpus}; same bits without Ray")


if __name__ == "__main__":
    main()
