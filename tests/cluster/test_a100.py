"""cluster/a100.yaml on AWS: Ray's own code from the file to EC2's RunInstances, with EC2 answered here."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import boto3
import botocore.session
import botocore.validate
import pytest
import yaml
from ray.autoscaler._private.aws import utils
from ray.autoscaler._private.aws.config import DEFAULT_AMI, bootstrap_aws
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.util import prepare_config
from ray.autoscaler.node_launch_exception import NodeLaunchException
from ray.autoscaler.tags import TAG_RAY_LAUNCH_CONFIG, TAG_RAY_NODE_KIND

FILE = Path(__file__).parents[2] / "cluster/a100.yaml"
ZONES = ("us-west-2a", "us-west-2b", "us-west-2c")


@pytest.fixture
def cluster() -> dict[str, Any]:
    return yaml.safe_load(FILE.read_text(encoding="utf-8"))


class Ec2:
    """EC2 behind botocore's own checks of requests: some subnets, and instances where it has any."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.spot_zones = set(ZONES)
        self._ids = itertools.count()

    def answer(self, model: Any, params: dict[str, Any], **_: Any) -> tuple[Any, dict[str, Any]]:
        asked = params["body"]
        self.calls.append((model.name, asked))
        found = getattr(self, model.name)(asked)
        return SimpleNamespace(status_code=400 if "Error" in found else 200), found

    def DescribeSecurityGroups(self, asked: Any) -> dict[str, Any]:
        return {"SecurityGroups": [{"GroupId": "sg-00000000000000000", "VpcId": "vpc-1"}]}

    def DescribeSubnets(self, asked: Any) -> dict[str, Any]:
        common = {"State": "available", "VpcId": "vpc-1", "MapPublicIpOnLaunch": True}
        return {"Subnets": [{"SubnetId": f"subnet-{z[-1]}", "AvailabilityZone": z, **common} for z in ZONES]}

    def DescribeKeyPairs(self, asked: Any) -> dict[str, Any]:
        return {"KeyPairs": []}

    def CreateKeyPair(self, asked: Any) -> dict[str, Any]:
        return {"KeyName": asked["KeyName"], "KeyMaterial": "a key"}

    def RunInstances(self, asked: Any) -> dict[str, Any]:
        zone = f"us-west-2{asked['SubnetId'][-1]}"
        if "InstanceMarketOptions.MarketType" in asked and zone not in self.spot_zones:
            return {"Error": {"Code": "InsufficientInstanceCapacity", "Message": "none"}}
        return {"Instances": [{"InstanceId": f"i-{next(self._ids)}", "State": {"Name": "pending"}}]}


@pytest.fixture
def ec2(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Ec2]:
    fake = Ec2()
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"):
        monkeypatch.setenv(f"AWS_{name}", "none")
    session = boto3.Session()
    session.events.register("before-call.ec2", fake.answer)
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", session)
    for cache in (utils.resource_cache, utils.client_cache):
        cache.cache_clear()
    yield fake
    for cache in (utils.resource_cache, utils.client_cache):
        cache.cache_clear()


def start(config: dict[str, Any], node_type: str, count: int = 1) -> None:
    """Starts nodes as Ray's head does."""
    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    node_config = config["available_node_types"][node_type]["node_config"]
    provider.create_node(node_config, {TAG_RAY_NODE_KIND: "worker", TAG_RAY_LAUNCH_CONFIG: "hash"}, count)


def test_ray_boots_from_the_file_and_changes_nothing_in_the_account_but_its_key(
    cluster: dict[str, Any], ec2: Ec2
):
    config = bootstrap_aws(prepare_config(cluster))
    # Neither a role nor a security group of Ray's own making: its group is open to the Internet.
    assert [name for name, _ in ec2.calls if not name.startswith("Describe")] == ["CreateKeyPair"]
    for node_type in config["available_node_types"].values():
        assert node_type["node_config"]["SubnetIds"] == ["subnet-a", "subnet-b", "subnet-c"]
        assert node_type["node_config"]["SecurityGroupIds"] == ["sg-00000000000000000"]
    key = Path(config["auth"]["ssh_private_key"])
    assert key.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("instance_type", ["p4d.24xlarge", "p4de.24xlarge"])
def test_ec2_is_asked_for_the_nodes_that_the_file_names(
    cluster: dict[str, Any], ec2: Ec2, instance_type: str
):
    for name in ("a100_1_spot", "a100_2_on_demand"):
        cluster["available_node_types"][name]["node_config"]["InstanceType"] = instance_type
    config = bootstrap_aws(prepare_config(cluster))
    start(config, "a100_1_spot", 3)
    start(config, "a100_2_on_demand")
    spot, on_demand = (asked for name, asked in ec2.calls if name == "RunInstances")
    assert spot["InstanceMarketOptions.MarketType"] == "spot"
    assert (spot["MinCount"], spot["MaxCount"]) == (1, 3)
    assert not [key for key in on_demand if key.startswith("InstanceMarketOptions")]
    for asked in (spot, on_demand):
        assert asked["InstanceType"] == instance_type
        assert asked["IamInstanceProfile.Name"] == "dtr-ray-worker"
        assert asked["MetadataOptions.HttpTokens"] == "required"


def test_spot_is_looked_for_in_every_zone_and_then_given_up_for_this_time(cluster: dict[str, Any], ec2: Ec2):
    config = bootstrap_aws(prepare_config(cluster))
    ec2.spot_zones = {"us-west-2c"}
    start(config, "a100_1_spot")
    assert [asked["SubnetId"] for name, asked in ec2.calls if name == "RunInstances"] == [
        "subnet-a",
        "subnet-b",
        "subnet-c",
    ]
    ec2.spot_zones = set()
    with pytest.raises(NodeLaunchException) as error:
        start(config, "a100_1_spot")
    assert error.value.category == "InsufficientInstanceCapacity"
    start(config, "a100_2_on_demand")


def test_ec2s_model_has_every_parameter_and_instance_type(cluster: dict[str, Any]):
    model = botocore.session.Session().get_service_model("ec2").operation_model("RunInstances")
    known = set(model.input_shape.members["InstanceType"].enum)
    assert "p4de.24xlarge" in known
    for node_type in cluster["available_node_types"].values():
        parameters = {**node_type["node_config"], "MinCount": 1, "MaxCount": 1}
        report = botocore.validate.ParamValidator().validate(parameters, model.input_shape)
        assert not report.has_errors(), report.generate_report()
        assert parameters["InstanceType"] in known


def test_every_node_type_names_image_group_and_role_and_none_is_rays_old_default(cluster: dict[str, Any]):
    nodes = [node["node_config"] for node in cluster["available_node_types"].values()]
    assert all(node["ImageId"].startswith("ami-") for node in nodes)
    assert not {node["ImageId"] for node in nodes} & set(DEFAULT_AMI.values())
    assert all("SecurityGroupIds" in node for node in nodes)
    assert [node["IamInstanceProfile"]["Name"] for node in nodes] == ["dtr-ray-head", *["dtr-ray-worker"] * 2]
    assert "security_group" not in cluster["provider"]
    assert "import boto3" in cluster["head_setup_commands"][0]
