"""The loss on a prepared corpus: the brief's table of four models on OpenWebText.

In: a corpus, and a model that speaks its tokens. Out: an exam whose figures are the mean losses of
both splits, each with its standard error: that of the mean over windows, which are evenly spaced.
"""

import math
import statistics
from collections.abc import Sequence

from yuzogpt.data.batches import FixedWindows
from yuzogpt.data.remote import open_anywhere
from yuzogpt.errors import UserError
from yuzogpt.evaluation.benchmarks.tasks import Figure, PreparedTask, TaskOptions
from yuzogpt.evaluation.passages import Passage, Score
from yuzogpt.tokenization.tokenizer import fingerprint

LOSS = "loss"  # what the task is called
SPLITS = ("train", "val")
# What nanoGPT's README has of the four sizes on OpenWebText.
NANOGPT = {"train_loss": (3.11, 2.85, 2.66, 2.56), "val_loss": (3.12, 2.84, 2.67, 2.54)}


def loss_exam(directory: str, reading: TaskOptions, count: int) -> PreparedTask:
    """Read so many windows of each split of a corpus; 0: all that there are."""
    corpus = open_anywhere(directory)
    if corpus.manifest.tokenizer["fingerprint"] != fingerprint(reading.tokenizer):
        raise UserError(f"{directory}: prepared with another tokenizer than the model's")
    corpus.verify()
    passages, sizes, left = list[Passage](), list[int](), 0
    for split in SPLITS:
        windows = FixedWindows(corpus.stream(split), reading.block_size, split=split)
        rows = windows.read(windows.spread(reading.limit or count))
        passages += [Passage(tuple(row.tolist()), reading.block_size) for row in rows]
        sizes.append(len(rows))
        left += len(windows) - len(rows)

    def judge(scores: Sequence[Score]) -> list[Figure]:
        figures, first = [], 0
        for split, size in zip(SPLITS, sizes, strict=True):
            mine = scores[first : first + size]
            first += size
            losses = [-score.logprob / reading.block_size for score in mine]
            error = statistics.stdev(losses) / math.sqrt(size) if size > 1 else math.nan
            tokens = size * reading.block_size
            figures += [
                Figure(f"{split}_loss", statistics.fmean(losses), tokens, "tokens"),
                Figure(f"{split}_standard_error", error, size, "windows"),
            ]
        return figures

    notes: dict[str, str | int] = {
        "corpus": corpus.manifest.corpus,
        "window": reading.block_size,
        "loss_windows": count if left else 0,  # 0: all
    }
    return PreparedTask(passages, judge, notes)
