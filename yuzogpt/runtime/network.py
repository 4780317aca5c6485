"""Latency and bandwidth between the ranks, measured with the collectives that training uses.

All ranks measure together, and get the same figures. On a healthy network it takes milliseconds, so
that a run can repeat it.
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

LATENCY_TRIES = 5
# float32 numbers sent to the next rank: enough to measure bandwidth rather than latency.
BANDWIDTH_NUMBERS = {"cpu": 2**18, "cuda": 2**24}


@dataclass(frozen=True)
class Network:
    """The result of a measurement."""

    latency: float  # seconds of an all-reduce of one number, the median
    bandwidth: float  # bits per second that each rank sends in an all-reduce of many numbers
    slowest: tuple[int, int]  # the slowest hop of a ring of all ranks: from this one to that one
    slowest_bandwidth: float  # bits per second


def measure(world: World, device: torch.device) -> Network:
    """Measure the network; call it on every rank of a world of two or more."""
    small = torch.zeros(1, device=device)
    large = torch.zeros(BANDWIDTH_NUMBERS[device.type], device=device)
    latency = statistics.median(
        timed(lambda: dist.all_reduce(small), device) for _ in range(LATENCY_TRIES)
    )
    seconds = min(timed(lambda: dist.all_reduce(large), device) for _ in range(2))
    bits = 8 * large.nbytes
    next_rank, previous_rank = (world.rank + 1) % world.size, (world.rank - 1) % world.size
    received = torch.empty_like(large)

    def send_to_next() -> None:
        hops = [
            dist.P2POp(dist.isend, large, next_rank),
            dist.P2POp(dist.irecv, received, previous_rank),
        ]
        for work in dist.batch_isend_irecv(hops):
            work.wait()

    hop = min(timed(send_to_next, device) for _ in range(2))
    # A rank waits for both of its hops, so a slow hop shows at both of its ends.
    times = world.gather(hop)
    hops = [min(times[rank - 1], times[rank]) for rank in range(world.size)]  # to `rank`
    worst = max(range(world.size), key=hops.__getitem__)
    return Network(
        latency=statistics.median(world.gather(latency)),
        bandwidth=2 * (world.size - 1) / world.size * bits / max(world.gather(seconds)),
        slowest=((worst - 1) % world.size, worst),
        slowest_bandwidth=bits / hops[worst],
    )


def interface_of(address: str) -> str | None:
    """Return this machine's network interface with an address such as 10.0.0.7."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(known.address == address for known in addresses):
            return name
    return None


def choose_interface(address: str) -> None:
    """Make collectives use the interface of an address, unless the user chose one."""
    if interface := interface_of(address):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")  # =: exactly this one


def timed(job: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that a job takes, once all ranks are ready."""
    dist.barrier()
    began = time.perf_counter()
    job()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began
