"""cluster/a100.yaml: accepted by Ray's own validation offline, with the launcher's known traps avoided."""

import re
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import botocore.session
import botocore.validate
import pytest
import ray
import yaml
from ray.autoscaler._private.aws.config import DEFAULT_AMI
from ray.autoscaler._private.node_provider_availability_tracker import NodeAvailabilitySummary
from ray.autoscaler._private.resource_demand_scheduler import _default_utilization_scorer, get_nodes_for
from ray.autoscaler._private.util import prepare_config, validate_config

import dtr_ray

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "cluster/a100.yaml").read_text(encoding="utf-8")
PINS = dict(
    line.split("==")
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if "==" in line
)


@pytest.fixture
def cluster() -> dict[str, Any]:
    return yaml.safe_load(TEXT)


@pytest.fixture
def prepared(cluster: dict[str, Any]) -> dict[str, Any]:
    """What Ray makes of the file: its own defaults filled in, validated."""
    validate_config(cluster)
    config = prepare_config(deepcopy(cluster))
    validate_config(config)
    return config


def nodes_for(config: dict[str, Any], demands: list[dict[str, float]]) -> dict[str, int]:
    """The nodes that Ray's autoscaler would start for demands, from none."""
    scorer = partial(
        _default_utilization_scorer, node_availability_summary=NodeAvailabilitySummary(node_availabilities={})
    )
    added, _ = get_nodes_for(
        config["available_node_types"], {"head": 1}, "head", config["max_workers"], demands, scorer
    )
    return dict(added)


def test_ray_accepts_it_offline_and_fills_nothing_in(cluster: dict[str, Any], prepared: dict[str, Any]):
    assert cluster.keys() >= prepared.keys() - {"head_node", "worker_nodes"}
    assert prepared["available_node_types"] == cluster["available_node_types"]
    assert prepared["head_setup_commands"] == cluster["setup_commands"] + cluster["head_setup_commands"]


def test_ec2_accepts_the_parameters_of_every_node_type(cluster: dict[str, Any]):
    model = botocore.session.Session().get_service_model("ec2").operation_model("RunInstances")
    for node_type in cluster["available_node_types"].values():
        parameters = {**node_type["node_config"], "MinCount": 1, "MaxCount": 1}
        report = botocore.validate.ParamValidator().validate(parameters, model.input_shape)
        assert not report.has_errors(), report.generate_report()


def test_one_ray_version_in_cluster_image_and_constraints(cluster: dict[str, Any]):
    version = PINS["ray"]
    assert set(re.findall(r"\b2\.\d+\.\d+\b", TEXT)) == {version}
    assert cluster["docker"]["image"].endswith(f":{dtr_ray.__version__}-ray{version}")
    assert f"ray.__version__ == '{version}'" in cluster["setup_commands"][0]
    assert ray.__version__ == version


def test_every_node_type_names_its_image_and_none_is_rays_old_default(cluster: dict[str, Any]):
    images = {node["node_config"]["ImageId"] for node in cluster["available_node_types"].values()}
    assert all(image.startswith("ami-") for image in images)
    assert not images & set(DEFAULT_AMI.values())


def test_commands_are_explicit_so_that_no_nightly_ray_is_installed(prepared: dict[str, Any]):
    commands = [c for key, value in prepared.items() if key.endswith("_commands") for c in value]
    assert not [c for c in commands if "nightly" in c or "ray-wheels" in c or "pip install" in c]
    assert "import boto3" in " ".join(prepared["head_setup_commands"])


def test_the_head_runs_no_trial(cluster: dict[str, Any]):
    head = cluster["available_node_types"][cluster["head_node_type"]]
    assert head["resources"] == {"CPU": 0, "GPU": 0}
    assert head["max_workers"] == 0
    assert "--num-cpus=0 --num-gpus=0" in cluster["head_start_ray_commands"][-1]


def test_workers_scale_from_zero_with_written_resources_and_leave_nothing_behind(cluster: dict[str, Any]):
    types = cluster["available_node_types"]
    workers = [types[name] for name in types if name != cluster["head_node_type"]]
    assert [w["min_workers"] for w in workers] == [0, 0]
    assert all(w["resources"] == {"CPU": 96, "GPU": 8} for w in workers)
    assert sum(w["max_workers"] for w in workers) == cluster["max_workers"]
    assert cluster["provider"]["cache_stopped_nodes"] is False
    assert 0 < cluster["idle_timeout_minutes"] <= 15


def test_the_first_node_is_on_demand_and_spot_comes_on_top(prepared: dict[str, Any]):
    types = prepared["available_node_types"]
    spot = {name for name, node in types.items() if "InstanceMarketOptions" in node["node_config"]}
    assert spot == {"a100_1_spot"}
    assert types["a100_2_on_demand"]["priority"] > types["a100_1_spot"]["priority"]
    assert nodes_for(prepared, [{"CPU": 1, "GPU": 1}] * 8) == {"a100_2_on_demand": 1}
    assert nodes_for(prepared, [{"CPU": 1, "GPU": 1}] * 100) == {"a100_2_on_demand": 1, "a100_1_spot": 3}


def test_token_authentication_is_on_and_every_node_gets_the_token(cluster: dict[str, Any]):
    options = " ".join(cluster["docker"]["run_options"])
    assert "RAY_AUTH_MODE=token" in options
    path = re.search(r"RAY_AUTH_TOKEN_PATH=(\S+)", options)
    assert path is not None
    # File mounts go to the head and from there to every worker.
    assert str(Path(path[1]).parent) in cluster["file_mounts"]


def test_only_folders_of_code_are_mounted(cluster: dict[str, Any]):
    inside = [local for local in cluster["file_mounts"].values() if local.startswith(".")]
    assert inside == ["./dtr_ray", "./search_spaces"]
    assert all((ROOT / local).is_dir() for local in inside)


def test_the_shared_folder_is_mounted_on_the_host_before_the_container_sees_it(cluster: dict[str, Any]):
    assert any("mount -t nfs4" in command for command in cluster["initialization_commands"])
    assert "--volume /mnt/shared:/mnt/shared" in cluster["docker"]["run_options"]


def test_no_security_group_is_left_to_ray_to_open(cluster: dict[str, Any]):
    assert all("SecurityGroupIds" in n["node_config"] for n in cluster["available_node_types"].values())
    assert "security_group" not in cluster["provider"]


def test_a_misspelled_key_is_refused(cluster: dict[str, Any]):
    cluster["idle_timeout_minute"] = 10
    with pytest.raises(Exception, match="idle_timeout_minute"):
        validate_config(cluster)
