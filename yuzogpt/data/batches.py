"""The order of the data: a row is a pure function of (tokens, seed, block_size, row number).

A row, one training sequence, is a window of block_size + 1 tokens of the stream. Each epoch is a
permutation of the windows that start at phase, phase + block_size, phase + 2 * block_size, ...; the
phase is the epoch's own. (Neighbours share one token: the last target of one is the first input of
the next.) Phases differ, so that windows do not always start at the
same tokens: each cycle of block_size epochs has every phase once, in shuffled order. No table of
rows is kept, and finding a row takes as long in a large corpus as in a small one. A run's position
in the data is one integer, `rows_seen`: this is what makes resuming exact.

Next: rng.py.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from yuzogpt.config import Part
from yuzogpt.data.blocks import TokenStream
from yuzogpt.errors import UserError
from yuzogpt.rng import Uint64s, scramble

Int64s = npt.NDArray[np.int64]

# Indices permuted in one call. A call for fewer takes as long: NumPy's overhead is most of it.
CHUNK = 4096
FEISTEL_ROUNDS = 6  # two more than our tests of uniformity need


@dataclass(frozen=True)
class Rows:
    """The rows of a token stream, in the order that `seed` gives: an endless sequence of epochs."""

    stream: TokenStream
    block_size: int
    seed: int

    def __post_init__(self) -> None:
        """Raise UserError if the stream is shorter than one row."""
        check_split_length("train", len(self.stream), self.block_size)

    def rows(self, first_row: int, count: int) -> Int64s:
        """Return the `count` rows from `first_row` on, shape (count, block_size + 1)."""
        return self.stream.read_rows(self.starts(first_row, count), self.block_size + 1)

    def starts(self, first_row: int, count: int) -> Int64s:
        """Return the position in the stream at which each row starts, shape (count,)."""
        starts = [np.empty(0, np.int64)]
        for epoch, row_in_epoch, length in self._epochs(first_row, count):
            windows = permute_range(row_in_epoch, length, self.windows(epoch), self.seed, epoch)
            starts.append(self.phase(epoch) + windows * self.block_size)
        return np.concatenate(starts)

    def _epochs(self, first_row: int, count: int) -> Iterator[tuple[int, int, int]]:
        """Split a range of rows at the ends of epochs: (epoch, first row in it, number of rows)."""
        while count > 0:
            epoch, row_in_epoch = self.locate(first_row)
            length = min(count, self.windows(epoch) - row_in_epoch)
            yield epoch, row_in_epoch, length
            first_row, count = first_row + length, count - length

    def locate(self, row: int) -> tuple[int, int]:
        """Return the epoch of a row, and the row's number within it.

        The lengths of epochs differ by at most one row, depending on their phases. All cycles are
        equally long, so the search stays within one.
        """
        windows = self._windows_at(np.arange(self.block_size))
        cycle, row = divmod(row, int(windows.sum()))
        ends = np.cumsum(windows[self._phases(cycle)])
        index = int(np.searchsorted(ends, row, side="right"))
        before = int(ends[index - 1]) if index else 0
        return cycle * self.block_size + index, row - before

    def phase(self, epoch: int) -> int:
        """Return the token at which an epoch's first window starts: 0 <= phase < block_size."""
        cycle, index = divmod(epoch, self.block_size)
        return int(self._phases(cycle)[index])

    def windows(self, epoch: int) -> int:
        """Return the number of windows, and so of rows, of an epoch."""
        return int(self._windows_at(np.array(self.phase(epoch))))

    def dropped(self, epoch: int) -> int:
        """Return the number of tokens that are in no window of an epoch."""
        return len(self.stream) - 1 - self.windows(epoch) * self.block_size

    def _windows_at(self, phases: Int64s) -> Int64s:
        # floor((tokens - 1 - phase) / block_size)
        return np.maximum(0, (len(self.stream) - 1 - phases) // self.block_size)

    def _phases(self, cycle: int) -> Int64s:
        return epoch_phases(cycle, self.block_size, self.seed)


@functools.lru_cache(maxsize=4)
def epoch_phases(cycle: int, block_size: int, seed: int) -> Int64s:
    """Return the phase of each epoch of a cycle, (block_size,); cached, as every batch needs it."""
    # -1 - cycle is negative, so its keys differ from those of every epoch.
    phases = permute(np.arange(block_size), block_size, seed, -1 - cycle)
    phases.flags.writeable = False
    return phases


def check_split_length(split: str, tokens: int, block_size: int, part: Part = "whole") -> None:
    """Raise UserError if a split is shorter than one row, or two rows if it is halved."""
    if not tokens:
        change = "a larger" if split == "val" else "a smaller"
        raise UserError(
            f"the {split} split is empty; prepare the corpus with {change} --val_fraction"
        )
    is_half = part in ("first", "second")
    minimum = block_size * (2 if is_half else 1) + 1
    if tokens < minimum:
        reason = (
            "its two halves need 2 * block_size + 1" if is_half else "a row needs block_size + 1"
        )
        raise UserError(
            f"the {split} split has {tokens:,} tokens, {reason} = {minimum:,}; lower --block_size"
        )


def permute_range(first: int, count: int, size: int, seed: int, epoch: int) -> Int64s:
    """Permute the indices from `first` to `first + count - 1`, in cached chunks."""
    chunks = range(first // CHUNK, (first + count - 1) // CHUNK + 1)
    permuted = np.concatenate([permute_chunk(chunk, size, seed, epoch) for chunk in chunks])
    return permuted[first - chunks.start * CHUNK :][:count]


@functools.lru_cache(maxsize=4)
def permute_chunk(chunk: int, size: int, seed: int, epoch: int) -> Int64s:
    """Permute the indices of one chunk; the result is cached, and so not writeable."""
    first = chunk * CHUNK
    permuted = permute(np.arange(first, min(first + CHUNK, size)), size, seed, epoch)
    permuted.flags.writeable = False
    return permuted


def permute(indices: Int64s, size: int, seed: int, epoch: int) -> Int64s:
    """Map each index below `size` to an index below `size`, one to one, pseudorandomly.

    A Feistel network (Luby and Rackoff, 1988) permutes the numbers of 2 * half_bits bits, whatever
    its round function. Results of `size` or more go through it again until they are below it
    ("cycle walking", Black and Rogaway, 2002): 4 times on average at most, without a table.
    """
    half_bits = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    keys = round_keys(seed, epoch)
    out = feistel(indices.astype(np.uint64), half_bits, keys)
    while (outside := np.flatnonzero(out >= size)).size:
        out[outside] = feistel(out[outside], half_bits, keys)
    return out.astype(np.int64)


def feistel(values: Uint64s, half_bits: int, keys: Uint64s) -> Uint64s:
    """Permute the numbers below 2^(2 half_bits), one round per key."""
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> shift, values & mask
    for key in keys:
        left, right = right, left ^ (scramble(right ^ key) & mask)
    return (left << shift) | right


def round_keys(seed: int, epoch: int) -> Uint64s:
    """Derive the keys of the rounds from seed and epoch, shape (FEISTEL_ROUNDS,)."""
    start: Uint64s = scramble(np.array([seed % 2**64], np.uint64))
    start = scramble(start ^ np.array([epoch % 2**64], np.uint64))
    counter: Uint64s = np.arange(1, FEISTEL_ROUNDS + 1, dtype=np.uint64)
    return scramble(start + counter)


@dataclass(frozen=True)
class FixedWindows:
    """The windows of a split on which the validation loss is measured, in stream order.

    `part`: all windows, the first or second half of them (a sweep searches on one and compares on
    the other), or the first window only ("one").
    """

    stream: TokenStream
    block_size: int
    part: Part = "whole"
    split: str = "val"

    def __post_init__(self) -> None:
        """Raise UserError if the split is shorter than one window."""
        check_split_length(self.split, len(self.stream), self.block_size, self.part)

    @property
    def numbers(self) -> range:
        """The numbers, within the split, of the windows of the part."""
        count = (len(self.stream) - 1) // self.block_size
        half = count // 2
        parts = {"whole": (0, count), "first": (0, half), "second": (half, count), "one": (0, 1)}
        return range(*parts[self.part])

    def __len__(self) -> int:
        return len(self.numbers)

    def read(self, indices: Int64s) -> Int64s:
        """Return the windows at indices within the part, shape (len(indices), block_size + 1)."""
        starts = (self.numbers.start + indices) * self.block_size
        return self.stream.read_rows(starts, self.block_size + 1)

    def spread(self, count: int) -> Int64s:
        """Return `count` indices, evenly spaced over the part; all if count is 0."""
        if count == 0 or count >= len(self):
            return np.arange(len(self))
        return np.arange(count) * len(self) // count
