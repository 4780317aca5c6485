"""KubeRay's manifests: shape and security by our rules; with --crd=FILE, the operator's schema."""

import copy
import importlib
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.cluster import rules
from tests.cluster.rules import CLUSTER
from yuzogpt.config import ServeSettings
from yuzogpt.config.resolve import resolve

Manifest = dict[str, Any]
FILES = sorted((CLUSTER / "kuberay").glob("*.yaml"))
SERVICE = CLUSTER / "kuberay" / "rayservice.yaml"
TOKEN_FILE = "/run/yuzogpt/auth_token"


def manifests(text: str) -> list[Manifest]:
    """Return a file's objects."""
    return list(yaml.safe_load_all(text))


def everything(*files: Path) -> dict[str, Manifest]:
    """Return the objects of files, or of those of training, by kind."""
    training = [path for path in FILES if path != SERVICE]
    return {one["kind"]: one for path in files or training for one in manifests(path.read_text())}


def cluster_of(one: Manifest) -> Manifest | None:
    """Return what an object says of a Ray cluster, if it makes one."""
    if one["kind"] == "RayService":
        return one["spec"]["rayClusterConfig"]
    return one["spec"] if one["kind"] == "RayCluster" else None


def pods(one: Manifest) -> Iterator[tuple[str, Manifest]]:
    """Yield the pod specs in an object."""
    if spec := cluster_of(one):
        yield "head", spec["headGroupSpec"]["template"]["spec"]
        for group in spec["workerGroupSpecs"]:
            yield group["groupName"], group["template"]["spec"]
    if one["kind"] == "RayJob":
        yield "submitter", one["spec"]["submitterPodTemplate"]["spec"]


def containers(one: Manifest) -> Iterator[tuple[str, Manifest]]:
    """Yield the containers in an object, the autoscaler's among them."""
    for _, pod in pods(one):
        for container in pod["containers"]:
            yield container["name"], container
    if cluster := cluster_of(one):
        yield "autoscaler", cluster["autoscalerOptions"]


def environment(container: Manifest) -> dict[str, str]:
    """Return a container's variables."""
    return {entry["name"]: entry.get("value") for entry in container["env"]}


def least_rights(one: Manifest) -> Iterator[str]:
    """Nobody is root or becomes it, and nothing is written but to volumes."""
    for name, pod in pods(one):
        user = pod.get("securityContext", {})
        if user.get("runAsNonRoot") is not True or not user.get("runAsUser"):
            yield f"{name}: may be root"
        if user.get("seccompProfile") != {"type": "RuntimeDefault"}:
            yield f"{name}: any system call"
        if name != "head" and pod.get("automountServiceAccountToken") is not False:
            yield f"{name}: holds Kubernetes' token"  # the head's autoscaler needs one
        if {"hostNetwork", "hostPID", "hostIPC"} & set(pod):
            yield f"{name}: shares what is the host's"
        if any("hostPath" in volume for volume in pod["volumes"]):
            yield f"{name}: mounts the host"
    for name, container in containers(one):
        closed = container.get("securityContext", {})
        if closed.get("allowPrivilegeEscalation") is not False or "privileged" in closed:
            yield f"{name}: may gain rights"
        if closed.get("readOnlyRootFilesystem") is not True:
            yield f"{name}: may change its image's files"
        if closed.get("capabilities") != {"drop": ["ALL"]}:
            yield f"{name}: has capabilities"


def resources(one: Manifest) -> Iterator[str]:
    """What a container may take is what it asks for: no node is promised twice."""
    for name, container in containers(one):
        wanted = container.get("resources", {})
        if not wanted.get("limits") or wanted["limits"] != wanted.get("requests"):
            yield f"{name}: limits are not requests"


def images(one: Manifest) -> Iterator[str]:
    """An image has a version."""
    for name, container in containers(one):
        if name != "autoscaler" and not re.search(r":\d|@sha256:", container["image"]):
            yield f"{name}: {container['image']} may be another image tomorrow"


