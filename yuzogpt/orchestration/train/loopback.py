"""Keeps torch's store of an embedded Ray's workers on the loopback interface.

torch's TCPStore answers anyone who connects, and by itself it listens on all interfaces. Rank 0
starts one here, on a socket of ours, before Ray Train's backend makes the process group.
"""

import os
import socket
from collections.abc import Callable
from typing import Any

from yuzogpt.runtime.ranks import LOOPBACK

# With this, torch's `env://` connects rank 0, too, to a store that is there already.
STORE_IS_THERE = "TORCHELASTIC_USE_AGENT_STORE"
stores: list[Any] = []  # kept alive as long as this process


class OnLoopback:
    """A worker group whose rank 0 has a store before its process group is made."""

    def __init__(self, group: Any) -> None:
        """`group`: Ray Train's."""
        self.group = group

    def __len__(self) -> int:
        return len(self.group)

    def __getattr__(self, name: str) -> Any:
        """Return everything else from the group."""
        return getattr(self.group, name)

    def execute(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a function in all workers; if it sets the store's address, start the store there."""
        results = self.group.execute(function, *args, **kwargs)
        if kwargs.get("addr") == LOOPBACK and "port" in kwargs:
            self.group.execute_single(0, serve_store, kwargs["port"])
            self.group.execute(expect_store)
        return results


def serve_store(port: int) -> None:
    """Run torch's store at a port as long as this process lives."""
    from torch.distributed import TCPStore

    listener = socket.create_server((LOOPBACK, port))
    stores.append(
        TCPStore(
            LOOPBACK,
            port,
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )
    )


def expect_store() -> None:
    """Have this process connect to that store, and use the loopback for the rest."""
    from yuzogpt.runtime.network import choose_interface

    os.environ[STORE_IS_THERE] = "True"
    choose_interface(LOOPBACK)
