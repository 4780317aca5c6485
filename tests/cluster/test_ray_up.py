"""The configs of `ray up`: Ray takes them, they keep to our rules, and a broken one is named.

No cloud is asked: what Ray would ask for is held against the clouds' descriptions of their APIs.
"""

import copy
import json
import re
from pathlib import Path

import jsonschema
import pytest
import yaml

from tests.cluster import rules
from tests.cluster.rules import CLUSTER

CONFIGS = rules.launcher_configs()
CLOUDS = [CLUSTER / f"{name}.yaml" for name in ("aws", "gcp", "azure")]


def named(path: Path) -> str:
    """Return a test's name for a config."""
    return path.stem


def test_all_configs_are_looked_at():
    assert set(CLOUDS) <= set(CONFIGS)


@pytest.mark.parametrize("path", CONFIGS, ids=named)
def test_ray_takes_the_config(path):
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load(path.read_text())
    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    # Ray's defaults have start and setup commands of their own: ours replace them.
    assert "0.0.0.0" not in json.dumps(prepared["head_start_ray_commands"])
    assert prepared["setup_commands"] == config["setup_commands"]
    for local in config["file_mounts"].values():
        assert local == rules.TOKEN or (CLUSTER.parent / local).exists(), local


@pytest.mark.parametrize("path", CONFIGS, ids=named)
def test_config_keeps_to_the_rules(path):
    assert rules.broken(path.read_text()) == []


# What is broken, as (pattern, replacement); which rule must say so.
BREAKS = {
    "token off on the head": (r"RAY_AUTH_MODE=token(?= RAY_JOB)", "", "token: head"),
    "token off on workers": (r"RAY_AUTH_MODE=token ray", "ray", "token: worker"),
    "token disabled": (r"RAY_AUTH_MODE=token", "RAY_AUTH_MODE=disabled", "token: head"),
    "token not sent": (r"~/.ray/auth_token: ~/.ray/auth_token", "~/a: ~/b", "token: ~/.ray"),
    "token in a command": (r"(?=RAY_AUTH_MODE=)", "RAY_AUTH_TOKEN=abc ", "token: the token"),
    "dashboard open": (r"--dashboard-host=127.0.0.1", "--dashboard-host=0.0.0.0", "dashboard"),
    "dashboard not said": (r"--dashboard-host=127.0.0.1", "", "dashboard"),
    "stop wait of Ray's": (r"RAY_JOB_STOP_WAIT_TIME_S=60", "", "stop_wait"),
    "health of Ray's": (r"RAY_health_check_\w+=\d+", "", "health: a silent node counts as lo"),
    "health too eager": (r"(_timeout_ms|_period_ms)=\d+", r"\1=100", "health"),
    "head works": (r"--num-cpus=0", "--num-cpus=8", "idle_head: its `ray start`"),
    "head's type works": (r"\{CPU: 0, GPU: 0\}", "{CPU: 8, GPU: 0}", "idle_head: its node"),
    "no setup": (r"sh ~/yuzogpt/cluster/install.sh \w+", "date", "one_setup"),
    "pip besides": (r"(?=sh ~/yuzogpt/cluster/inst)", "pip install x; ", "one_setup: something"),
    "workers stay": (r"min_workers: 0", "min_workers: 1", "autoscaling: gpu_worker"),
    "stopped disks": (r"cache_stopped_nodes: false", "a: b", "autoscaling: stopped"),
}
BREAKS_OF = {
    "aws": {
        "IMDSv1": (r"HttpTokens: required", "HttpTokens: optional", "aws: head: IMDSv1"),
        "plain disk": (r"Encrypted: true", "Encrypted: false", "aws: gpu_worker: a disk"),
        "Ray's group": (r"LaunchTemplate: .*", "Monitoring: {Enabled: true}", "aws: head: no sec"),
        "Ray's rights": (r"IamInstanceProfile: .*", "EbsOptimized: true", "aws: head: no instance"),
        "on demand": (r"InstanceMarketOptions: .*", "EbsOptimized: true", "aws: gpu_worker: not"),
        "Ray fills a group": (
            r"  type: aws",
            "  type: aws\n  security_group: {GroupName: mine}",
            "aws: provider.security_group",
        ),
    },
    "gcp": {
        "default network": (r"subnetworks/yuzogpt", "subnetworks/default", "gcp: head: not in"),
        "no account": (r"serviceAccounts:", "x:", "gcp: gpu_worker: no service account"),
        "on demand": (r"provisioningModel: SPOT", "x: y", "gcp: gpu_worker: not on spot"),
    },
    "azure": {
        "Ray's network": (r"unique_id: yuzo", "tags: {}", "azure: unique_id"),
        "Ray's identity": (r"msi_name: yuzogpt", "tags: {}", "azure: unique_id"),
        "on demand": (r"priority: Spot", "priority: Regular", "azure: gpu_worker: not on spot"),
    },
}


@pytest.mark.parametrize("path", CLOUDS, ids=named)
@pytest.mark.parametrize("case", BREAKS)
def test_rules_find_what_is_broken(case, path):
    check_break(path, *BREAKS[case])


@pytest.mark.parametrize(
    ("name", "case"), [(name, case) for name in BREAKS_OF for case in BREAKS_OF[name]]
)
def test_rules_of_a_provider_find_what_is_broken(name, case):
    check_break(CLUSTER / f"{name}.yaml", *BREAKS_OF[name][case])


def check_break(path: Path, pattern: str, replacement: str, expected: str) -> None:
    """Break a config in memory; the rules must name it."""
    text, count = re.subn(pattern, replacement, path.read_text())
    assert count, f"{path.name} has nothing like {pattern}"
    found = rules.broken(text)
    assert any(line.startswith(expected) for line in found), found


