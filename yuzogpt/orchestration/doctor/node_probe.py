"""Every node of a cluster examines itself, and its links to the others.

One actor runs on each node. A node that does not answer in time is noted, and delays nothing else.
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
from yuzogpt.orchestration.environment import AUTH_MODE, JOB_STOP_WAIT_S
from yuzogpt.orchestration.ray_internals import dashboard_address, node_temp_dir

START_TIMEOUT_S = 40.0  # for the first reply of a node: a process starts there
REPLY_TIMEOUT_S = 30.0
STORAGE_BUDGET_S = 15.0  # for timing storage; nodes that are left have no figure
HUNG_STORAGE = node.Storage(problem=f"no answer within {REPLY_TIMEOUT_S:.0f} s")
CLEANUP_TIMEOUT_S = 5.0  # for files that were written to storage
CLOCK_TRIES = 5
STORED_BYTES = 2**24  # what each node writes to storage, to take the time


class NodeProbe:
    """An actor on one node, which runs there what it is asked to."""

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function of this package."""
        return function(*arguments)


def examine(address: str, counted_gpus: int) -> node.Node:
    """Return the facts of this node."""
    return node.examine(address, node_temp_dir(), counted_gpus)


def listen(address: str, secret: bytes) -> int:
    """Listen for the measurements of other nodes; return the port."""
    return links.Listener(address, secret).port


