"""Chooses the network interface of workers on several nodes: the one that Ray itself uses.

Sets GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME in each worker where the user did not. By itself gloo
takes the address of the host's name, often the loopback (Debian's 127.0.1.1), and NCCL takes the
first one that it finds, often Docker's.
"""

from typing import Any

import ray

from yuzogpt.orchestration.ray_internals import callback_base, worker_nodes
from yuzogpt.runtime.network import choose_interface


class ChosenInterface(callback_base("WorkerGroupCallback")):  # type: ignore[misc]
    """Comes before Ray's own callbacks, one of which makes the process group."""

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Have every worker choose, if they are on several nodes."""
        if len(set(worker_nodes(worker_group))) > 1:
            worker_group.execute(choose)


def choose() -> None:
    choose_interface(ray.util.get_node_ip_address())
