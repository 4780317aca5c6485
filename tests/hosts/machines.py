"""Hosts on this machine, as `ray up` sees them: made of namespaces, joined by a bridge.

In: how many. Out: hosts that have a network, processes, mounts, a name, a home and an sshd of their
own, and can lose power, their link, or a part of its speed. Files are shared, but for /tmp/ray,
/dev/shm and the home; `shared` stands for network storage. Needs root, ip, sshd and rsync.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil

from tests.conftest import REPOSITORY
from tests.waiting import wait_until

NEEDED = (
    *("ip", "tc", "nft", "ss", "unshare", "nsenter"),
    *("ssh", "ssh-keygen", "/usr/sbin/sshd", "rsync", "faketime"),
)
NETWORK = "10.77.0."
BRIDGE = "yz0"
UP_WITHIN = 20.0  # seconds


def missing() -> str | None:
    """Return what keeps hosts from being made here."""
    if os.geteuid() != 0:
        return "root"
    return next((program for program in NEEDED if shutil.which(program) is None), None)


class Host:
    """One of them."""

    def __init__(self, number: int, state: Path) -> None:
        """Lay out its files; it is off."""
        self.name, self.address = f"node{number}", f"{NETWORK}{10 + number}"
        self.namespace, self.link = f"yz-{self.name}", f"yz-{number}"
        self.directory = state / self.name
        self.home = self.directory / "home"
        self.process: subprocess.Popen[bytes] | None = None

    def connect(self, hosts: "list[Host]") -> None:
        """Make its network: one interface, eth0, and the names of all hosts."""
        run(f"ip netns add {self.namespace}")
        run(f"ip link add {self.link} type veth peer name eth0 netns {self.namespace}")
        run(f"ip link set {self.link} master {BRIDGE} up")
        run(f"ip -n {self.namespace} addr add {self.address}/24 dev eth0")
        for link in ("eth0", "lo"):
            run(f"ip -n {self.namespace} link set {link} up")
        run(f"ip -n {self.namespace} route add default via {NETWORK}1")
        # `ip netns exec` shows these in /etc: names that lead to the hosts, and a home of its own.
        etc = Path("/etc/netns") / self.namespace
        etc.mkdir(parents=True, exist_ok=True)
        names = "".join(f"{host.address} {host.name}\n" for host in hosts)
        (etc / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
        accounts = Path("/etc/passwd").read_text().splitlines()
        others = [line for line in accounts if not line.startswith("root:")]
        root = f"root:x:0:0:root:{self.home}:/bin/bash"
        (etc / "passwd").write_text("\n".join([root, *others]) + "\n")

    def settle(self, state: Path) -> None:
        """Make its home, which the owner of the key may enter, and which has the environment."""
        keys = self.home / ".ssh"
        keys.mkdir(parents=True)
        shutil.copy(state / "key.pub", keys / "authorized_keys")
        environment = self.home / "yuzogpt-venv"
        environment.mkdir()
        for path in Path(sys.prefix).iterdir():
            if not path.name.startswith(".ready-"):
                (environment / path.name).symlink_to(path)
        pins = sorted((REPOSITORY / "requirements").glob("*.txt"))
        files = (*pins, REPOSITORY / "pyproject.toml")
        content = b"".join(path.read_bytes() for path in files)
        stamp = subprocess.run("cksum", input=content, capture_output=True, check=True).stdout
        (environment / f".ready-{stamp.split()[0].decode()}").touch()  # as after install.sh
        for path in (self.home, keys):
            path.chmod(0o700)
        (self.directory / "sshd_config").write_text(
            f"ListenAddress {self.address}\nHostKey {state}/key\nPidFile none\nUsePAM no\n"
            "PasswordAuthentication no\nStrictModes no\nMaxStartups 50\nMaxSessions 50\n"
        )

    def boot(self) -> None:
        """Power it on, with nothing left of what Ray kept in memory or in /tmp."""
        temporary = self.directory / "tmp-ray"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        script = (
            f"mkdir -p /tmp/ray && mount --bind {temporary} /tmp/ray && hostname {self.name} && "
            "mount -t tmpfs -o size=2g tmpfs /dev/shm && "
            f"exec /usr/sbin/sshd -D -e -f {self.directory}/sshd_config"
        )
        unshare = "unshare --uts --mount --pid --fork --kill-child --mount-proc"
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [*f"ip netns exec {self.namespace} {unshare} bash -c".split(), script],
                env={"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        log = self.directory / "log"
        wait_until(lambda: b"Server listening" in log.read_bytes(), seconds=UP_WITHIN)

    def power_off(self) -> None:
        """Let it lose power: SIGKILL to all that runs on it, sshd included."""
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        if self.process:
            self.process.wait(30)
        (self.directory / "log").unlink(missing_ok=True)

    def processes(self) -> list[psutil.Process]:
        """Return what runs on it."""
        pids = run(f"ip netns pids {self.namespace}").split()
        found = []
        for pid in pids:
            with contextlib.suppress(psutil.NoSuchProcess):
                found.append(psutil.Process(int(pid)))
        return found

    def run(self, command: str) -> str:
        """Run a command on it, as root at its console; return what it prints."""
        assert self.process
        (init,) = psutil.Process(self.process.pid).children()
        enter = f"nsenter --target {init.pid} --net --mount --pid --uts --wd=/ bash -c".split()
        return output([*enter, command])

    @contextlib.contextmanager
    def slow(self, rate: str) -> Iterator[None]:
        """Let no more leave it than `rate`, such as 10mbit."""
        here = f"ip netns exec {self.namespace} tc qdisc"
        run(f"{here} add dev eth0 root tbf rate {rate} burst 64kb latency 300ms")
        try:
            yield
        finally:
            run(f"{here} del dev eth0 root")

    @contextlib.contextmanager
    def closed_to(self, other: "Host") -> Iterator[None]:
        """Close all of its ports to another host, as a firewall would."""
        self.run(
            "nft add table inet closed && nft 'add chain inet closed input "
            "{ type filter hook input priority 0; }' && "
            f"nft add rule inet closed input ip saddr {other.address} tcp flags == syn drop"
        )
        try:
            yield
        finally:
            self.run("nft delete table inet closed")

    @contextlib.contextmanager
    def read_only(self, directory: Path) -> Iterator[None]:
        """Let it read a directory and not write there; the other hosts still may."""
        self.run(f"mount --bind {directory} {directory}")
        self.run(f"mount -o remount,bind,ro {directory}")
        try:
            yield
        finally:
            self.run(f"umount {directory}")

    def partition(self) -> None:
        """Cut its link to all others; it continues by itself."""
        run(f"ip link set {self.link} down")

    def has(self, title: str) -> bool:
        """Return whether a process with `title` in its command line runs on it."""
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                if title in " ".join(process.cmdline()):
                    return True
        return False

    def remove(self) -> None:
        """End it, and its network."""
        self.power_off()
        run(f"ip link del {self.link}")
        run(f"ip netns del {self.namespace}")
        shutil.rmtree(Path("/etc/netns") / self.namespace, ignore_errors=True)


class Hosts:
    """All of them, and the key and the shared directory that they have in common."""

    def __init__(self, count: int, state: Path) -> None:
        """Power them on."""
        self.state, self.key, self.shared = state, state / "key", state / "shared"
        self.shared.mkdir()
        output(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.key)])
        Path("/run/sshd").mkdir(exist_ok=True)
        run(f"ip link add {BRIDGE} type bridge")
        run(f"ip addr add {NETWORK}1/24 dev {BRIDGE}")
        run(f"ip link set {BRIDGE} up")
        self.all = [Host(number, state) for number in range(1, count + 1)]
        for host in self.all:
            host.connect(self.all)
            host.settle(state)
            host.boot()


@contextlib.contextmanager
def started(count: int) -> Iterator[Hosts]:
    """Make hosts, and remove them at the end; what an ended test process left goes first."""
    remove_leftovers()
    with tempfile.TemporaryDirectory(prefix="yuzogpt-hosts-", dir="/tmp") as directory:
        hosts = Hosts(count, Path(directory))
        try:
            yield hosts
        finally:
            for host in hosts.all:
                host.remove()
            run(f"ip link del {BRIDGE}")


def remove_leftovers() -> None:
    """Remove hosts whose test process was killed."""
    for line in run("ip netns list").splitlines():
        name = line.split()[0]
        if name.startswith("yz-"):
            for pid in run(f"ip netns pids {name}").split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            run(f"ip netns del {name}")
    for directory in Path("/etc/netns").glob("yz-*"):
        shutil.rmtree(directory, ignore_errors=True)
    for line in run("ip -brief link").splitlines():
        name = line.split()[0].partition("@")[0]
        if name == BRIDGE or name.startswith("yz-"):
            run(f"ip link del {name}")


def run(command: str) -> str:
    """Run a command without spaces in its words; return what it prints."""
    return output(command.split())


def output(command: list[str]) -> str:
    """Run a command, which must succeed; return what it prints."""
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, f"{command}: {result.stderr}"
    return result.stdout
