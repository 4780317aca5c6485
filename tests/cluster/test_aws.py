"""AWS, against a server of its APIs: what aws-access.yaml makes, and what Ray asks EC2 for with it.

The server knows which actions a role may do, but not the conditions on them, nor iam:PassRole.
"""

import contextlib
import os
import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.rules import CLUSTER
from tests.conftest import aws_server

pytestmark = pytest.mark.slow

STACK = CLUSTER / "aws-access.yaml"
CONFIG = CLUSTER / "aws.yaml"
REGION = yaml.safe_load(CONFIG.read_text())["provider"]["region"]
HOME_OF_READER = "198.51.100.7/32"


@pytest.fixture
def ec2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """AWS without anything in it; yields a client of EC2. Ray keeps its clients, so they go."""
    import boto3
    from ray.autoscaler._private.aws import config, utils

    monkeypatch.setenv("HOME", str(tmp_path))  # Ray writes a key into ~/.ssh
    with aws_server(monkeypatch):
        monkeypatch.setenv("AWS_DEFAULT_REGION", REGION)
        yield boto3.client("ec2")
    for cached in (utils.resource_cache, utils.client_cache, config._get_subnets_or_die):
        cached.cache_clear()


def deploy(ec2: Any) -> None:
    """Make the stack, as its first lines say."""
    import boto3

    image = ec2.describe_images()["Images"][0]["ImageId"]
    boto3.client("ssm").put_parameter(Name="/image", Value=image, Type="String")
    text, count = re.subn(r"(Default: )/aws/service\S+", r"\1/image", STACK.read_text())
    assert count == 1  # the server has none of AWS's public parameters
    given = {"SshFrom": HOME_OF_READER, "Bucket": "runs"}
    stacks = boto3.client("cloudformation")
    stacks.create_stack(
        StackName="yuzogpt",
        TemplateBody=text,
        Capabilities=["CAPABILITY_NAMED_IAM"],
        Parameters=[{"ParameterKey": k, "ParameterValue": v} for k, v in given.items()],
    )
    (stack,) = stacks.describe_stacks()["Stacks"]
    assert stack["StackStatus"] == "CREATE_COMPLETE"


def bootstrap(**changes: Any) -> dict[str, Any]:
    """Do what `ray up` does before it asks for a node; `changes` are made to every node type."""
    from ray.autoscaler._private.aws.config import bootstrap_aws
    from ray.autoscaler._private.util import prepare_config

    config = yaml.safe_load(CONFIG.read_text())
    for kind in config["available_node_types"].values():
        kind["node_config"].update(changes)
        kind["node_config"] = {k: v for k, v in kind["node_config"].items() if v is not None}
    result: dict[str, Any] = bootstrap_aws(prepare_config(config))
    return result


def provider_of(config: dict[str, Any]) -> Any:
    """Return what `ray up` and the autoscaler ask for nodes."""
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    return AWSNodeProvider(config["provider"], config["cluster_name"])


def launch(config: dict[str, Any], kind: str) -> str:
    """Launch a node as `ray up` and the autoscaler do; return its id."""
    node = config["available_node_types"][kind]["node_config"]
    tags = {"ray-node-kind": kind, "ray-node-name": kind}
    (identity,) = provider_of(config).create_node(node, tags, 1)
    return str(identity)


@contextlib.contextmanager
def rights_in_force() -> Iterator[None]:
    """From here on, let the server look at who asks."""

    def after(requests: str) -> None:
        url = f"{os.environ['AWS_ENDPOINT_URL']}/moto-api/reset-auth"
        plain = {"Content-Type": "text/plain"}
        urllib.request.urlopen(urllib.request.Request(url, requests.encode(), plain)).close()

    after("0")
    try:
        yield
    finally:
        after("inf")


def credentials(role: str) -> dict[str, str]:
    """Return what a node with this role finds in its metadata service."""
    import boto3

    arn = boto3.client("iam").get_role(RoleName=role)["Role"]["Arn"]
    given = boto3.client("sts").assume_role(RoleArn=arn, RoleSessionName="node")["Credentials"]
    return {
        "aws_access_key_id": given["AccessKeyId"],
        "aws_secret_access_key": given["SecretAccessKey"],
        "aws_session_token": given["SessionToken"],
    }


def ssh_rules(groups: list[dict[str, Any]]) -> list[str]:
    """Return from where the groups let ssh in."""
    rules = [rule for group in groups for rule in group["IpPermissions"]]
    return [ip["CidrIp"] for rule in rules if rule.get("FromPort") == 22 for ip in rule["IpRanges"]]


def test_the_stack_is_one_that_cloudformation_takes():
    from cfnlint.api import lint

    text = STACK.read_text()
    assert [str(match) for match in lint(text, regions=[REGION])] == []
    wrong = lint(text.replace("CidrIp:", "Cidr:"), regions=[REGION])
    assert any("'Cidr' was unexpected" in str(match) for match in wrong)


@pytest.mark.parametrize("cidr", ["0.0.0.0/0", "0.0.0.0/7", "198.51.100.7", "", "::/0"])
def test_ssh_for_everyone_is_refused(cidr):
    parameter = re.search(r"AllowedPattern: '(.*)'", STACK.read_text())
    assert parameter
    assert not re.fullmatch(parameter[1], cidr)
    assert re.fullmatch(parameter[1], HOME_OF_READER)


