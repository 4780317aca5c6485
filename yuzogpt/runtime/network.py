"""How fast the ranks of a world reach each other, by the collectives that training uses.

In: a world, on all of its ranks at once. Out: the same figures on each of them. Milliseconds on a
sound network, so that a run can measure it again and again.
"""

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import psutil
import torch
import torch.distributed as dist

from yuzogpt.runtime.world import World

TRIES = 5
# float32, of which a rank sends to the next: as much as shows how fast the way is.
NUMBERS = {"cpu": 2**18, "cuda": 2**24}


@dataclass(frozen=True)
class Network:
    """What was measured."""

    latency: float  # seconds of an all-reduce of one number, the median
    bandwidth: float  # bits a second that each rank sends in an all-reduce of many numbers
    slowest: tuple[int, int]  # the slowest hop of a ring of all ranks: from this one to that one
    slowest_bandwidth: float  # bits a second


def measure(world: World, device: torch.device) -> Network:
    """Measure the network; call it on every rank of a world of two or more."""
    one, many = (
        torch.zeros(1, device=device),
        torch.zeros(NUMBERS[device.type], device=device),
    )
    latency = statistics.median(timed(lambda: dist.all_reduce(one), device) for _ in range(TRIES))
    seconds = min(timed(lambda: dist.all_reduce(many), device) for _ in range(2))
    bits = 8 * many.nbytes
    after, before = (world.rank + 1) % world.size, (world.rank - 1) % world.size
    arrived = torch.empty_like(many)

    def pass_on() -> None:
        hops = [dist.P2POp(dist.isend, many, after), dist.P2POp(dist.irecv, arrived, before)]
        for work in dist.batch_isend_irecv(hops):
            work.wait()

    hop = min(timed(pass_on, device) for _ in range(2))
    # A rank waits for both of its hops. A slow one shows at both of its ends.
    times = world.gather(hop)
    hops = [min(times[rank - 1], times[rank]) for rank in range(world.size)]  # to `rank`
    worst = max(range(world.size), key=hops.__getitem__)
    return Network(
        latency=statistics.median(world.gather(latency)),
        bandwidth=2 * (world.size - 1) / world.size * bits / max(world.gather(seconds)),
        slowest=((worst - 1) % world.size, worst),
        slowest_bandwidth=bits / hops[worst],
    )


LOOPBACK = "127.0.0.1"


def interface_of(address: str) -> str | None:
    """Return the network interface of this machine that has an address, as 10.0.0.7."""
    for name, found in psutil.net_if_addrs().items():
        if any(one.address == address for one in found):
            return name
    return None


def choose_interface(address: str) -> None:
    """Let this process's collectives take the interface of an address; what the user set stays."""
    if interface := interface_of(address):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")  # exactly this one


def timed(job: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that a job takes, from when all ranks are there."""
    dist.barrier()
    began = time.perf_counter()
    job()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began
