"""How the ranks that torchrun starts find each other, also when it starts them again.

In: torchrun's store. Out: a process group, and an id of the command. torchrun keeps its store when
it starts ranks again (torch 2.13), and in it the addresses of those that are gone; who reads one of
them waits for ever, or dies. So the ranks agree on a name for each attempt, below which nothing is
written yet.
"""

import contextlib
import secrets
from collections.abc import Iterator
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from yuzogpt.config import TrainSettings
from yuzogpt.errors import UserError
from yuzogpt.runtime.device import choose_device
from yuzogpt.runtime.network import LOOPBACK, choose_interface
from yuzogpt.runtime.world import COLLECTIVE_TIMEOUT, World
from yuzogpt.training.agreement import agree_on_settings

ASK_EVERY = timedelta(seconds=1)
NEWEST = "attempt"  # under this name rank 0 says which one begins
COMMAND = "command"  # under this one is the id of the command, in all attempts


@contextlib.contextmanager
def process_group(world: World, settings: TrainSettings) -> Iterator[str]:
    """Connect the workers that torchrun started; Ray Train does this itself.

    Yields the id of the command: the same on all ranks, and in all attempts. UserError on all ranks
    if their settings differ.
    """
    # Before the first collective, or all ranks of a node would take the first GPU.
    on_gpu, mistake = False, ""
    try:
        on_gpu = choose_device(settings.device.device, world).type == "cuda"
    except UserError as error:
        mistake = str(error)
    store, rank, size = next(rendezvous("env://", timeout=COLLECTIVE_TIMEOUT))
    command = command_of(store)
    if size == 1 and not mistake:
        yield command
        return
    of_attempt = PrefixStore(attempt(store, rank, size), store)
    agree_on_settings(PrefixStore("agreement", of_attempt), world, settings, mistake)
    if world.local_size == world.size:  # all on one machine
        choose_interface(LOOPBACK)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=of_attempt,
        rank=rank,
        world_size=size,
        timeout=COLLECTIVE_TIMEOUT,
    )
    try:
        yield command
    finally:
        dist.destroy_process_group()


def command_of(store: Store) -> str:
    """Return the id of the command that started this rank: the first rank to ask makes it.

    TORCHELASTIC_RUN_ID is none: it is "none" unless the user gives one.
    """
    return str(store.compare_set(COMMAND, "", secrets.token_hex(8)).decode())


def attempt(store: Store, rank: int, size: int) -> str:
    """Return a name that all ranks of this attempt have, and none of an earlier one.

    A rank that still finds the last attempt's name is not answered there: it asks with a name of
    its own.
    """
    mine = secrets.token_hex(8)
    if rank == 0:
        store.set(NEWEST, mine)
        others = [store.get(f"{mine}/{other}").decode() for other in range(1, size)]
        for other in others:
            store.set(f"{mine}/{other}", "all are here")
        return mine
    while True:
        newest: str = store.get(NEWEST).decode()
        store.set(f"{newest}/{rank}", mine)
        with contextlib.suppress(dist.DistStoreError):  # not within that time
            store.wait([f"{newest}/{mine}"], ASK_EVERY)
            return newest