def test_nodes_are_launched_closed(ec2):
    import boto3

    deploy(ec2)
    config = bootstrap()
    ids = {kind: launch(config, kind) for kind in ("head", "gpu_worker")}
    found = {}
    for kind, identity in ids.items():
        (reservation,) = ec2.describe_instances(InstanceIds=[identity])["Reservations"]
        (found[kind],) = reservation["Instances"]
    for kind, node in found.items():
        assert node["MetadataOptions"]["HttpTokens"] == "required"
        groups = [group["GroupId"] for group in node["SecurityGroups"]]
        (group,) = ec2.describe_security_groups(GroupIds=groups)["SecurityGroups"]
        ssh, inside = sorted(group["IpPermissions"], key=lambda rule: rule["IpProtocol"] == "-1")
        assert (ssh["FromPort"], ssh["ToPort"], ssh["IpProtocol"]) == (22, 22, "tcp")
        assert [ip["CidrIp"] for ip in ssh["IpRanges"]] == [HOME_OF_READER]
        assert ssh["UserIdGroupPairs"] == ssh["Ipv6Ranges"] == []
        assert [pair["GroupId"] for pair in inside["UserIdGroupPairs"]] == groups
        assert inside["IpRanges"] == inside["Ipv6Ranges"] == []
        name = kind.removeprefix("gpu_")
        assert node["IamInstanceProfile"]["Arn"].endswith(f"instance-profile/yuzogpt-{name}")
    volumes = ec2.describe_volumes()["Volumes"]
    assert [volume["Encrypted"] for volume in volumes] == [True, True]
    assert "InstanceLifecycle" not in found["head"]
    assert found["gpu_worker"]["InstanceLifecycle"] == "spot"
    # Ray made no group of its own: there, ssh would be open.
    assert ssh_rules(ec2.describe_security_groups()["SecurityGroups"]) == [HOME_OF_READER]
    roles = {role["RoleName"] for role in boto3.client("iam").list_roles()["Roles"]}
    assert roles == {"yuzogpt-head", "yuzogpt-worker"}


def test_the_head_may_start_and_end_workers_and_workers_may_not(ec2):
    import boto3
    from botocore.exceptions import ClientError

    deploy(ec2)
    config = bootstrap()
    head, worker = credentials("yuzogpt-head"), credentials("yuzogpt-worker")
    with rights_in_force():
        config["provider"]["aws_credentials"] = head
        identity = launch(config, "gpu_worker")
        provider = provider_of(config)
        assert provider.non_terminated_nodes({}) == [identity]
        provider.set_node_tags(identity, {"ray-node-status": "up-to-date"})
        provider.terminate_node(identity)
        for rights in (head, worker):
            store = boto3.client("s3", **rights)
            store.put_object(Bucket="runs", Key="a/b", Body=b"c")
            assert store.list_objects_v2(Bucket="runs")["KeyCount"] == 1
            store.delete_object(Bucket="runs", Key="a/b")
            with pytest.raises(ClientError, match=r"not authorized|AccessDenied"):
                store.delete_bucket(Bucket="runs")
            with pytest.raises(ClientError, match="not authorized"):
                boto3.client("iam", **rights).list_users()
        with pytest.raises(ClientError, match="not authorized"):
            boto3.client("ec2", **worker).run_instances(MinCount=1, MaxCount=1)


def test_nothing_starts_before_the_stack_is_there(ec2):
    from botocore.exceptions import ClientError

    with pytest.raises(ClientError, match="yuzogpt"):
        bootstrap()
    assert ec2.describe_instances()["Reservations"] == []


def test_why_there_is_a_stack(ec2):
    """Left alone, Ray opens ssh to everyone: the day it does not, the stack can shrink."""
    deploy(ec2)
    image = ec2.describe_images()["Images"][0]["ImageId"]
    bootstrap(LaunchTemplate=None, ImageId=image)
    opened = ssh_rules(ec2.describe_security_groups()["SecurityGroups"])
    assert sorted(opened) == ["0.0.0.0/0", HOME_OF_READER]


def test_the_bucket_is_for_nobody_else():
    from cfnlint.decode.cfn_yaml import loads

    (bucket,) = (
        resource["Properties"]
        for resource in loads(STACK.read_text())["Resources"].values()
        if resource["Type"] == "AWS::S3::Bucket"
    )
    closed = bucket["PublicAccessBlockConfiguration"]
    assert len(closed) == 4
    assert all(closed.values())


def test_node_types_offer_what_the_machines_have(ec2):
    config = yaml.safe_load(CONFIG.read_text())
    for name, kind in config["available_node_types"].items():
        types = [kind["node_config"]["InstanceType"]]
        (machine,) = ec2.describe_instance_types(InstanceTypes=types)["InstanceTypes"]
        if name != config["head_node_type"]:
            gpus = sum(gpu["Count"] for gpu in machine["GpuInfo"]["Gpus"])
            cores = machine["VCpuInfo"]["DefaultVCpus"]
            assert kind["resources"] == {"CPU": cores, "GPU": gpus}