def token(one: Manifest) -> Iterator[str]:
    """Authentication is on, and the token is a file of the secret's."""
    if cluster := cluster_of(one):
        options = cluster.get("authOptions", {})
        if options.get("mode") != "token" or not options.get("secretName"):
            yield "authOptions"
    for name, pod in pods(one):
        secrets = [v["secret"] for v in pod["volumes"] if "secret" in v]
        if {secret.get("defaultMode") for secret in secrets} != {0o400}:
            yield f"{name}: the secret's file is for all to read"
        for container in pod["containers"]:
            values = environment(container)
            if values.get("RAY_AUTH_MODE") != "token":
                yield f"{name}: RAY_AUTH_MODE is not token"
            if values.get("RAY_AUTH_TOKEN_PATH") != TOKEN_FILE:
                yield f"{name}: no path of the token"
            if values.get("RAY_AUTH_TOKEN") != "":
                yield f"{name}: the operator puts the token into the environment"
            mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
            if not mounts.get(str(Path(TOKEN_FILE).parent), {}).get("readOnly"):
                yield f"{name}: the token is not mounted"


def head(one: Manifest) -> Iterator[str]:
    """The head gets no work, gives jobs time to stop, and notices lost nodes."""
    cluster = cluster_of(one)
    if cluster is None:
        return
    group = cluster["headGroupSpec"]
    if [group["rayStartParams"].get(f"num-{what}") for what in ("cpus", "gpus")] != ["0", "0"]:
        yield "offers CPUs or GPUs"
    (container,) = group["template"]["spec"]["containers"]
    if one["kind"] == "RayService":
        return  # it has no jobs, and Serve looks after its replicas
    values = environment(container)
    if values.get("RAY_JOB_STOP_WAIT_TIME_S") != "60":
        yield "RAY_JOB_STOP_WAIT_TIME_S is not 60"
    if not 5 <= rules.silence(values) <= 30:
        yield f"a silent node counts as lost after {rules.silence(values):.0f} s"


def workers(one: Manifest) -> Iterator[str]:
    """GPU workers, from none upwards; of a service, from one."""
    least = 1 if one["kind"] == "RayService" else 0
    if cluster := cluster_of(one):
        if not cluster.get("enableInTreeAutoscaling"):
            yield "no autoscaling"
        for group in cluster["workerGroupSpecs"]:
            if {group["minReplicas"], group["replicas"]} != {least} or not group["maxReplicas"]:
                yield f"{group['groupName']}: not from {least} upwards"
            limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
            if not limits.get("nvidia.com/gpu"):
                yield f"{group['groupName']}: no GPU"


def network(one: Manifest) -> Iterator[str]:
    """Nobody comes in but the cluster itself; to the dashboard, the operator and who submits."""
    if one["kind"] == "NetworkPolicy":
        spec = one["spec"]
        of_service = one["metadata"]["name"] == "yuzogpt-serve"
        label = {"yuzogpt": "serve"} if of_service else {"ray.io/cluster": "yuzogpt"}
        if spec["podSelector"] != {"matchLabels": label}:
            yield "is of other pods"
        if "Ingress" not in spec["policyTypes"]:
            yield "does not stop who comes in"
        for rule in spec["ingress"]:
            inside = rule.get("from") == [{"podSelector": spec["podSelector"]}]
            open_ports = [port["port"] for port in rule.get("ports", [])]
            if of_service and open_ports == [8000]:  # HTTP, for anyone with a key
                continue
            if not inside and open_ports not in ([8265], [8265, 8000][: 1 + of_service]):
                yield "lets others in to more than the dashboard"
            for who in rule.get("from", [{}]):
                if not who.get("podSelector", {}).get("matchLabels"):
                    yield "lets everyone in"


RULES = [least_rights, resources, images, token, head, workers, network]


