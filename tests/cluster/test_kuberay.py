"""cluster/kuberay.yaml: KubeRay's types, and the code by which Ray's autoscaler reads a RayCluster."""

import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import prepare_config, validate_config

from dtr_ray.config.read import read_sweep

ROOT = Path(__file__).parents[2]
FILE = ROOT / "cluster/kuberay.yaml"
SCHEMA = yaml.safe_load((Path(__file__).parent / "kuberay.schema.yaml").read_text(encoding="utf-8"))


def schema_of(kind: str) -> dict[str, Any]:
    entry = SCHEMA["kinds"][kind]
    properties = {
        "apiVersion": {"const": entry["apiVersion"]},
        "kind": {"const": kind},
        "metadata": {"$ref": "#/definitions/metadata"},
        "spec": entry["spec"],
    }
    return {
        "definitions": SCHEMA["definitions"],
        "type": "object",
        "additionalProperties": False,
        "required": list(properties),
        "properties": properties,
    }


@pytest.fixture
def resources() -> dict[str, dict[str, Any]]:
    """By kind; each kind is there once."""
    found = [document for document in yaml.safe_load_all(FILE.read_text(encoding="utf-8")) if document]
    assert len({resource["kind"] for resource in found}) == len(found)
    return {resource["kind"]: resource for resource in found}


@pytest.fixture
def cluster(resources: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return resources["RayCluster"]


@pytest.mark.parametrize("kind", sorted(SCHEMA["kinds"]))
def test_every_resource_is_one_that_kubernetes_accepts(resources: dict[str, dict[str, Any]], kind: str):
    jsonschema.validate(resources[kind], schema_of(kind))
    assert resources.keys() == SCHEMA["kinds"].keys()


def test_the_schema_refuses_a_misspelled_and_a_mistyped_field(cluster: dict[str, Any]):
    misspelled, mistyped = deepcopy(cluster), deepcopy(cluster)
    misspelled["spec"]["enableInTreeAutoscaler"] = True
    mistyped["spec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] = 0
    for wrong in (misspelled, mistyped):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, schema_of("RayCluster"))


def test_rays_autoscaler_reads_it_and_knows_what_each_group_offers(cluster: dict[str, Any]):
    cluster["metadata"]["namespace"] = "default"
    config = _derive_autoscaling_config_from_ray_cr(cluster)
    validate_config(config)
    assert prepare_config(config) == config
    types = config["available_node_types"]
    head = types.pop(config["head_node_type"])
    assert head["resources"]["CPU"] == 0
    assert "GPU" not in head["resources"] or head["resources"]["GPU"] == 0
    for group in types.values():
        assert group["resources"]["CPU"] == 90
        assert group["resources"]["GPU"] == 8
        assert group["min_workers"] == 0
    assert types["a100-spot"]["priority"] > types["a100-on-demand"]["priority"]
    assert config["idle_timeout_minutes"] == 10


def test_pods_agree_with_what_ray_is_told(cluster: dict[str, Any]):
    for group in cluster["spec"]["workerGroupSpecs"]:
        (container,) = group["template"]["spec"]["containers"]
        limits = container["resources"]["limits"]
        assert group["rayStartParams"] == {"num-cpus": limits["cpu"], "num-gpus": limits["nvidia.com/gpu"]}
        assert container["resources"]["requests"] == limits
        assert group["template"]["spec"]["restartPolicy"] == "Never", (
            "autoscaler v2 must not meet a pod twice"
        )


def test_volumes_claims_and_labels_meet(resources: dict[str, dict[str, Any]], cluster: dict[str, Any]):
    spec = cluster["spec"]
    claim = resources["PersistentVolumeClaim"]["metadata"]["name"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        assert {mount["name"] for c in pod["containers"] for mount in c["volumeMounts"]} <= volumes
        assert {"name": "shared", "persistentVolumeClaim": {"claimName": claim}} in pod["volumes"]
    label = {"ray.io/cluster": cluster["metadata"]["name"]}
    assert resources["RayJob"]["spec"]["clusterSelector"] == label
    policy = resources["NetworkPolicy"]["spec"]
    assert policy["podSelector"]["matchLabels"] == label
    allowed = [source["podSelector"]["matchLabels"] for rule in policy["ingress"] for source in rule["from"]]
    assert resources["RayJob"]["spec"]["submitterPodTemplate"]["metadata"]["labels"] in allowed
    assert label in allowed


def test_the_token_is_the_operators_and_none_is_in_the_file(cluster: dict[str, Any]):
    assert cluster["spec"]["authOptions"] == {"mode": "token"}
    assert "RAY_AUTH" not in FILE.read_text(encoding="utf-8")


def test_the_job_is_a_sweep_that_can_be_planned(resources: dict[str, dict[str, Any]]):
    words = resources["RayJob"]["spec"]["entrypoint"].split()
    assert words[:3] == ["python", "-m", "dtr_ray.sweep"]
    space = ROOT / words[3].removeprefix("/home/ray/project/")
    read_sweep(space, ["trial.data.path=."])
    # Right but for the folder, which is the cluster's.
    with pytest.raises(
        ValueError, match=r"^--set trial.data.path=/mnt/shared/data/ffhq256: .* does not exist$"
    ):
        read_sweep(space, [words[words.index("--set") + 1]])
    said = subprocess.run(
        [sys.executable, "-m", *words[2:3], "--help"], capture_output=True, text=True, check=True
    )
    assert {word for word in words if word.startswith("--")} <= set(said.stdout.replace(",", " ").split())
