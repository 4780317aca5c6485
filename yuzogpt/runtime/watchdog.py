"""Finds the rank that hangs, and ends the workers, so that the launcher can restart them.

When one rank hangs, all others wait for it in a collective, and none of them gets an error. So
each rank sends heartbeats, with the progress of its loop, over the store that connected the ranks.
A rank whose loop makes no progress for too long names the rank to blame, and exits.
"""

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from yuzogpt.runtime.torch_internals import default_store
from yuzogpt.runtime.world import World

EXIT_STATUS = 75  # EX_TEMPFAIL: try again
MAX_INTERVAL_S = 5.0  # between heartbeats
START_UP_FACTOR = 10.0  # of the timeout, before the first step: compiling takes time
FIRST_STEP_FACTOR = 3.0  # of the longest part of the first step: large models, slow machines


@dataclass
class Peer:
    """The last heartbeat of another rank, and when it came, by this process's clock."""

    beat: int = -1
    progress: int = -1
    phase: str = "starting"
    host: str = ""
    heard: float = field(default_factory=time.monotonic)

    def update(self, message: dict[str, Any]) -> None:
        """Take in a message; one that was seen before is no new heartbeat."""
        if message["beat"] != self.beat:
            self.heard = time.monotonic()
        self.beat, self.progress = message["beat"], message["progress"]
        self.phase, self.host = message["phase"], message["host"]


class Watchdog:
    """A context manager around the loop."""

    def __init__(self, world: World, timeout: float, on_stall: Callable[[str], None]) -> None:
        """`timeout` in seconds; `on_stall` gets the message, on one rank, before the exit."""
        self.world, self.timeout, self.on_stall = world, timeout, on_stall
        self.interval = min(MAX_INTERVAL_S, timeout / 10)
        self.progress, self.phase, self.last_progress = 0, "starting", time.monotonic()
        self.timeout_now = START_UP_FACTOR * timeout
        self.is_starting, self.longest = True, 0.0  # seconds, of the parts of the first step
        self.peers = {rank: Peer() for rank in range(world.size) if rank != world.rank}
        self.done = threading.Event()

    def __enter__(self) -> "Watchdog":
        store = default_store() if self.peers else None
        if store is None:  # then each rank only watches itself
            self.peers = {}
        else:  # a thread of its own, as a store whose rank 0 hangs never answers
            exchange = threading.Thread(
                target=self._exchange_heartbeats, args=(store.clone(),), name="heartbeats"
            )
            exchange.daemon = True
            exchange.start()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop watching; call it on all ranks, after the last collective."""
        self.done.set()

    def heartbeat(self, phase: str = "") -> None:
        """Record that this rank's loop made progress, and in which phase it is."""
        before, self.last_progress = self.last_progress, time.monotonic()
        if self.is_starting:
            self.longest = max(self.longest, self.last_progress - before)
        self.progress, self.phase = self.progress + 1, phase or self.phase

    def begin_first_step(self) -> None:
        """Start to measure the first step; how long the start-up took does not matter."""
        self.last_progress, self.longest = time.monotonic(), 0.0

    def end_start_up(self) -> None:
        """Apply the timeout from now on; the first step shows how slow a step may be."""
        self.is_starting = False
        self.timeout_now = max(self.timeout, FIRST_STEP_FACTOR * self.longest)

    def allow_long_reads(self) -> None:
        """Extend the timeout: one rank reads checkpoints while the others wait for it."""
        self.timeout_now = START_UP_FACTOR * self.timeout

    def _exchange_heartbeats(self, store: Any) -> None:
        """Send this rank's heartbeats to the others, and receive theirs."""
        host, beat = os.uname().nodename, 0
        while not self.done.wait(self.interval):
            beat += 1
            own = {"beat": beat, "progress": self.progress, "phase": self.phase, "host": host}
            with contextlib.suppress(RuntimeError):  # the rank that holds the store ended or died
                store.set(self._key(self.world.rank), json.dumps(own))
                for rank, peer in self.peers.items():
                    if store.check([self._key(rank)]):
                        peer.update(json.loads(store.get(self._key(rank))))

    def _watch(self) -> None:
        """End this process when its loop makes no progress for too long."""
        while not self.done.wait(self.interval):
            waited = time.monotonic() - self.last_progress
            if waited > self.timeout_now and not self.done.is_set():
                self._end()

    @staticmethod
    def _key(rank: int) -> str:
        return f"yuzogpt/watchdog/{rank}"

    def _end(self) -> None:
        """Report the stalled ranks, from the first rank that is alive, and exit."""
        stalled = self.find_stalled_ranks(self.peers)
        ranks = {self.world.rank, *self.peers}
        speaker = min(ranks - stalled.keys(), default=min(ranks))
        try:
            if speaker == self.world.rank:
                self.on_stall("; ".join(stalled.values()))
            else:
                time.sleep(self.interval)  # until the speaker has reported
        finally:
            os._exit(EXIT_STATUS)

    def find_stalled_ranks(self, peers: dict[int, Peer]) -> dict[int, str]:
        """Return the ranks that hold up the others, with a message about each."""
        now = time.monotonic()
        silence = {rank: now - peer.heard for rank, peer in peers.items()}
        dead = {rank: waited for rank, waited in silence.items() if waited > self.timeout_now / 2}
        if 0 in dead and len(dead) == len(peers):
            dead = {0: dead[0]}  # rank 0 holds the store: without it, no heartbeat arrives
        if dead:
            return {
                rank: f"worker {rank} on {peers[rank].host or 'its host'} sent no heartbeat for "
                f"{waited:.0f} s (last in {peers[rank].phase})"
                for rank, waited in dead.items()
            }
        own = Peer(0, self.progress, self.phase, os.uname().nodename)
        everyone = {**peers, self.world.rank: own}
        least = min(peer.progress for peer in everyone.values())
        return {
            rank: f"worker {rank} on {peer.host} made no progress for "
            f"{now - self.last_progress:.0f} s (in {peer.phase})"
            for rank, peer in everyone.items()
            if peer.progress == least
        }