def broken(text: str) -> list[str]:
    """Return what is wrong with a file of manifests."""
    found = [
        f"{rule.__name__}: {line}"
        for one in manifests(text)
        for rule in RULES
        for line in rule(one)
    ]
    return found + [f"open_to_all: {line}" for line in rules.open_to_all(text)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_manifests_keep_to_the_rules(path):
    assert broken(path.read_text()) == []


BREAKS = {
    "root": (r"runAsNonRoot: true", "runAsNonRoot: false", "least_rights: head: may be root"),
    "user 0": (r"runAsUser: 1000", "runAsUser: 0", "least_rights: gpu: may be root"),
    "seccomp": (r"RuntimeDefault", "Unconfined", "least_rights: head: any system call"),
    "rights": (r"(allowPrivilegeEscalation): false", r"\1: true", "least_rights: ray-head: may"),
    "root filesystem": (r"(readOnlyRoot\w+): true", r"\1: false", "least_rights: autoscaler: may"),
    "capabilities": (r"drop: \[ALL\]", "add: [SYS_PTRACE]", "least_rights: ray-worker: has cap"),
    "Kubernetes' token": (r"(automount\w+): false", r"\1: true", "least_rights: gpu: holds"),
    "the host": (r"emptyDir: \{\}", "hostPath: {path: /}", "least_rights: head: mounts"),
    "host network": (r"( +)tolerations:", r"\1hostNetwork: true\n\1tolerations:", "least_rights"),
    "limits": (r"requests: {cpu: \"4\"", 'requests: {cpu: "1"', "resources: ray-head"),
    "latest": (r"yuzogpt:0.1.0", "yuzogpt:latest", "images: ray-head"),
    "auth off": (r"mode: token", "mode: disabled", "token: authOptions"),
    "mode off": (r"(RAY_AUTH_MODE), value: token", r"\1, value: disabled", "token: head: RAY_AU"),
    "token for all": (r"defaultMode: 0400", "defaultMode: 0444", "token: head: the secret"),
    "token by name": (r"{name: RAY_AUTH_TOKEN, value: \"\"}", "{name: A}", "token: gpu: the oper"),
    "token elsewhere": (r"mountPath: /run/yuzogpt", "mountPath: /x", "token: gpu: the token is"),
    "head works": (r'num-cpus: "0"', 'num-cpus: "4"', "head: offers"),
    "stop wait": (r'RAY_JOB_STOP_WAIT_TIME_S, value: "60"', 'A, value: "60"', "head: RAY_JOB"),
    "health": (r"RAY_health_check_", "RAY_health_", "head: a silent node"),
    "workers stay": (r"minReplicas: 0", "minReplicas: 2", "workers: gpu: not from 0"),
    "no GPU": (r"nvidia.com/gpu: 8", "example.com/gpu: 8", "workers: gpu: no GPU"),
    "policy of others": (
        r"  podSelector: {matchLabels: {ray.io/cluster: yuzogpt}}\n",
        "  podSelector: {}\n",
        "network: is of other pods",
    ),
    "everyone": (r"- from: .*\n", "- {}\n", "network: lets"),
    "all ports": (r"ports: \[{port: 8265}\]", "ports: []", "network: lets others"),
    "no reason": (r" +#.*\n +#.*\n(?= +dashboard-host)", "", "open_to_all: line"),
}


@pytest.mark.parametrize("case", BREAKS)
def test_rules_find_what_is_broken(case):
    pattern, replacement, expected = BREAKS[case]
    whole = "\n---\n".join(path.read_text() for path in FILES)
    text, count = re.subn(pattern, replacement, whole)
    assert count
    found = broken(text)
    assert any(line.startswith(expected) for line in found), found


def test_manifests_belong_together():
    found = everything()
    cluster, job = found["RayCluster"], found["RayJob"]
    name = cluster["metadata"]["name"]
    assert job["spec"]["clusterSelector"] == {"ray.io/cluster": name}
    claim = found["PersistentVolumeClaim"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    policy = found["NetworkPolicy"]["spec"]
    assert policy["podSelector"]["matchLabels"]["ray.io/cluster"] == name
    secret = cluster["spec"]["authOptions"]["secretName"]
    for _, pod in [*pods(cluster), *pods(job)]:
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert volumes["token"]["secret"]["secretName"] == secret
        for container in pod["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} <= set(volumes)
    for _, pod in pods(cluster):
        shared = next(volume for volume in pod["volumes"] if volume["name"] == "shared")
        assert shared["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    both = [*containers(cluster), *containers(job)]
    assert len({container["image"] for _, container in both if "image" in container}) == 1


def test_ray_is_the_version_that_is_installed():
    import ray

    for path in FILES:
        for one in manifests(path.read_text()):
            if cluster := cluster_of(one):
                assert cluster["rayVersion"] == ray.__version__


def test_the_service_is_one_that_is_served_here():
    """What the manifest and cluster/serve.yaml tell Serve are settings, and of an app of ours."""
    from ray.serve.schema import ServeDeploySchema

    service = everything(SERVICE)["RayService"]
    configs = [service["spec"]["serveConfigV2"], (CLUSTER / "serve.yaml").read_text()]
    found = []
    for text in configs:
        config = ServeDeploySchema.model_validate(yaml.safe_load(text))
        (application,) = config.applications
        module, _, name = application.import_path.partition(":")
        assert callable(getattr(importlib.import_module(module), name))
        flags = [f"--{key}={value}" for key, value in application.args.items()]
        settings = resolve(ServeSettings, [], flags)
        assert settings.replicas.span() == (1, 4)
        assert settings.served.follow is True
        assert config.http_options.host == settings.http.host
        assert settings.http.host == "127.0.0.1" or settings.limits.api_keys_file
        found.append(settings)
    for _, pod in pods(service):
        (container,) = pod["containers"]
        mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
        assert str(Path(found[0].limits.api_keys_file).parent) in mounts
    cluster = cluster_of(service)
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert group["template"]["metadata"]["labels"] == {"yuzogpt": "serve"}  # the policy's


def strict(schema: Any) -> Any:
    """Refuse fields that a schema does not name: Kubernetes drops them without a word."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    out = {key: strict(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
        out.setdefault("additionalProperties", False)
    return out


def test_operator_knows_what_it_is_given(request):
    files = request.config.getoption("--crd")
    if not files:
        pytest.skip("no --crd=FILE: KubeRay's ray.io_rayclusters.yaml, _rayjobs, _rayservices")
    ours = everything(*FILES)
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the files have a million characters
    for file in files:
        definition = yaml.load(Path(file).read_text(), loader)
        one = ours[definition["spec"]["names"]["kind"]]
        group, _, version = one["apiVersion"].partition("/")
        assert group == definition["spec"]["group"]
        (schema,) = (
            served["schema"]["openAPIV3Schema"]
            for served in definition["spec"]["versions"]
            if served["name"] == version
        )
        metadata = {"metadata": {"type": "object"}}
        schema = strict({**schema, "properties": {**schema["properties"], **metadata}})
        validator = jsonschema.Draft7Validator(schema)  # without a look at the schema: 6 s
        assert [error.message for error in validator.iter_errors(one)] == []
        wrong = copy.deepcopy(one)
        wrong["spec"]["entripoint"] = "a"
        (error,) = validator.iter_errors(wrong)
        assert "entripoint" in error.message


def test_keys_are_made_where_nobody_else_reads_them_and_no_job_takes_them_along(tmp_path):
    """The commands of the first lines, in a clone, by a user whose files others may read."""
    clone, home = tmp_path / "clone", tmp_path / "home"
    clone.mkdir()
    lines = [line.removeprefix("#").split("  #")[0] for line in SERVICE.read_text().splitlines()]
    commands = [line for line in lines if "yuzogpt/api_keys" in line or "mkdir" in line]
    secret = next(line for line in commands if "kubectl" in line)
    script = "\n".join(["umask 022", *(line for line in commands if line != secret)])
    subprocess.run(
        ["bash", "-ec", script], cwd=clone, env={**os.environ, "HOME": str(home)}, check=True
    )
    keys = home / ".config" / "yuzogpt" / "api_keys"
    assert keys.stat().st_mode & 0o077 == 0
    assert len(keys.read_text().strip()) == 64
    assert list(clone.iterdir()) == []
    assert f"--from-file={keys}" in secret.replace("$HOME", str(home))
    ignored = (CLUSTER.parent / ".gitignore").read_text().splitlines()
    assert "*api_keys*" in ignored
