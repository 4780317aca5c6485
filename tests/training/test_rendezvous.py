"""How ranks find each other in a store that still has what an earlier attempt left in it."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch.distributed import HashStore

from tests.conftest import tiny_settings
from tests.training.worlds import exit_codes, start_world
from tests.waiting import wait_until
from yuzogpt.runtime.network import interface_of
from yuzogpt.runtime.ranks import LOOPBACK
from yuzogpt.training import launch
from yuzogpt.training.rendezvous import ATTEMPT_KEY, agree_on_attempt, command_id


def test_ranks_agree_on_a_name_that_no_earlier_attempt_had():
    """Also those that begin before rank 0 does, and find the last attempt's name."""
    store = HashStore()
    command = command_id(store)
    with ThreadPoolExecutor(3) as ranks:
        first = set(ranks.map(lambda rank: agree_on_attempt(store, rank, 3), range(3)))
        assert len(first) == 1
        before = store.get(ATTEMPT_KEY)
        assert {before.decode()} == first
        asked = store.get(f"{before.decode()}/2")
        others = [ranks.submit(agree_on_attempt, store, rank, 3) for rank in (1, 2)]
        wait_until(lambda: store.get(f"{before.decode()}/2") != asked)
        second = {agree_on_attempt(store, 0, 3), *(other.result(60) for other in others)}
    assert len(second) == 1
    assert second != first
    # What the first attempt wrote is not to be deleted by the second: the command is the same.
    assert command_id(store) == command
    assert command_id(HashStore()) != command


class NotesInterface:
    """Has a rank write down by which interface gloo connects it, in place of training."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def __call__(self, rank: int) -> None:
        os.environ.pop("GLOO_SOCKET_IFNAME", None)

        def work(*_: object, **__: object) -> str:
            (self.directory / str(rank)).write_text(os.environ["GLOO_SOCKET_IFNAME"])
            return "noted"

        launch.work = work


def test_ranks_of_one_machine_meet_on_the_loopback(corpus_dir, tmp_path):
    """Left alone, gloo takes the address that the host's name leads to."""
    settings = tiny_settings(corpus_dir, tmp_path / "run")
    exit_codes(start_world(2, settings, NotesInterface(tmp_path)))
    assert [(tmp_path / rank).read_text() for rank in "01"] == [interface_of(LOOPBACK)] * 2
