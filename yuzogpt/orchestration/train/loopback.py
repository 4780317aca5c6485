"""Workers on one machine meet on its loopback interface: torch's store answers whoever connects.

In: the workers of an embedded Ray. Out: the same, for Ray Train's backend, which makes the process
group. Ray tells rank 0 to listen with torch's TCPStore, which listens on all interfaces by itself;
here it is given a socket. Where Ray's names are others, it does what Ray tells it.
"""

import os
import socket
from collections.abc import Callable
from typing import Any

# runtime.network is imported where it is used: it imports torch, 180 MB, and every command on Ray
# imports this module, `yuzogpt prepare` too.

# With this, torch's `env://` connects rank 0, too, to a store that is there already.
STORE_IS_THERE = "TORCHELASTIC_USE_AGENT_STORE"
stores: list[Any] = []  # of this process; what is listed lives as long


class OnLoopback:
    """A worker group whose rank 0 has a store before its process group is made."""

    def __init__(self, group: Any) -> None:
        """`group`: Ray Train's."""
        self.group = group

    def __len__(self) -> int:
        """Return how many workers there are."""
        return len(self.group)

    def __getattr__(self, name: str) -> Any:
        """Do all else as the group does."""
        return getattr(self.group, name)

    def execute(self, function: Callable[..., Any], *given: Any, **named: Any) -> Any:
        """Do it in all workers. With the address and the port of the store, serve it there."""
        from yuzogpt.runtime.network import LOOPBACK

        done = self.group.execute(function, *given, **named)
        if named.get("addr") == LOOPBACK and "port" in named:
            self.group.execute_single(0, serve_store, named["port"])
            self.group.execute(expect_store)
        return done


def serve_store(port: int) -> None:
    """Serve a store of torch's at a port, as long as this process lives."""
    # Public, though not marked as exported.
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    from yuzogpt.runtime.network import LOOPBACK

    listening = socket.create_server((LOOPBACK, port))
    stores.append(
        TCPStore(
            LOOPBACK,
            port,
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=listening.detach(),
        )
    )


def expect_store() -> None:
    """Let this process connect to a store that is there already; use the loopback for the rest."""
    from yuzogpt.runtime.network import LOOPBACK, choose_interface

    os.environ[STORE_IS_THERE] = "True"
    choose_interface(LOOPBACK)
