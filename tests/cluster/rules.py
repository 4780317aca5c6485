"""What every shipped cluster config must keep to. In: a config, as text. Out: what breaks a rule.

A rule is a function that yields one line for each thing that breaks it; its name starts the line.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from tests.conftest import REPOSITORY

CLUSTER = REPOSITORY / "cluster"
TOKEN = "~/.ray/auth_token"
Config = dict[str, Any]


def launcher_configs() -> list[Path]:
    """Return the configs that `ray up` takes."""
    return [path for path in sorted(CLUSTER.glob("*.yaml")) if "provider:" in path.read_text()]


def broken(text: str) -> list[str]:
    """Return what is wrong with a config of `ray up`."""
    config = yaml.safe_load(text)
    rules = [*EVERYWHERE, *(IN_CLOUDS if config["provider"]["type"] != "local" else [])]
    rules += OF_PROVIDER.get(config["provider"]["type"], [])
    found = [f"{rule.__name__}: {line}" for rule in rules for line in rule(config)]
    return found + [f"open_to_all: {line}" for line in open_to_all(text)]


def open_to_all(text: str) -> Iterator[str]:
    """No 0.0.0.0 without a reason in a comment, in its line or in those right above it."""
    lines = text.splitlines()
    for number, line in enumerate(lines):
        said = "#" in line or (number > 0 and lines[number - 1].lstrip().startswith("#"))
        if "0.0.0.0" in line and not said:
            yield f"line {number + 1}: {line.strip()}"


def starts(config: Config, of: str) -> list[str]:
    """Return the commands that start Ray: of the head, or of workers."""
    return [command for command in config[f"{of}_start_ray_commands"] if "ray start" in command]


def environment(command: str) -> dict[str, str]:
    """Return the variables that a command sets before `ray start`."""
    return dict(re.findall(r"\b(RAY_\w+)=(\S+?)(?=[;\s])", command.partition("ray start")[0]))


def token(config: Config) -> Iterator[str]:
    """Authentication is on in every start, and the token comes as a file."""
    for of in ("head", "worker"):
        commands = starts(config, of)
        if not commands:
            yield f"{of}: no `ray start`"
        if any(environment(command).get("RAY_AUTH_MODE") != "token" for command in commands):
            yield f"{of}: RAY_AUTH_MODE is not token"
    if config["file_mounts"].get(TOKEN) != TOKEN:
        yield f"{TOKEN} is not in file_mounts"
    if re.search(r"RAY_AUTH_TOKEN=|auth_token=", str(config)):
        yield "the token stands in a command: it would be read off the process list"


def dashboard(config: Config) -> Iterator[str]:
    """The dashboard, and with it the jobs API, listens on the head's loopback alone."""
    for command in starts(config, "head"):
        if "--dashboard-host=127.0.0.1" not in command:
            yield "not bound to the loopback"


def stop_wait(config: Config) -> Iterator[str]:
    """`ray job stop` waits for a checkpoint."""
    for command in starts(config, "head"):
        if environment(command).get("RAY_JOB_STOP_WAIT_TIME_S") != "60":
            yield "RAY_JOB_STOP_WAIT_TIME_S is not 60"


def silence(values: dict[str, str]) -> float:
    """Return the seconds until a node that says nothing counts as lost."""
    period, timeout, threshold = (
        float(values.get(f"RAY_health_check_{name}", default))
        for name, default in (("period_ms", 3e3), ("timeout_ms", 1e4), ("failure_threshold", 5))
    )
    return threshold * (period + timeout) / 1000


def health(config: Config) -> Iterator[str]:
    """A lost node is noticed within half a minute, one that stalls for seconds is kept."""
    for command in starts(config, "head"):
        if not 5 <= (seconds := silence(environment(command))) <= 30:
            yield f"a silent node counts as lost after {seconds:.0f} s"


def idle_head(config: Config) -> Iterator[str]:
    """The head gets none of the work."""
    for command in starts(config, "head"):
        if "--num-cpus=0" not in command or "--num-gpus=0" not in command:
            yield "its `ray start` offers CPUs or GPUs"
    if "available_node_types" in config:
        head = config["available_node_types"][config["head_node_type"]]
        if any(head["resources"].get(what) != 0 for what in ("CPU", "GPU")):
            yield "its node type offers CPUs or GPUs"
        if head.get("max_workers", 0) != 0:
            yield "workers may be of its type"


