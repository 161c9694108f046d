"""Has every machine of the cluster hold the pretrained weights before its first trial.

The driver fetches them first, settles which commit of the hub is meant, and has the others fetch the same. A
machine that joins later does so when its first worker starts.
"""

import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dtr_ray.config import TrialConfig
from dtr_ray.config.prepare import PrepareConfig
from dtr_ray.service.worker import enter
from dtr_ray.weights.finding import Weights, find, required_weights
from dtr_ray.weights.narrator import size

_TELL_EVERY_S = 30.0


class _Answer(NamedTuple):
    """What a machine has to say."""

    fault: str | None
    fetched_bytes: int
    seconds: float


def trial_weights(config: TrialConfig) -> list[Weights]:
    """The weights of a trial; of a sweep's, too, since what a figure measures is not searched."""
    return required_weights(config.data, config.evaluation)


def preparation_weights(config: PrepareConfig) -> list[Weights]:
    """The weights that a data set's preparation needs."""
    found = required_weights(config.data(config.output, 1))
    if "inception" in config.features:
        found.append(Weights("inception", config.feature_weights))
    return found


def fetch_here(weights: Iterable[Weights]) -> list[Weights]:
    """Has them on this machine, telling of what is fetched; returns them with the commits that they are of.

    Raises:
        ValueError: as `find`.
    """
    return [find(one).weights for one in weights]


def settled(config: TrialConfig) -> list[dict[str, Any]]:
    """A trial's weights as plain values, of the commits that this machine has."""
    return [asdict(one) for one in fetch_here(trial_weights(config))]


def fetch_on_nodes(weights: Sequence[Weights], nodes: dict[str, str] | None = None) -> None:
    """Has other machines of the cluster hold the same; returns when all do.

    Args:
        weights: as `fetch_here` returns them.
        nodes: names of machines by Ray's ids; default: all that can run something, but this one.

    Raises:
        ValueError: a machine cannot have them; the message names it.
    """
    nodes = _other_nodes() if nodes is None else nodes
    if not weights or not nodes:
        return
    print(f"weights: {len(nodes)} more machine{'s' * (len(nodes) > 1)} to have them", file=sys.stderr)
    task: Any = ray.remote(num_cpus=0, max_retries=0)(_fetch)
    given, place = [asdict(one) for one in weights], str(Path.cwd())
    pending = {}
    for node_id, name in nodes.items():
        there = NodeAffinitySchedulingStrategy(node_id, soft=False)
        pending[task.options(scheduling_strategy=there).remote(given, place)] = name
    while pending:
        done, _ = ray.wait(list(pending), timeout=_TELL_EVERY_S)
        if not done:
            print(f"weights: still fetching on {', '.join(pending.values())}", file=sys.stderr)
        for reference in done:
            _take(reference, pending.pop(reference))


def _take(reference: Any, name: str) -> None:
    """What came of it on one machine."""
    try:
        answer: _Answer = ray.get(reference)
    except RayError as error:
        # Gone again, or short of something: should a trial start there, its worker fetches them.
        text = str(error).strip().splitlines()[0]
        print(f"weights: not on {name}, which was lost meanwhile ({text})", file=sys.stderr)
        return
    if answer.fault is not None:
        raise ValueError(f"on {name}: {answer.fault}")
    had = f"fetched {size(answer.fetched_bytes)} in {answer.seconds:.1f} s"
    print(f"weights: {name} {had if answer.fetched_bytes else 'had them'}", file=sys.stderr)


def _other_nodes() -> dict[str, str]:
    own = ray.get_runtime_context().get_node_id()
    return {
        node["NodeID"]: node.get("NodeManagerHostname") or node["NodeID"]
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] != own and node["Resources"].get("CPU", 0)
    }


def _fetch(weights: list[dict[str, Any]], folder: str) -> _Answer:
    """Runs on the machine in question."""
    started, fetched = time.monotonic(), 0
    enter(folder)
    try:
        for one in weights:
            fetched += find(Weights(**one)).fetched_bytes
    except ValueError as error:
        return _Answer(str(error), fetched, time.monotonic() - started)
    return _Answer(None, fetched, time.monotonic() - started)
