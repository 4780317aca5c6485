"""The task `loss`: mean losses on both splits of a prepared corpus, as nanoGPT reports them.

It scores evenly spaced windows and gives the standard error of each mean over windows.
"""

import math
import statistics
from collections.abc import Sequence

from yuzogpt.data.batches import FixedWindows
from yuzogpt.data.remote import open_anywhere
from yuzogpt.errors import UserError
from yuzogpt.evaluation.benchmarks.readers import Metric, PreparedTask, TaskOptions
from yuzogpt.evaluation.passages import Passage, Score
from yuzogpt.tokenization.tokenizer import fingerprint

LOSS = "loss"  # the task's name
SPLITS = ("train", "val")
# nanoGPT's README: the four sizes of GPT-2 on OpenWebText.
NANOGPT = {"train_loss": (3.11, 2.85, 2.66, 2.56), "val_loss": (3.12, 2.84, 2.67, 2.54)}


def prepare_loss(directory: str, options: TaskOptions, count: int) -> PreparedTask:
    """Read `count` windows of each split of a corpus; 0: all."""
    corpus = open_anywhere(directory)
    if corpus.manifest.tokenizer["fingerprint"] != fingerprint(options.tokenizer):
        raise UserError(f"{directory}: prepared with another tokenizer than the model's")
    corpus.verify()
    passages, sizes, unread = list[Passage](), list[int](), 0
    for split in SPLITS:
        windows = FixedWindows(corpus.stream(split), options.block_size, split=split)
        rows = windows.read(windows.spread(options.limit or count))
        passages += [Passage(tuple(row.tolist()), options.block_size) for row in rows]
        sizes.append(len(rows))
        unread += len(windows) - len(rows)

    def compute_metrics(scores: Sequence[Score]) -> list[Metric]:
        metrics, first = [], 0
        for split, size in zip(SPLITS, sizes, strict=True):
            of_split = scores[first : first + size]
            first += size
            losses = [-score.logprob / options.block_size for score in of_split]
            error = statistics.stdev(losses) / math.sqrt(size) if size > 1 else math.nan
            tokens = size * options.block_size
            metrics += [
                Metric(f"{split}_loss", statistics.fmean(losses), tokens, "tokens"),
                Metric(f"{split}_standard_error", error, size, "windows"),
            ]
        return metrics

    notes: dict[str, str | int] = {
        "corpus": corpus.manifest.corpus,
        "window": options.block_size,
        "loss_windows": count if unread else 0,  # 0: all
    }
    return PreparedTask(passages, compute_metrics, notes)
