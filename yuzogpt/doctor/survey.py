"""The facts of a cluster, from which findings.py draws its conclusions."""

from dataclasses import dataclass, field

from yuzogpt.doctor.links import Link
from yuzogpt.doctor.node import Node, Storage
from yuzogpt.runtime.network import Network


@dataclass
class Head:
    """Facts of the node with the dashboard and the job server."""

    name: str = ""
    # HTTP status of the jobs API without the token; 0: no answer; None: there is no jobs API.
    jobs_status: int | None = None
    token_mode: bool = False  # whether Ray's processes demand the token
    stop_wait: float | None = None  # seconds that a stopped job has; None: not set
    is_pod: bool = False  # of Kubernetes, whose operator comes to the dashboard from outside
    takes_work: bool = True  # whether jobs may use its CPUs and GPUs
    seen_by: list[str] = field(default_factory=list)  # nodes that reach the dashboard themselves


@dataclass
class Survey:
    """All facts, by the names of nodes."""

    nodes: dict[str, Node] = field(default_factory=dict)
    silent: dict[str, str] = field(default_factory=dict)  # node that does not answer: why
    # Seconds ahead of the examining node, and their uncertainty in seconds.
    clocks: dict[str, tuple[float, float]] = field(default_factory=dict)
    storage: dict[str, Storage] = field(default_factory=dict)
    unseen: dict[str, list[str]] = field(
        default_factory=dict
    )  # node: nodes whose files it does not find
    links: list[Link] = field(default_factory=list)
    network: Network | None = None  # of an all-reduce of all nodes
    network_problem: str = ""
    head: Head = field(default_factory=Head)
    # Parts of the examination that failed: (node, or "cluster"; part; why).
    problems: list[tuple[str, str, str]] = field(default_factory=list)
    is_shared: bool = False  # whether others than this command use the cluster
