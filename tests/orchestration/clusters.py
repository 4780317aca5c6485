"""Ray on this machine: clusters whose nodes are added, lost and drained on request; its workers."""

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil

# In a process of its own: what Ray knows of authentication, it learns once a process.
# Commands come in as lines; each is answered with one.
CLUSTER = """
import sys, time
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated.autoscaler_pb2 import DrainNodeReason

options = {"object_store_memory": 100 * 2**20, "include_dashboard": False}
head = {**options, "num_cpus": int(sys.argv[2]), "temp_dir": sys.argv[1]}
cluster = Cluster(True, head_node_args=head)
nodes = []
def add():
    nodes.append(cluster.add_node(num_cpus=1, **options))
    return nodes[-1].node_id
def lose():  # the newest; its processes get SIGKILL
    cluster.remove_node(nodes.pop(), allow_graceful=False)
    return "lost"
def drain(number, seconds):
    reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    deadline = int((time.time() + float(seconds)) * 1000)
    gcs = GcsClient(address=cluster.address)
    return str(gcs.drain_node(nodes[int(number)].node_id, reason, "a test", deadline)[0])
def groups():  # placement groups that hold something, or wait for it
    import ray
    from ray.util import placement_group_table
    if not ray.is_initialized():
        ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
    return sum(group["state"] != "REMOVED" for group in placement_group_table().values())
print(cluster.address, flush=True)
for line in sys.stdin:
    command, *arguments = line.split()
    does = {"add": add, "lose": lose, "drain": drain, "groups": groups}[command]
    print(does(*arguments), flush=True)
cluster.shutdown()
"""
# So that the loss of a node is noticed after 2 s, not after 15.
QUICK_TO_NOTICE = {
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_failure_threshold": "4",
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
}


class Cluster:
    """A cluster that runs commands."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        """Wait until it stands."""
        self.process = process
        assert process.stdout
        self.address = process.stdout.readline().strip()

    def do(self, command: str) -> str:
        """Run a command: add, lose, `drain NODE SECONDS`, groups; return what it says."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()


@contextlib.contextmanager
def started(head_cpus: int, nodes: int) -> Iterator[Cluster]:
    """Start a cluster: a head with so many CPUs, and nodes of one CPU each."""
    with tempfile.TemporaryDirectory(prefix="yuzogpt-test-", dir="/tmp") as directory:
        Path(directory, "ray").mkdir()  # where Ray writes the head's address: not /tmp/ray
        environment = {**QUICK_TO_NOTICE, "RAY_AUTH_MODE": "disabled", "RAY_TMPDIR": directory}
        process = subprocess.Popen(
            [sys.executable, "-c", CLUSTER, directory, str(head_cpus)],
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        cluster = Cluster(process)
        for _ in range(nodes):
            cluster.do("add")
        try:
            yield cluster
        finally:
            process.communicate(timeout=60)


def newest_worker() -> int:
    """Return the process of a training worker: of the one that started last, whatever its rank."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found[process.create_time()] = process.pid
    return found[max(found)]