def one_setup(config: Config) -> Iterator[str]:
    """Every target is set up by the same script."""
    commands = [command for command in config["setup_commands"] if "cluster/install.sh" in command]
    if len(commands) != 1:
        yield "cluster/install.sh is not run once"
    if any("pip" in command for command in config["setup_commands"]):
        yield "something is installed besides cluster/install.sh"


def workers(config: Config) -> Iterator[tuple[str, Config]]:
    """Yield the node types of workers."""
    for name, kind in config["available_node_types"].items():
        if name != config["head_node_type"]:
            yield name, kind


def autoscaling(config: Config) -> Iterator[str]:
    """GPU workers come when they are wanted, and go when they are idle."""
    if not any(kind["resources"].get("GPU") for _, kind in workers(config)):
        yield "no worker has a GPU"
    for name, kind in workers(config):
        if kind.get("min_workers", 0) != 0 or not kind.get("max_workers"):
            yield f"{name}: not from 0 upwards"
    if not 0 < config.get("idle_timeout_minutes", 0) <= 30:
        yield "idle_timeout_minutes is not set"
    if config["provider"].get("cache_stopped_nodes") is not False:
        yield "stopped nodes are kept, and paid"


def node_configs(config: Config) -> Iterator[tuple[str, Config]]:
    """Yield what the provider is asked for, for each node type."""
    for name, kind in config["available_node_types"].items():
        yield name, kind["node_config"]


def aws(config: Config) -> Iterator[str]:
    """A group of ours, IMDSv2, encrypted disks, rights of ours, spot workers."""
    for name, node in node_configs(config):
        if not {"LaunchTemplate", "SecurityGroupIds"} & set(node):
            yield f"{name}: no security group of ours; Ray's lets everyone try ssh"
        if node.get("MetadataOptions", {}).get("HttpTokens") != "required":
            yield f"{name}: IMDSv1 is on"
        disks = node.get("BlockDeviceMappings", [])
        if not disks or not all(disk["Ebs"].get("Encrypted") is True for disk in disks):
            yield f"{name}: a disk is not encrypted"
        if "IamInstanceProfile" not in node:
            yield f"{name}: no instance profile of ours; Ray's may do anything in EC2 and S3"
    for name, kind in workers(config):
        if kind["node_config"].get("InstanceMarketOptions", {}).get("MarketType") != "spot":
            yield f"{name}: not on spot"
    if "security_group" in config["provider"]:
        yield "provider.security_group: Ray adds ssh from 0.0.0.0/0 to what stands there"


def gcp(config: Config) -> Iterator[str]:
    """A network of ours, a filled-in project, an account for workers, spot workers."""
    for name, node in node_configs(config):
        interfaces = node.get("networkInterfaces", [])
        if [face.get("subnetwork", "").rpartition("/")[2] for face in interfaces] != ["yuzogpt"]:
            yield f"{name}: not in the network whose firewall is ours"
    for name, kind in workers(config):
        if not kind["node_config"].get("serviceAccounts"):
            yield f"{name}: no service account: it could not read the bucket"
        if kind["node_config"].get("scheduling", {}).get("provisioningModel") != "SPOT":
            yield f"{name}: not on spot"


def azure(config: Config) -> Iterator[str]:
    """The subnet and the identity of ours, spot workers."""
    provider = config["provider"]
    if not {"unique_id", "msi_name", "msi_resource_group"} <= set(provider):
        yield "unique_id, msi_name, msi_resource_group: without them Ray makes a network of its own"
    for name, kind in workers(config):
        if kind["node_config"]["azure_arm_parameters"].get("priority") != "Spot":
            yield f"{name}: not on spot"


Rule = Callable[[Config], Iterator[str]]
EVERYWHERE: list[Rule] = [token, dashboard, stop_wait, health, idle_head, one_setup]
IN_CLOUDS: list[Rule] = [autoscaling]
OF_PROVIDER: dict[str, list[Rule]] = {"aws": [aws], "gcp": [gcp], "azure": [azure]}
