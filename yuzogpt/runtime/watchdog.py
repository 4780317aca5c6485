"""Hangs: which rank stands still, and an end to it within a bound.

In: signs of progress of the loop on each rank. Out: nothing, or a line that names the rank, and the
end of the process, so that the launcher starts the workers again. When one rank stops, all others
wait for it in a collective, and none of them gets an error. So a thread of each rank tells the
others, over the store that connected them, that it lives and how far its loop is.
"""

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist

from yuzogpt.runtime.world import World

EXIT_STATUS = 75  # EX_TEMPFAIL: to be tried again
START_UP = 10.0  # times the bound, before the first step: compiling takes its time
SLOWEST = 3.0  # times the longest part of the first step: a large model on a slow machine


@dataclass
class Peer:
    """What was last heard of a rank, and when, by this process's clock."""

    beat: int = -1
    progress: int = -1
    place: str = "starting"
    host: str = ""
    heard: float = field(default_factory=time.monotonic)

    def hear(self, said: dict[str, Any]) -> None:
        """Take in what a rank said."""
        if said["beat"] != self.beat:
            self.heard = time.monotonic()
        self.beat, self.progress = said["beat"], said["progress"]
        self.place, self.host = said["place"], said["host"]


class Watchdog:
    """A context manager around the loop."""

    def __init__(self, world: World, timeout: float, on_stall: Callable[[str], None]) -> None:
        """`timeout` in seconds; `on_stall` is called with the line, on one rank, before the end."""
        self.world, self.timeout, self.on_stall = world, timeout, on_stall
        self.pause = min(5.0, timeout / 10)
        self.progress, self.place, self.moved = 0, "starting", time.monotonic()
        self.patience = START_UP * timeout
        self.is_starting, self.longest = True, 0.0  # seconds, of the first step's parts
        self.peers = {rank: Peer() for rank in range(world.size) if rank != world.rank}
        self.done = threading.Event()

    def __enter__(self) -> "Watchdog":
        """Start watching."""
        # Two threads: talking lasts for ever when rank 0, which keeps the store, stands still.
        for job in (self._talk, self._watch) if self.peers else (self._watch,):
            threading.Thread(target=job, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop watching; call it on all ranks, after the last collective."""
        self.done.set()

    def moves(self, place: str = "") -> None:
        """Say that this rank's loop goes on, and where it is."""
        before, self.moved = self.moved, time.monotonic()
        if self.is_starting:
            self.longest = max(self.longest, self.moved - before)
        self.progress, self.place = self.progress + 1, place or self.place

    def begin_first_step(self) -> None:
        """Say that the first step begins: what came before tells nothing of how long steps take."""
        self.moved, self.longest = time.monotonic(), 0.0

    def end_start_up(self) -> None:
        """Say that a step was made: from now on the bound is the bound."""
        self.is_starting = False
        self.patience = max(self.timeout, SLOWEST * self.longest)

    def allow_long_reads(self) -> None:
        """Say that one rank will read checkpoints for long, while the others wait for it."""
        self.patience = START_UP * self.timeout

    def _talk(self) -> None:
        """Tell the other ranks how far this one is, and listen to them."""
        store = dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
        host, beat = os.uname().nodename, 0
        while not self.done.wait(self.pause):
            beat += 1
            said = {"beat": beat, "progress": self.progress, "place": self.place, "host": host}
            with contextlib.suppress(RuntimeError):  # the store is gone: its rank ends, or is dead
                store.set(self._key(self.world.rank), json.dumps(said))
                for rank, peer in self.peers.items():
                    if store.check([self._key(rank)]):
                        peer.hear(json.loads(store.get(self._key(rank))))

    def _watch(self) -> None:
        """End this process when its loop has not moved for too long."""
        while not self.done.wait(self.pause):
            if time.monotonic() - self.moved > self.patience and not self.done.is_set():
                self._end()

    @staticmethod
    def _key(rank: int) -> str:
        return f"yuzogpt/watchdog/{rank}"

    def _end(self) -> None:
        """Name the rank that stands still, on the first of those that live, and end here."""
        silent = self.blame(self.peers)
        everyone = {self.world.rank, *self.peers}
        speaker = min(everyone - silent.keys(), default=min(everyone))
        try:
            if speaker == self.world.rank:
                self.on_stall("; ".join(silent.values()))
            else:
                time.sleep(self.pause)  # let that one say it first
        finally:
            os._exit(EXIT_STATUS)

    def blame(self, peers: dict[int, Peer]) -> dict[int, str]:
        """Return the ranks that hold up the others, and what to say of each."""
        now = time.monotonic()
        quiet = {rank: now - peer.heard for rank, peer in peers.items()}
        dead = {rank: since for rank, since in quiet.items() if since > self.patience / 2}
        if 0 in dead and len(dead) == len(peers):
            dead = {0: dead[0]}  # nothing is heard of the others without it
        if dead:
            return {
                rank: f"worker {rank} on {peers[rank].host or 'its host'} gives no sign of life "
                f"for {since:.0f} s (last: {peers[rank].place})"
                for rank, since in dead.items()
            }
        own = Peer(0, self.progress, self.place, os.uname().nodename)
        everyone = {**peers, self.world.rank: own}
        least = min(peer.progress for peer in everyone.values())
        return {
            rank: f"worker {rank} on {peer.host} stands still for {now - self.moved:.0f} s at "
            f"{peer.place}"
            for rank, peer in everyone.items()
            if peer.progress == least
        }
