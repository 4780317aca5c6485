"""Connects the ranks that torchrun starts, also when it restarts them.

When torchrun restarts ranks, it keeps its store (torch 2.13), which still holds the addresses of
dead ranks; a rank that reads one of these hangs or dies. So the ranks agree on a new name for each
attempt, and use a part of the store under that name.
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
from yuzogpt.runtime.network import choose_interface
from yuzogpt.runtime.ranks import LOOPBACK
from yuzogpt.runtime.world import COLLECTIVE_TIMEOUT, World
from yuzogpt.training.agreement import agree_on_settings

RETRY_INTERVAL = timedelta(seconds=1)
ATTEMPT_KEY = "attempt"  # its value: rank 0's name of the newest attempt
COMMAND_KEY = "command"  # its value: the id of the command, the same in all attempts


@contextlib.contextmanager
def process_group(world: World, settings: TrainSettings) -> Iterator[str]:
    """Connect the workers that torchrun started; Ray Train does this itself.

    Yields the id of the command, which is the same on all ranks and in all attempts. UserError on
    all ranks if their settings differ.
    """
    # Before the first collective, or all ranks of a node would take the first GPU.
    on_gpu, mistake = False, ""
    try:
        on_gpu = choose_device(settings.device.device, world).type == "cuda"
    except UserError as error:
        mistake = str(error)
    store, rank, size = next(rendezvous("env://", timeout=COLLECTIVE_TIMEOUT))
    command = command_id(store)
    if size == 1 and not mistake:
        yield command
        return
    attempt_store = PrefixStore(agree_on_attempt(store, rank, size), store)
    agree_on_settings(PrefixStore("agreement", attempt_store), world, settings, mistake)
    if world.local_size == world.size:  # all on one machine
        choose_interface(LOOPBACK)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=attempt_store,
        rank=rank,
        world_size=size,
        timeout=COLLECTIVE_TIMEOUT,
    )
    try:
        yield command
    finally:
        dist.destroy_process_group()


def command_id(store: Store) -> str:
    """Return the id of the command that started this rank; the first rank to ask creates it.

    TORCHELASTIC_RUN_ID does not serve: it is "none" unless the user sets it.
    """
    return str(store.compare_set(COMMAND_KEY, "", secrets.token_hex(8)).decode())


def agree_on_attempt(store: Store, rank: int, size: int) -> str:
    """Return a name that is the same on all ranks of this attempt, and new.

    A rank that still reads the previous attempt's name gets no answer under it, since each rank
    asks with a random name of its own; it then reads the name again.
    """
    mine = secrets.token_hex(8)
    if rank == 0:
        store.set(ATTEMPT_KEY, mine)
        others = [store.get(f"{mine}/{other}").decode() for other in range(1, size)]
        for other in others:
            store.set(f"{mine}/{other}", "ready")
        return mine
    while True:
        newest: str = store.get(ATTEMPT_KEY).decode()
        store.set(f"{newest}/{rank}", mine)
        with contextlib.suppress(dist.DistStoreError):  # not in time
            store.wait([f"{newest}/{mine}"], RETRY_INTERVAL)
            return newest
