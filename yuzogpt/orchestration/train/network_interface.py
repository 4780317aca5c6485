"""Which network interface the workers of several nodes meet on: the one that Ray itself uses.

In: workers that have just started. Out: GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME in each, where
the user did not set them. Left alone, gloo takes the address that the host's name leads to, often
the loopback (Debian's 127.0.1.1), and NCCL whatever it finds first, often Docker's.
"""

from typing import Any

import ray

from yuzogpt.orchestration.ray_internals import callback_base, worker_nodes
from yuzogpt.runtime.network import choose_interface


class ChosenInterface(callback_base("WorkerGroupCallback")):  # type: ignore[misc]
    """Comes before Ray's own callbacks, of which one makes the process group."""

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Let every worker choose, if they are on several nodes."""
        if len(set(worker_nodes(worker_group))) > 1:
            worker_group.execute(choose)


def choose() -> None:
    """Choose in this process."""
    choose_interface(ray.util.get_node_ip_address())
