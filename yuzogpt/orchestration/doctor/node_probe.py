"""Every node of a cluster examines itself, and its ways to the others.

In: a connection to Ray. Out: a survey that is filled in. On each node one actor; what a node does
not answer in time is noted, and holds up nothing else.
"""

import http.client
import os
import secrets
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Collection
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from yuzogpt.doctor import links, node
from yuzogpt.doctor.survey import Head, Survey
from yuzogpt.orchestration.causes import cause_of

STARTED_WITHIN = 40.0  # seconds, for the first answer of a node: a process starts there
ANSWERED_WITHIN = 30.0  # seconds
TIMED_WITHIN = 15.0  # seconds, for the storage of as many nodes as come to it
HANGS = node.Storage(problem=f"no answer within {ANSWERED_WITHIN:.0f} s")
REMOVED_WITHIN = 5.0  # seconds, for what was written to storage
CLOCK_TRIES = 5
STORED_BYTES = 2**24  # what each node writes to storage, to take the time


class NodeProbe:
    """Runs on one node."""

    def __init__(self, address: str, secret: bytes, counted_gpus: int) -> None:
        """`address`: of this node; `secret`: what the other examiners begin with."""
        self.address, self.secret, self.counted_gpus = address, secret, counted_gpus
        self.listener: links.Listener | None = None

    def examine(self) -> node.Node:
        """Return the facts of this node."""
        directory = ray._private.worker._global_node.get_temp_dir_path()
        return node.examine(self.address, directory, self.counted_gpus)

    def clock(self) -> float:
        """Return what time it is here."""
        return time.time()

    def listen(self) -> int:
        """Listen for the others' measurements; return the port."""
        self.listener = links.Listener(self.address, self.secret)
        return self.listener.port

    def free_port(self) -> int:
        """Return a port of this node that nobody uses."""
        with socket.socket(socket.AF_INET6 if ":" in self.address else socket.AF_INET) as free:
            free.bind((self.address, 0))
            return int(free.getsockname()[1])

    def measure(self, source: str, target: str, address: str, port: int) -> links.Link:
        """Measure the link to a node that listens."""
        return links.measure(source, target, address, port, self.secret)

    def write_mark(self, storage: str, trial: str, name: str) -> node.Storage:
        """Write to the shared storage."""
        return node.write_mark(storage, trial, name)

    def measure_storage(self, storage: str, trial: str, name: str) -> node.Storage:
        """Take the time of writing to the shared storage."""
        return node.measure_storage(storage, trial, name, STORED_BYTES)

    def marks(self, storage: str, trial: str) -> tuple[list[str], str]:
        """Return whose files this node finds there, and why it cannot, if so."""
        return node.marks(storage, trial)

    def remove(self, storage: str, trial: str) -> None:
        """Delete all files again."""
        node.remove_marks(storage, trial)

    def reaches(self, address: str, port: int) -> bool:
        """Tell whether somebody listens there."""
        return links.is_open(address, port)

    def head(self, dashboard: str) -> Head:
        """Return what the head knows; call it there. `dashboard`: HOST:PORT, or nothing."""
        wait = node.number(os.environ.get("RAY_JOB_STOP_WAIT_TIME_S", ""))
        return Head(
            jobs_status=status_without_token(dashboard) if dashboard else None,
            token_mode=os.environ.get("RAY_AUTH_MODE") == "token",
            stop_wait=wait,
            is_pod="KUBERNETES_SERVICE_HOST" in os.environ,
        )

    def meet(self, rank: int, size: int, meeting_place: str) -> Any:
        """Measure an all-reduce with all other nodes; the Network that comes out."""
        return meet(rank, size, meeting_place, self.address)