def free_port(address: str) -> int:
    """Return a port of this node that nobody uses."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as free:
        free.bind((address, 0))
        return int(free.getsockname()[1])


def head_facts(dashboard: str) -> Head:
    """Return the facts of the head; call it there. `dashboard`: HOST:PORT, or empty."""
    return Head(
        jobs_status=status_without_token(dashboard) if dashboard else None,
        token_mode=os.environ.get(AUTH_MODE) == "token",
        stop_wait=node.number(os.environ.get(JOB_STOP_WAIT_S, "")),
        is_pod="KUBERNETES_SERVICE_HOST" in os.environ,
    )


def status_without_token(dashboard: str) -> int:
    """Return the HTTP status of the jobs API without a token; 0 if nothing answers."""
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
        timeout=timedelta(seconds=REPLY_TIMEOUT_S / 2),
    )
    try:
        return measure(World(rank=rank, size=size), torch.device("cpu"))
    finally:
        dist.destroy_process_group()


class ClusterProbe:
    """Fills in a survey, one part after the other."""

    def __init__(self, survey: Survey, storage: str) -> None:
        """Start a probe on every node that is alive."""
        self.survey, self.storage = survey, storage
        self.part = ""  # that is examined; empty for the facts of each node, which come first
        self.secret = secrets.token_bytes(links.SECRET_BYTES)
        alive = [facts for facts in ray.nodes() if facts["Alive"]]
        hosts = [facts["NodeManagerHostname"] for facts in alive]
        self.probes: dict[str, Any] = {}
        self.addresses: dict[str, str] = {}
        self.gpus: dict[str, int] = {}  # that Ray counts
        for facts in alive:
            host, address = facts["NodeManagerHostname"], facts["NodeManagerAddress"]
            name = host if hosts.count(host) == 1 else f"{host}-{facts['NodeID'][:6]}"
            strategy = NodeAffinitySchedulingStrategy(facts["NodeID"], soft=False)
            # Several threads: a storage that hangs holds up one of them.
            actor_class = ray.remote(num_cpus=0, max_concurrency=4)(NodeProbe)
            self.probes[name] = actor_class.options(scheduling_strategy=strategy).remote()
            self.addresses[name] = address
            self.gpus[name] = int(facts["Resources"].get("GPU", 0))
            if "node:__internal_head__" in facts["Resources"]:
                survey.head.name = name
                survey.head.takes_work = bool({"CPU", "GPU"} & facts["Resources"].keys())

    def run(self) -> None:
        """Run all parts."""
        try:
            facts = self.ask(
                lambda name: (examine, self.addresses[name], self.gpus[name]),
                START_TIMEOUT_S,
            )
            self.survey.nodes.update(facts)
            self.run_part("clock", self.measure_clocks)
            self.run_part("head", self.examine_head)
            if self.storage:
                self.run_part("storage", self.examine_storage)
            if len(self.probes) > 1:
                self.run_part("links", self.measure_links)
                self.run_part("network", self.measure_network)
        finally:
            for probe in self.probes.values():
                ray.kill(probe)

    def run_part(self, name: str, examine: Callable[[], None]) -> None:
        """Run one part; an error in it is a finding, and the other parts run all the same."""
        self.part = name
        try:
            examine()
        except Exception as error:
            self.survey.problems.append(("cluster", name, cause_of(error)))

    def ask(
        self,
        question: Callable[[str], tuple[Any, ...]],
        timeout: float = REPLY_TIMEOUT_S,
        names: Collection[str] | None = None,
        late: Any = None,
    ) -> dict[str, Any]:
        """Ask nodes, all if none are named, at the same time.

        `question`: for a node's name, the function that it calls, and the arguments. A node that
        does not reply in time is asked no more; with `late`, that is its reply.
        """
        names = list(self.probes) if names is None else names
        asked = {name: self.probes[name].run.remote(*question(name)) for name in names}
        deadline, replies = time.monotonic() + timeout, {}
        for name, reference in asked.items():
            try:
                left = max(0.0, deadline - time.monotonic())
                replies[name] = ray.get(reference, timeout=left)
            except GetTimeoutError:
                if late is None:
                    self.give_up(name, f"not within {timeout:.0f} s")
                else:
                    replies[name] = late
            except RayTaskError as error:  # the node is alive: the question failed
                if self.part:
                    self.survey.problems.append((name, self.part, cause_of(error)))
                else:
                    self.give_up(name, cause_of(error))
            except RayError as error:
                self.give_up(name, cause_of(error))
        return replies

    def ask_one(self, name: str, *question: Any) -> Any:
        """Ask one node; None if it does not reply, and then it is asked no more."""
        return self.ask(lambda _: question, names=[name]).get(name)

    def give_up(self, name: str, reason: str) -> None:
        """Note a node that does not reply."""
        self.survey.silent[name] = reason
        self.survey.nodes.pop(name, None)
        ray.kill(self.probes.pop(name))

    def measure_clocks(self) -> None:
        """Compare each node's clock with this one's: the quickest reply is the most precise."""
        for name in list(self.probes):
            samples = []
            for _ in range(CLOCK_TRIES):
                sent = time.time()
                remote = self.ask_one(name, time.time)
                received = time.time()
                if remote is None:
                    break
                samples.append(((received - sent) / 2, remote - (sent + received) / 2))
            else:
                uncertainty, ahead = min(samples)
                self.survey.clocks[name] = (ahead, uncertainty)

    def examine_head(self) -> None:
        """Find out whether others reach the head without a token."""
        name = self.survey.head.name
        if name not in self.probes:
            return
        dashboard = dashboard_address()
        head: Head | None = self.ask_one(name, head_facts, dashboard)
        if head is None:
            return
        head.name, head.takes_work = name, self.survey.head.takes_work
        if dashboard:
            address, port = self.addresses[name], int(dashboard.rpartition(":")[2])
            seen = self.ask(lambda _: (links.is_open, address, port))
            head.seen_by = [other for other, is_open in seen.items() if is_open and other != name]
        self.survey.head = head

    def examine_storage(self) -> None:
        """Have every node write a mark, look for the others' marks, and measure its speed.

        A node whose storage hangs is not silent: that it hangs is the finding.
        """
        location, trial = self.storage, secrets.token_hex(4)
        try:
            reports: dict[str, node.Storage] = self.ask(
                lambda name: (node.write_mark, location, trial, name),
                late=HUNG_STORAGE,
            )
            written = [name for name, storage in reports.items() if not storage.problem]
            seen = self.ask(lambda _: (node.marks, location, trial), names=written)
            for name, (marks, problem) in seen.items():
                if problem:
                    reports[name] = node.Storage(problem=f"not to be listed: {problem}")
                else:
                    self.survey.unseen[name] = sorted(set(written) - set(marks))
            deadline = time.monotonic() + STORAGE_BUDGET_S
            for alone in self.survey.unseen:  # one after the other: each node's own speed
                if time.monotonic() > deadline:
                    break  # the table has none for those that are left
                reports |= self.ask(
                    lambda name: (node.measure_storage, location, trial, name, STORED_BYTES),
                    names=[alone],
                    late=HUNG_STORAGE,
                )
            self.survey.storage = reports
        finally:
            removed = [
                probe.run.remote(node.remove_marks, location, trial)
                for probe in self.probes.values()
            ]
            if removed:
                ray.wait(removed, num_returns=len(removed), timeout=CLEANUP_TIMEOUT_S)

    def measure_links(self) -> None:
        """Measure every pair in both directions; in each round, a node sends to one other node."""
        ports = self.ask(lambda name: (listen, self.addresses[name], self.secret))
        names = list(ports)
        for distance in range(1, len(names)):

            def measure(name: str, distance: int = distance) -> tuple[Any, ...]:
                target = names[(names.index(name) + distance) % len(names)]
                place = (self.addresses[target], ports[target])
                return links.measure, name, target, *place, self.secret

            self.survey.links += self.ask(measure).values()

    def measure_network(self) -> None:
        """Measure an all-reduce of all nodes, if all pairs reach each other."""
        if self.survey.silent or any(link.problem for link in self.survey.links):
            return
        names = list(self.probes)
        address = self.addresses[names[0]]
        port = self.ask_one(names[0], free_port, address)
        if port is None:
            return
        meeting_place = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
        measured = [
            probe.run.remote(meet, rank, len(names), meeting_place, self.addresses[name])
            for rank, (name, probe) in enumerate(self.probes.items())
        ]
        try:
            self.survey.network = ray.get(measured, timeout=REPLY_TIMEOUT_S)[0]
        except (RayError, GetTimeoutError) as error:
            self.survey.network_problem = cause_of(error)
