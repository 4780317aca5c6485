"""How ranks find each other in a store that still has what an earlier attempt left in it."""

from concurrent.futures import ThreadPoolExecutor

from torch.distributed import HashStore

from tests.waiting import wait_until
from yuzogpt.training.rendezvous import NEWEST, attempt, command_of


def test_ranks_agree_on_a_name_that_no_earlier_attempt_had():
    """Also those that begin before rank 0 does, and find the last attempt's name."""
    store = HashStore()
    command = command_of(store)
    with ThreadPoolExecutor(3) as ranks:
        first = set(ranks.map(lambda rank: attempt(store, rank, 3), range(3)))
        assert len(first) == 1
        before = store.get(NEWEST)
        assert {before.decode()} == first
        asked = store.get(f"{before.decode()}/2")
        others = [ranks.submit(attempt, store, rank, 3) for rank in (1, 2)]
        wait_until(lambda: store.get(f"{before.decode()}/2") != asked)
        second = {attempt(store, 0, 3), *(other.result(60) for other in others)}
    assert len(second) == 1
    assert second != first
    # What the first attempt wrote is not to be deleted by the second: the command is the same.
    assert command_of(store) == command
    assert command_of(HashStore()) != command