def test_an_address_for_all_needs_a_reason():
    assert list(rules.open_to_all("a: 0.0.0.0\n")) == ["line 1: a: 0.0.0.0"]
    assert list(rules.open_to_all("a: 0.0.0.0  # the operator looks in\n")) == []
    assert list(rules.open_to_all("# the operator looks in\na: 0.0.0.0\nb: 0.0.0.0")) == [
        "line 3: b: 0.0.0.0"
    ]


FILES = [path for path in sorted(CLUSTER.rglob("*")) if path.is_file()]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_nothing_in_the_folder_is_open_to_all_without_a_reason(path):
    assert list(rules.open_to_all(path.read_text())) == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray's own
@pytest.mark.parametrize("path", CONFIGS, ids=named)
def test_ray_knows_what_it_is_started_with(path):
    import ray
    from ray.scripts.scripts import start

    config = yaml.safe_load(path.read_text())
    package = Path(ray.__file__).parent
    server = (package / "core/src/ray/gcs/gcs_server").read_bytes()
    jobs = (package / "dashboard/modules/job/job_supervisor.py").read_text()
    for of in ("head", "worker"):
        (command,) = rules.starts(config, of)
        # A misspelt option is refused by Ray, a misspelt variable is not.
        start.make_context("start", command.partition("ray start")[2].split())
        for name in rules.environment(command):
            if name.startswith("RAY_health"):
                assert name.removeprefix("RAY_").encode() in server
            elif "STOP_WAIT" in name:
                assert name in jobs
            else:
                assert name in ("RAY_AUTH_MODE", "RAY_USAGE_STATS_ENABLED") or (
                    name.removeprefix("RAY_").encode() in server
                )


def google_schema(name: str, schemas: dict) -> dict:
    """Turn a type of Google's API description into a JSON schema that knows no other fields."""
    schema = {key: value for key, value in schemas[name].items() if key != "id"}

    def strict(node: dict) -> dict:
        if "$ref" in node:
            return google_schema(node["$ref"], schemas)
        out = {key: node[key] for key in ("type", "enum") if key in node}
        if "items" in node:
            out["items"] = strict(node["items"])
        if "properties" in node:
            out["properties"] = {key: strict(value) for key, value in node["properties"].items()}
            out["additionalProperties"] = False
        if node.get("format") in ("int64", "uint64"):
            out["type"] = ["string", "integer"]
        return out

    return strict(schema)


def instance_schema() -> dict:
    """Return the schema of what Compute Engine is asked for."""
    from googleapiclient import discovery_cache

    documents = Path(discovery_cache.__file__).parent / "documents"
    schemas = json.loads((documents / "compute.v1.json").read_text())["schemas"]
    return google_schema("Instance", schemas)


def test_google_knows_what_it_is_asked_for():
    schema = instance_schema()
    for _, node in rules.node_configs(yaml.safe_load((CLUSTER / "gcp.yaml").read_text())):
        jsonschema.validate(node, schema)
        wrong = copy.deepcopy(node)
        wrong["disks"][0]["initializeParams"]["sizeGb"] = 200
        with pytest.raises(jsonschema.ValidationError, match="sizeGb"):
            jsonschema.validate(wrong, schema)


def test_azure_knows_what_it_is_asked_for():
    import ray.autoscaler

    folder = Path(ray.autoscaler.__file__).parent / "_private/_azure"
    template = json.loads((folder / "azure-vm-template.json").read_text())["parameters"]
    # What Ray adds itself, and what it takes out.
    added = {"vmName", "vmTags", "vmCount", "msi", "nsg", "subnet", "adminUsername", "publicKey"}
    types = {"string": str, "int": int}
    for _, node in rules.node_configs(yaml.safe_load((CLUSTER / "azure.yaml").read_text())):
        asked = node["azure_arm_parameters"]
        for name, value in asked.items():
            assert isinstance(value, types[template[name]["type"]]), name
        needed = {name for name, field in template.items() if "defaultValue" not in field}
        assert needed <= added | set(asked)


def test_scripts_make_what_the_configs_name():
    google = yaml.safe_load((CLUSTER / "gcp.yaml").read_text())
    script = (CLUSTER / "gcp-access.sh").read_text()
    region = google["provider"]["region"]
    assert f"region=${{4:-{region}}}" in script
    for _, node in rules.node_configs(google):
        (face,) = node["networkInterfaces"]
        assert face["subnetwork"] == f"regions/{region}/subnetworks/yuzogpt"
    assert "networks subnets create yuzogpt --network=yuzogpt" in script
    worker = google["available_node_types"]["gpu_worker"]["node_config"]["serviceAccounts"][0]
    name, _, project = worker["email"].partition("@")
    assert f"service-accounts create {name} " in script
    assert project.startswith(google["provider"]["project_id"] + ".")

    config = yaml.safe_load((CLUSTER / "azure.yaml").read_text())
    provider, script = config["provider"], (CLUSTER / "azure-access.sh").read_text()
    # How Ray calls its network: else it would make one, with its own security group.
    prefix = f"ray-{config['cluster_name']}-{provider['unique_id']}"
    assert f"--name {prefix}-vnet --address-prefixes {provider['subnet_mask']}" in script
    assert f"--name {prefix}-subnet " in script
    assert f"identity create --name {provider['msi_name']}\n" in script
    assert provider["msi_resource_group"] == provider["resource_group"]
    assert f"--resource-group {provider['resource_group']} " in script
    assert f"location=${{4:-{provider['location']}}}" in script
