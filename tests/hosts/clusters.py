"""`ray up` of cluster/onprem.yaml on the hosts of machines.py, as its user does it.

In: hosts. Out: a cluster that stands, its jobs API at a port of the loopback, and what a client
needs to be let in.
"""

import json
import os
import re
import secrets
import socket
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from tests.conftest import REPOSITORY, TINY
from tests.hosts.machines import Hosts
from tests.waiting import wait_until

RAY = str(Path(sys.executable).with_name("ray"))
SHIPPED = REPOSITORY / "cluster" / "onprem.yaml"
PRESET, TRAINING = "shakespeare_char_cpu", (*TINY, "--log_interval=1", "--dropout=0.1")
# These hosts share two cores and a memory; real ones need no such words.
SMALL = "--object-store-memory=150000000"


def free_port() -> int:
    """Return a port of the loopback that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


class Cluster:
    """A cluster that `ray up` started."""

    def __init__(self, hosts: Hosts) -> None:
        """Lay out what the user has: a home with a token, and the shipped file filled in."""
        self.hosts, self.head, self.workers = hosts, hosts.all[0], hosts.all[1:]
        self.began = time.monotonic()
        home = hosts.state / "user"
        self.token = home / ".ray" / "auth_token"
        self.token.parent.mkdir(parents=True)
        self.token.touch(mode=0o600)
        self.token.write_text(secrets.token_hex(32))
        self.file = hosts.state / "onprem.yaml"
        self.file.write_text(self.filled_in())
        self.environment = {
            **os.environ,
            "HOME": str(home),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "RAY_TMPDIR": str(hosts.state / "tmp"),
            "RAY_AUTH_MODE": "token",
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        (hosts.state / "tmp").mkdir()
        for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"):
            self.environment.pop(name, None)
        self.address = f"http://127.0.0.1:{free_port()}"
        self.tunnel: subprocess.Popen[bytes] | None = None

    def filled_in(self) -> str:
        """Return the shipped file with this cluster's addresses, user and key."""
        addresses = ", ".join(host.address for host in self.workers)
        text = SHIPPED.read_text()
        for shipped, own in (
            ("head_ip: 192.0.2.10", f"head_ip: {self.head.address}"),
            ("worker_ips: [192.0.2.11, 192.0.2.12, 192.0.2.13]", f"worker_ips: [{addresses}]"),
            ("ssh_user: ubuntu", "ssh_user: root"),
            ("ssh_private_key: ~/.ssh/id_ed25519", f"ssh_private_key: {self.hosts.key}"),
            ("ray start --head", f"ray start --head {SMALL}"),
            ("ray start --address", f"ray start --num-cpus=1 {SMALL} --address"),
        ):
            assert text.count(shipped) == 1, shipped
            text = text.replace(shipped, own)
        return text

    def ray(self, *arguments: str, seconds: float = 180, fails: bool = False) -> str:
        """Run the ray command as the user does, from the clone; return what it prints."""
        result = subprocess.run(
            [RAY, *arguments],
            env=self.environment,
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
        printed = result.stdout + result.stderr
        assert (result.returncode != 0) == fails, printed
        return printed

    def up(self) -> None:
        """Start it, and wait for all workers."""
        self.ray("up", "-y", "--no-config-cache", str(self.file))
        self.say("up: the head")
        port = self.address.rpartition(":")[2]
        self.tunnel = subprocess.Popen(
            [RAY, "dashboard", "--no-config-cache", f"--port={port}", str(self.file)],
            env=self.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        wait_until(lambda: self.status("/api/version") == 200, seconds=60)
        self.wait_for_nodes(len(self.hosts.all))
        self.say(f"up: {len(self.workers)} workers")

    def wait_for_nodes(self, count: int, seconds: float = 120) -> None:
        """Wait until so many nodes live, the head included."""
        wait_until(lambda: self.living() == count, seconds=seconds)

    def living(self) -> int:
        """Return how many nodes `ray status` counts as living, on the head."""
        active = self.on_head("ray status").partition("Pending:")[0]
        return sum(int(count) for count in re.findall(r"^ (\d+) local", active, re.MULTILINE))

    def on_head(self, command: str) -> str:
        """Run a command on the head, in a login shell."""
        return self.head.run(f"HOME={self.head.home} bash -l -c 'source ~/.bashrc; {command}'")

    def status(self, path: str, token: str = "") -> int:
        """Return the HTTP status of a request to the dashboard; 0 if nobody answers."""
        request = urllib.request.Request(f"{self.address}{path}")
        if token or path == "/api/version":
            request.add_header("Authorization", f"Bearer {token or self.token.read_text()}")
        try:
            with urllib.request.urlopen(request, timeout=10) as response:
                return int(response.status)
        except urllib.error.HTTPError as error:
            return int(error.code)
        except OSError:
            return 0

    def submit(self, job: str, *flags: str, wait: bool = True, fails: bool = False) -> str:
        """Submit a job; return what it printed, if waited for."""
        command = ["job", "submit", f"--address={self.address}", "--working-dir", "."]
        command += [] if wait else ["--no-wait"]
        command += ["--runtime-env-json", json.dumps({"env_vars": {"WANDB_MODE": "offline"}})]
        return self.ray(*command, "--", "python", job, *flags, seconds=300, fails=fails)

    def train(self, corpus: Path, out_dir: str, *flags: str) -> None:
        """Submit a training job, and do not wait for it."""
        places = [f"--data_dir={corpus}", f"--out_dir={out_dir}", f"--storage={self.hosts.shared}"]
        self.submit("jobs/train_gpt2.py", PRESET, *TRAINING, *places, *flags, wait=False)

    def say(self, what: str) -> None:
        """Print what has happened, and when."""
        print(f"{time.monotonic() - self.began:7.1f} s  {what}", flush=True)

    def down(self) -> None:
        """Do what README says: `ray down`, and an end to the workers, which it leaves."""
        self.ray("down", "-y", str(self.file))
        if self.tunnel:
            self.tunnel.terminate()
            self.tunnel.wait(30)


def mode(path: Path) -> int:
    """Return a file's permissions."""
    return stat.S_IMODE(path.stat().st_mode)
