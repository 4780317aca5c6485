"""Compare two learning rates from Python: `python examples/api.py book.txt`, any text of yours.

mypy checks this file; docs/python.md describes what it calls.
"""

import math
import sys

import yuzogpt


def main(text: str) -> None:
    """Train a small model twice, and show what the better one writes."""
    corpus = yuzogpt.prepare(text)
    runs: list[yuzogpt.Run] = [
        yuzogpt.train(
            "shakespeare_char_fast",
            data_dir=corpus.directory,
            out_dir=f"out-lr-{learning_rate}",
            learning_rate=learning_rate,
            max_iters=20,
            num_workers=0,
        )
        for learning_rate in (3e-4, 3e-3)
    ]
    best = min(runs, key=lambda run: run.val_loss or math.inf)
    print(f"{best.out_dir}: val loss {best.val_loss}")
    model: yuzogpt.LanguageModel = best.load()
    for piece in model.stream("the ", max_new_tokens=100):
        print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    main(sys.argv[1])