def status_without_token(dashboard: str) -> int:
    """Return how the jobs API answers a stranger; 0 if nobody answers."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # whatever the proxy says
    try:
        with direct.open(f"http://{dashboard}/api/jobs/", timeout=10) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return int(error.code)
    except (OSError, http.client.HTTPException):
        return 0


def meet(rank: int, size: int, meeting_place: str, address: str) -> Any:
    """Join a process group of all nodes, and measure its collectives."""
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    from yuzogpt.runtime.network import choose_interface, measure
    from yuzogpt.runtime.world import World

    choose_interface(address)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://{meeting_place}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=ANSWERED_WITHIN / 2),
    )
    try:
        return measure(World(rank=rank, size=size), torch.device("cpu"))
    finally:
        dist.destroy_process_group()


class ClusterProbe:
    """One after the other, what there is to find out."""

    def __init__(self, survey: Survey, storage: str) -> None:
        """Start an examiner on every node that lives."""
        self.survey, self.storage = survey, storage
        self.now = ""  # the part that is examined; first, what each node knows of itself
        secret = secrets.token_bytes(links.SECRET_BYTES)
        alive = [one for one in ray.nodes() if one["Alive"]]
        hosts = [one["NodeManagerHostname"] for one in alive]
        self.examiners: dict[str, Any] = {}
        self.addresses: dict[str, str] = {}
        for one in alive:
            host, address = one["NodeManagerHostname"], one["NodeManagerAddress"]
            name = host if hosts.count(host) == 1 else f"{host}-{one['NodeID'][:6]}"
            place = NodeAffinitySchedulingStrategy(one["NodeID"], soft=False)
            # Several threads: a storage that hangs holds up one of them.
            examiner = ray.remote(num_cpus=0, max_concurrency=4)(NodeProbe)
            gpus = int(one["Resources"].get("GPU", 0))
            started = examiner.options(scheduling_strategy=place).remote(address, secret, gpus)
            self.examiners[name] = started
            self.addresses[name] = address
            if "node:__internal_head__" in one["Resources"]:
                survey.head.name = name
                survey.head.takes_work = bool({"CPU", "GPU"} & one["Resources"].keys())

    def run(self) -> None:
        """Do all of it."""
        try:
            facts = self.ask(lambda name, one: one.examine.remote(), STARTED_WITHIN)
            self.survey.nodes.update(facts)
            self.part("clock", self.look_at_clocks)
            self.part("head", self.look_at_head)
            if self.storage:
                self.part("storage", self.look_at_storage)
            if len(self.examiners) > 1:
                self.part("links", self.look_at_links)
                self.part("network", self.look_at_network)
        finally:
            for examiner in self.examiners.values():
                ray.kill(examiner)

    def part(self, name: str, look: Callable[[], None]) -> None:
        """Do one part; an error in it is a finding, and the other parts are done all the same."""
        self.now = name
        try:
            look()
        except Exception as error:
            self.survey.problems.append(("cluster", name, cause_of(error)))

    def ask(
        self,
        question: Callable[[str, Any], Any],
        timeout: float = ANSWERED_WITHIN,
        names: Collection[str] | None = None,
        late: Any = None,
    ) -> dict[str, Any]:
        """Ask nodes, all if none are named, at the same time.

        One that does not answer in time is asked no more; with `late`, that is its answer.
        """
        those = list(self.examiners) if names is None else names
        asked = {name: question(name, self.examiners[name]) for name in those}
        deadline, answers = time.monotonic() + timeout, {}
        for name, reference in asked.items():
            try:
                left = max(0.0, deadline - time.monotonic())
                answers[name] = ray.get(reference, timeout=left)
            except GetTimeoutError:
                if late is None:
                    self.give_up(name, f"not within {timeout:.0f} s")
                else:
                    answers[name] = late
            except RayTaskError as error:  # the node lives: what it was asked for went wrong
                if self.now:
                    self.survey.problems.append((name, self.now, cause_of(error)))
                else:
                    self.give_up(name, cause_of(error))
            except RayError as error:
                self.give_up(name, cause_of(error))
        return answers

    def ask_one(self, name: str, question: Callable[[Any], Any]) -> Any:
        """Ask one node; None if it does not answer, and then it is asked no more."""
        return self.ask(lambda _, one: question(one), names=[name]).get(name)

    def give_up(self, name: str, why: str) -> None:
        """Note a node that does not answer."""
        self.survey.silent[name] = why
        self.survey.nodes.pop(name, None)
        ray.kill(self.examiners.pop(name))

    def look_at_clocks(self) -> None:
        """Compare each node's clock with this one's: the quickest answer is the surest."""
        for name in list(self.examiners):
            found = []
            for _ in range(CLOCK_TRIES):
                sent = time.time()
                there = self.ask_one(name, lambda one: one.clock.remote())
                back = time.time()
                if there is None:
                    break
                found.append(((back - sent) / 2, there - (sent + back) / 2))
            else:
                uncertain, ahead = min(found)
                self.survey.clocks[name] = (ahead, uncertain)

    def look_at_head(self) -> None:
        """See whether the head is closed to strangers."""
        name = self.survey.head.name
        if name not in self.examiners:
            return
        dashboard = ray._private.worker.get_dashboard_url() or ""
        head: Head | None = self.ask_one(name, lambda one: one.head.remote(dashboard))
        if head is None:
            return
        head.name, head.takes_work = name, self.survey.head.takes_work
        if dashboard:
            address, port = self.addresses[name], int(dashboard.rpartition(":")[2])
            seen = self.ask(lambda _, one: one.reaches.remote(address, port))
            head.seen_by = [other for other, is_open in seen.items() if is_open and other != name]
        self.survey.head = head

    def look_at_storage(self) -> None:
        """Let every node leave a mark, look for those of the others, and take each one's time.

        A node whose storage hangs is no silent node: that is what is found out of it.
        """
        place, trial = self.storage, secrets.token_hex(4)
        try:
            found: dict[str, node.Storage] = self.ask(
                lambda name, one: one.write_mark.remote(place, trial, name), late=HANGS
            )
            written = [name for name, storage in found.items() if not storage.problem]
            seen = self.ask(lambda _, one: one.marks.remote(place, trial), names=written)
            for name, (got, problem) in seen.items():
                if problem:
                    found[name] = node.Storage(problem=f"not to be listed: {problem}")
                else:
                    self.survey.unseen[name] = sorted(set(written) - set(got))
            deadline = time.monotonic() + TIMED_WITHIN
            for alone in self.survey.unseen:  # one after the other: it is each node's own speed
                if time.monotonic() > deadline:
                    break  # the table has none for those that are left
                found |= self.ask(
                    lambda name, one: one.measure_storage.remote(place, trial, name),
                    names=[alone],
                    late=HANGS,
                )
            self.survey.storage = found
        finally:
            removed = [one.remove.remote(place, trial) for one in self.examiners.values()]
            if removed:
                ray.wait(removed, num_returns=len(removed), timeout=REMOVED_WITHIN)

    def look_at_links(self) -> None:
        """Measure every pair, both ways: in rounds, in each of which a node sends to one other."""
        ports = self.ask(lambda _, one: one.listen.remote())
        names = list(ports)
        for distance in range(1, len(names)):

            def measure(name: str, one: Any, distance: int = distance) -> Any:
                target = names[(names.index(name) + distance) % len(names)]
                return one.measure.remote(name, target, self.addresses[target], ports[target])

            found = self.ask(measure)
            self.survey.links += found.values()

    def look_at_network(self) -> None:
        """Measure an all-reduce of all nodes, if all pairs reach each other."""
        if self.survey.silent or any(link.problem for link in self.survey.links):
            return
        names = list(self.examiners)
        port = self.ask_one(names[0], lambda one: one.free_port.remote())
        if port is None:
            return
        address = self.addresses[names[0]]
        place = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
        met = [
            one.meet.remote(rank, len(names), place)
            for rank, one in enumerate(self.examiners.values())
        ]
        try:
            self.survey.network = ray.get(met, timeout=ANSWERED_WITHIN)[0]
        except (RayError, GetTimeoutError) as error:
            self.survey.network_problem = cause_of(error)
