"""The order of data: (tokens, seed, block_size, row number) -> a row. A pure function, no state.

In: the token stream of the train split. Out: `rows(first_row, count)`: windows of block_size + 1
tokens. Each epoch is a permutation of the windows that lie end to end from a phase on, without
replacement; the phase changes with each epoch, so that windows do not always start at the same
tokens. Any row is found in the same time, and a run's place in the data is one integer.
Next on the line: training/loop.py.
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

AT_ONCE = 4096  # indices
ROUNDS = 6  # of the Feistel network below; 4 already pass the tests


@dataclass(frozen=True)
class Rows:
    """The rows of a token stream, in the order that `seed` gives them, for ever."""

    stream: TokenStream
    block_size: int
    seed: int

    def __post_init__(self) -> None:
        """Refuse a stream that has not even one row."""
        check_split_length("train", len(self.stream), self.block_size)

    def rows(self, first_row: int, count: int) -> Int64s:
        """Return rows `first_row` to `first_row + count`, shape (count, block_size + 1)."""
        return self.stream.read_rows(self.starts(first_row, count), self.block_size + 1)

    def starts(self, first_row: int, count: int) -> Int64s:
        """Return where in the stream each row starts, shape (count,)."""
        pieces = [np.empty(0, np.int64)]
        for epoch, row, length in self._epochs(first_row, count):
            windows = permuted(row, length, self.windows(epoch), self.seed, epoch)
            pieces.append(self.phase(epoch) + windows * self.block_size)
        return np.concatenate(pieces)

    def _epochs(self, first_row: int, count: int) -> Iterator[tuple[int, int, int]]:
        """Cut a range of rows where epochs end: (epoch, first row within it, rows)."""
        while count > 0:
            epoch, row = self.locate(first_row)
            length = min(count, self.windows(epoch) - row)
            yield epoch, row, length
            first_row, count = first_row + length, count - length

    def locate(self, row: int) -> tuple[int, int]:
        """Return the epoch that a row belongs to, and its number within that epoch.

        Epochs differ by at most one row, by their phase. Every cycle of block_size epochs has
        each phase once, so all cycles are equally long, and the search stays within one.
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
        """Return the rows of an epoch: floor((tokens - 1 - phase) / block_size)."""
        return int(self._windows_at(np.array(self.phase(epoch))))

    def dropped(self, epoch: int) -> int:
        """Return how many tokens an epoch never predicts: those before and after its windows."""
        return len(self.stream) - 1 - self.windows(epoch) * self.block_size

    def _windows_at(self, phases: Int64s) -> Int64s:
        return np.maximum(0, (len(self.stream) - 1 - phases) // self.block_size)

    def _phases(self, cycle: int) -> Int64s:
        return phases_of(cycle, self.block_size, self.seed)


@functools.lru_cache(maxsize=4)
def phases_of(cycle: int, block_size: int, seed: int) -> Int64s:
    """Return the phase of each epoch of a cycle: every batch asks for it.

    An epoch number that no real epoch has keeps this permutation apart from the windows'.
    """
    phases = permute(np.arange(block_size), block_size, seed, -1 - cycle)
    phases.flags.writeable = False
    return phases


def check_split_length(split: str, tokens: int, block_size: int, part: Part = "whole") -> None:
    """Raise UserError if a split has fewer tokens than one row, or than one for each half."""
    if not tokens:
        raise UserError(
            f"the {split} split is empty; prepare the corpus with a larger --val_fraction"
        )
    is_half = part in ("first", "second")
    rows, needs = ("its two halves need", "2 * ") if is_half else ("a row needs", "")
    least = block_size * (2 if is_half else 1) + 1
    if tokens < least:
        raise UserError(
            f"the {split} split has {tokens:,} tokens, {rows} "
            f"{needs}block_size + 1 = {least:,}; lower --block_size"
        )


def permuted(first: int, count: int, size: int, seed: int, epoch: int) -> Int64s:
    """Map the indices `first` to `first + count`: see `permute`.

    Few at a time would cost as much as thousands, so thousands are kept.
    """
    pieces = range(first // AT_ONCE, (first + count - 1) // AT_ONCE + 1)
    found = np.concatenate([piece_of_order(piece, size, seed, epoch) for piece in pieces])
    return found[first - pieces.start * AT_ONCE :][:count]


@functools.lru_cache(maxsize=4)
def piece_of_order(piece: int, size: int, seed: int, epoch: int) -> Int64s:
    """Map the indices of one piece, of AT_ONCE; whoever reads it copies."""
    first = piece * AT_ONCE
    return permute(np.arange(first, min(first + AT_ONCE, size)), size, seed, epoch)


def permute(indices: Int64s, size: int, seed: int, epoch: int) -> Int64s:
    """Map each index below `size` to another, one to one, in a way that looks random.

    A Feistel network (Luby and Rackoff, 1988) is a permutation of the numbers of 2k bits whatever
    its round function; results past `size` go through it again until they fall below ("cycle
    walking", Black and Rogaway, 2002). So the n-th element costs the same for every n, and no
    table is kept.
    """
    half_bits = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    keys = round_keys(seed, epoch)
    out = feistel(indices.astype(np.uint64), half_bits, keys)
    while (outside := np.flatnonzero(out >= size)).size:
        out[outside] = feistel(out[outside], half_bits, keys)
    return out.astype(np.int64)


def feistel(values: Uint64s, half_bits: int, keys: Uint64s) -> Uint64s:
    """Permute the numbers below 2^(2 half_bits), one round a key."""
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> shift, values & mask
    for key in keys:
        left, right = right, left ^ (scramble(right ^ key) & mask)
    return (left << shift) | right


def round_keys(seed: int, epoch: int) -> Uint64s:
    """Derive the keys of the rounds from seed and epoch, shape (ROUNDS,)."""
    start: Uint64s = scramble(np.array([seed % 2**64], np.uint64))
    start = scramble(start ^ np.array([epoch % 2**64], np.uint64))
    counter: Uint64s = np.arange(1, ROUNDS + 1, dtype=np.uint64)
    return scramble(start + counter)


@dataclass(frozen=True)
class FixedWindows:
    """Non-overlapping windows of a split, in stream order: what a loss is measured on."""

    stream: TokenStream
    block_size: int
    part: Part = "whole"
    split: str = "val"

    def __post_init__(self) -> None:
        """Refuse a split that has not even one window."""
        check_split_length(self.split, len(self.stream), self.block_size, self.part)

    @property
    def numbers(self) -> range:
        """Which windows of the split these are."""
        count = (len(self.stream) - 1) // self.block_size
        half = count // 2
        parts = {"whole": (0, count), "first": (0, half), "second": (half, count), "one": (0, 1)}
        return range(*parts[self.part])

    def __len__(self) -> int:
        """Count the windows."""
        return len(self.numbers)

    def read(self, indices: Int64s) -> Int64s:
        """Return the windows of these numbers, shape (len(indices), block_size + 1)."""
        starts = (self.numbers.start + indices) * self.block_size
        return self.stream.read_rows(starts, self.block_size + 1)

    def spread(self, count: int) -> Int64s:
        """Return `count` window numbers, evenly spaced over the split; all, if count is 0."""
        if count == 0 or count >= len(self):
            return np.arange(len(self))
        return np.arange(count) * len(self) // count
