"""What Ray's autoscalers would start for a cluster file."""

from functools import partial
from typing import Any

from ray.autoscaler._private.node_provider_availability_tracker import NodeAvailabilitySummary
from ray.autoscaler._private.resource_demand_scheduler import _default_utilization_scorer, get_nodes_for
from ray.autoscaler.v2.instance_manager.config import NodeTypeConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil

Demands = list[dict[str, float]]


def nodes_by_version_1(config: dict[str, Any], demands: Demands) -> dict[str, int]:
    """The nodes for demands, from none, by the autoscaler of before Ray 2.50."""
    scorer = partial(
        _default_utilization_scorer, node_availability_summary=NodeAvailabilitySummary(node_availabilities={})
    )
    head = config["head_node_type"]
    types, limit = config["available_node_types"], config["max_workers"]
    added, _ = get_nodes_for(types, {head: 1}, head, limit, demands, scorer)
    return dict(added)


def nodes_by_version_2(
    config: dict[str, Any], demands: Demands, availabilities: dict[str, float] | None = None
) -> dict[str, int]:
    """The same by the present one; `availabilities`: 0 for a type whose nodes have just stayed pending."""
    head = config["head_node_type"]
    types = {
        name: NodeTypeConfig(
            name=name,
            min_worker_nodes=node["min_workers"],
            max_worker_nodes=node["max_workers"],
            priority=node.get("priority", 0),
            resources=node["resources"],
        )
        for name, node in config["available_node_types"].items()
        if name != head
    }
    request = SchedulingRequest(
        disable_launch_config_check=True,
        node_type_configs=types,
        max_num_nodes=config["max_workers"],
        resource_requests=ResourceRequestUtil.group_by_count([ResourceRequestUtil.make(d) for d in demands]),
        recoverable_resource_availabilities=availabilities or {},
    )
    launches = ResourceDemandScheduler().schedule(request).to_launch
    return {launch.instance_type: launch.count for launch in launches}
