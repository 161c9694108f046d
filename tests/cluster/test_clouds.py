"""cluster/a100.yaml, gcp-a100.yaml and local.yaml: Ray's own checks, the launcher's traps avoided."""

import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster.scheduling import nodes_by_version_1, nodes_by_version_2
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[2]
CLOUDS = ("a100.yaml", "gcp-a100.yaml")
TRIAL = {"CPU": 32.0, "GPU": 4.0}


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / "cluster" / name).read_text(encoding="utf-8"))


def prepared(config: dict[str, Any]) -> dict[str, Any]:
    """What Ray makes of the file: its own defaults filled in, validated before and after."""
    # The local provider has no node types before Ray has filled them in.
    if "available_node_types" in config:
        validate_config(config)
    config = prepare_config(deepcopy(config))
    validate_config(config)
    return config


@pytest.mark.parametrize("name", [*CLOUDS, "local.yaml"])
def test_ray_accepts_it_offline_and_fills_nothing_in(name: str):
    config = read(name)
    full = prepared(config)
    filled = {"head_node", "worker_nodes", "docker", "available_node_types", "head_node_type"}
    assert config.keys() >= full.keys() - filled
    assert full["head_setup_commands"] == config["setup_commands"] + config["head_setup_commands"]
    if "available_node_types" in config:
        assert full["available_node_types"] == config["available_node_types"]


@pytest.mark.parametrize("name", [*CLOUDS, "local.yaml"])
def test_a_misspelled_key_is_refused(name: str):
    config = read(name) | {"idle_timeout_minute": 10}
    with pytest.raises(Exception, match="idle_timeout_minute"):
        validate_config(config)


@pytest.mark.parametrize("name", [*CLOUDS, "local.yaml"])
def test_no_command_is_left_to_rays_defaults_which_install_a_nightly(name: str):
    full = prepared(read(name))
    commands = [c for key, value in full.items() if key.endswith("_commands") for c in value]
    assert not [c for c in commands if "nightly" in c or "ray-wheels" in c]
    for command in commands:
        if "pip install" in command:
            assert "-c project/constraints.txt" in command or re.search(r"\S+==\d+\.\d+\.\d+$", command), (
                command
            )


@pytest.mark.parametrize("name", CLOUDS)
def test_the_head_runs_no_trial(name: str):
    config = read(name)
    head = config["available_node_types"][config["head_node_type"]]
    assert head["resources"] == {"CPU": 0, "GPU": 0}
    assert head["max_workers"] == 0
    assert "--num-cpus=0 --num-gpus=0" in config["head_start_ray_commands"][-1]


@pytest.mark.parametrize("name", CLOUDS)
def test_workers_scale_from_zero_with_written_resources_and_leave_nothing_behind(name: str):
    config = read(name)
    workers = {k: v for k, v in config["available_node_types"].items() if k != config["head_node_type"]}
    assert [w["min_workers"] for w in workers.values()] == [0, 0]
    assert all(w["resources"] == {"CPU": 96, "GPU": 8} for w in workers.values())
    assert sum(w["max_workers"] for w in workers.values()) == config["max_workers"]
    assert config["provider"]["cache_stopped_nodes"] is False
    assert 0 < config["idle_timeout_minutes"] <= 15


@pytest.mark.parametrize("nodes_for", [nodes_by_version_1, nodes_by_version_2])
@pytest.mark.parametrize("name", CLOUDS)
def test_nothing_is_started_without_trials_then_on_demand_first_and_spot_on_top(name: str, nodes_for: Any):
    full = prepared(read(name))
    assert nodes_for(full, []) == {}
    assert nodes_for(full, [TRIAL]) == {"a100_2_on_demand": 1}
    assert nodes_for(full, [TRIAL] * 3) == {"a100_2_on_demand": 1, "a100_1_spot": 1}
    assert nodes_for(full, [TRIAL] * 100) == {"a100_2_on_demand": 1, "a100_1_spot": 3}


def test_on_kubernetes_spot_comes_first_and_on_demand_where_spot_pods_stay_pending():
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    documents = yaml.safe_load_all((ROOT / "cluster/kuberay.yaml").read_text(encoding="utf-8"))
    (cluster,) = [d for d in documents if d and d["kind"] == "RayCluster"]
    cluster["metadata"]["namespace"] = "default"
    config = _derive_autoscaling_config_from_ray_cr(cluster)
    assert nodes_by_version_2(config, []) == {}
    assert nodes_by_version_2(config, [TRIAL] * 3) == {"a100-spot": 2}
    assert nodes_by_version_2(config, [TRIAL] * 3, {"a100-spot": 0.0}) == {"a100-on-demand": 2}


@pytest.mark.parametrize("name", CLOUDS)
def test_the_container_gets_the_token_and_the_shared_folder_from_every_host(name: str):
    config = read(name)
    options = " ".join(config["docker"]["run_options"])
    path = re.search(r"RAY_AUTH_TOKEN_PATH=(\S+)", options)
    assert path is not None
    # File mounts go to the head and from there to every worker.
    assert str(Path(path[1]).parent) in config["file_mounts"]
    assert any("mount -t nfs" in command for command in config["initialization_commands"])
    assert "--volume /mnt/shared:/mnt/shared" in config["docker"]["run_options"]


@pytest.mark.parametrize(("name", "store"), [("a100.yaml", "s3://"), ("gcp-a100.yaml", "gs://")])
def test_results_go_to_a_bucket_and_scratch_to_the_nodes_own_disk(name: str, store: str):
    text = (ROOT / "cluster" / name).read_text(encoding="utf-8")
    assert f"--output {store}BUCKET/runs'" in text
    scratch = next(o for o in read(name)["docker"]["run_options"] if "DTR_RAY_SCRATCH=" in o)
    assert "/mnt/shared" not in scratch


@pytest.mark.parametrize("name", CLOUDS)
def test_only_folders_of_code_are_mounted(name: str):
    inside = [local for local in read(name)["file_mounts"].values() if local.startswith(".")]
    assert inside == ["./dtr_ray", "./search_spaces"]
    assert all((ROOT / local).is_dir() for local in inside)


def test_own_machines_get_what_an_installation_needs():
    config = read("local.yaml")
    inside = [local for local in config["file_mounts"].values() if local.startswith(".")]
    assert all((ROOT / local).exists() for local in inside)
    assert {"./dtr_ray", "./pyproject.toml", "./constraints.txt", "./README.md", "./LICENSE"} <= set(inside)
    full = prepared(config)
    (node,) = full["available_node_types"].values()
    assert node["min_workers"] == node["max_workers"] == len(config["provider"]["worker_ips"])
    # Version 2 never starts a local worker: test_launching.py shows that version 1 does.
    assert "RAY_enable_autoscaler_v2=0 ray start --head" in config["head_start_ray_commands"][-1]


def test_on_google_cloud_only_the_head_is_on_the_internet():
    types = read("gcp-a100.yaml")["available_node_types"]
    public = {
        n for n, t in types.items() for i in t["node_config"]["networkInterfaces"] if "accessConfigs" in i
    }
    assert public == {"head"}
    spot = {
        n
        for n, t in types.items()
        if t["node_config"].get("scheduling", {}).get("provisioningModel") == "SPOT"
    }
    assert spot == {"a100_1_spot"}
    assert all(t["node_config"]["tags"] == {"items": ["dtr-ray"]} for t in types.values())
