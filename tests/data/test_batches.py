"""The order of data: a pure function, a permutation each epoch, the same for every world."""

import time

import numpy as np
import pytest

from yuzogpt.data.batches import FixedWindows, Rows, permute
from yuzogpt.data.blocks import TokenStream
from yuzogpt.errors import UserError
from yuzogpt.runtime.world import World


def stream(tokens: int, pieces: int = 3) -> TokenStream:
    """Return the numbers 0 to tokens as a stream of several blocks."""
    return TokenStream(np.array_split(np.arange(tokens, dtype=np.uint32), pieces))


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1000, 4097])
def test_permute_is_a_permutation(size):
    assert sorted(permute(np.arange(size), size, 1, 0)) == list(range(size))


def test_permutations_differ_by_seed_and_epoch():
    orders = {
        tuple(permute(np.arange(500), 500, seed, epoch)) for seed in range(9) for epoch in range(9)
    }
    assert len(orders) == 81


def test_permutation_looks_random():
    # Over many seeds, each window is equally likely first: chi-square with 15 degrees of freedom;
    # its 0.1% point is 37.7. And neighbours do not stay together.
    firsts = [int(permute(np.array([0]), 16, seed, 0)[0]) for seed in range(3200)]
    counts = np.bincount(firsts, minlength=16)
    assert ((counts - 200) ** 2 / 200).sum() < 37.7
    order = permute(np.arange(10_000), 10_000, 1, 0)
    assert (np.abs(np.diff(order)) == 1).sum() < 20  # 2 are expected by chance
    assert abs(np.corrcoef(np.arange(10_000), order)[0, 1]) < 0.05


def test_an_epoch_reads_each_window_once():
    rows = Rows(stream(1000), block_size=16, seed=7)
    first = 0
    for epoch in range(40):  # past the end of a cycle of 16 epochs, twice
        windows, phase = rows.windows(epoch), rows.phase(epoch)
        assert windows == (1000 - 1 - phase) // 16
        starts = rows.starts(first, windows)
        assert sorted(starts) == [phase + 16 * i for i in range(windows)]
        assert rows.locate(first) == (epoch, 0)
        assert rows.locate(first + windows - 1) == (epoch, windows - 1)
        assert rows.dropped(epoch) == 999 - 16 * windows
        first += windows


def test_phases_take_turns():
    rows = Rows(stream(1000), block_size=16, seed=7)
    assert sorted(rows.phase(epoch) for epoch in range(16)) == list(range(16))
    assert sorted(rows.phase(epoch) for epoch in range(16, 32)) == list(range(16))


def test_rows_are_windows_of_the_stream_across_blocks_and_epochs():
    rows = Rows(stream(1000, pieces=7), block_size=16, seed=7).rows(50, 100)
    assert rows.shape == (100, 17)
    assert (np.diff(rows, axis=1) == 1).all()


def test_rows_do_not_depend_on_how_they_are_asked_for():
    rows = Rows(stream(1000), block_size=16, seed=7)
    whole = rows.rows(0, 300)
    assert (np.concatenate([rows.rows(i, 7) for i in range(0, 294, 7)]) == whole[:294]).all()
    assert (Rows(stream(1000, 1), 16, 7).rows(100, 50) == whole[100:150]).all()


@pytest.mark.parametrize("global_rows", [4, 12, 13])
def test_worlds_of_1_2_and_4_draw_the_same_global_batches(global_rows):
    data = Rows(stream(1000), block_size=16, seed=7)
    for step in range(20):
        first = step * global_rows
        expected = data.rows(first, global_rows)
        for size in (1, 2, 4):
            shares = [World(rank, size).rows_for_rank(global_rows) for rank in range(size)]
            drawn = [data.rows(first + share.start, len(share)) for share in shares]
            assert (np.concatenate(drawn) == expected).all()


def test_seeking_far_costs_the_same():
    rows = Rows(stream(100_000), block_size=64, seed=7)

    def seconds(row: int) -> float:
        started = time.perf_counter()
        rows.rows(row, 4)
        return time.perf_counter() - started

    seconds(0)
    near = min(seconds(1) for _ in range(20))
    far = min(seconds(1_000_000_000) for _ in range(20))
    assert far < 3 * near


def test_too_short_a_corpus_is_refused():
    with pytest.raises(UserError, match="lower --block_size"):
        Rows(stream(16), block_size=16, seed=7)
    assert Rows(stream(17), block_size=16, seed=7).rows(0, 40).shape == (40, 17)


def test_fixed_windows_cover_the_split():
    windows = FixedWindows(stream(1000), block_size=16)
    assert len(windows) == 62
    everything = windows.read(windows.spread(0))
    assert (everything[:, :-1].ravel() == np.arange(62 * 16)).all()
    assert windows.spread(5).tolist() == [0, 12, 24, 37, 49]
    assert len(windows.spread(1000)) == 62
