"""Whether a sweep can go on: with the search that was started, and figures that compare with those so far."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dtr_ray.config import SweepConfig, flatten
from dtr_ray.config.errors import ConfigError, shown
from dtr_ray.config.files import checked_config, needed, read_json
from dtr_ray.config.protocol import UNKNOWN, differences, protocol_of
from dtr_ray.search.journal import TrialRecord, read_events
from dtr_ray.training.reports import Report

log = logging.getLogger(__name__)

_FIXED = ("name", "trial", "space", "search", "early_stopping")
_MAX_SHOWN = 3


def check_resumable(config: SweepConfig, folder: Path) -> None:
    """Refuses to go on with another search than the one that was started.

    Raises ValueError naming what differs; limits, resources and tracking may change.
    """
    file = folder / "sweep.json"
    before = read_json(file)
    needed(before, {"trial": dict, "search": dict, "space": dict}, str(file))
    try:
        # Keys that a sweep from an older version did not have yet get their defaults.
        known = checked_config(before, SweepConfig, str(file))
        before, changed = known.to_dict(), differences(protocol_of(config.trial), protocol_of(known.trial))
    except ConfigError:
        # Written by another version: compared as it stands.
        changed = []
    if changed:
        raise ValueError(
            f"the protocol differs from that of the sweep in {folder} ({'; '.join(changed)}): its figures "
            "would not compare with new ones; resume it with the file it was started with, or give the new "
            "one another name"
        )
    now = config.to_dict()
    for dictionary in (before, now):
        dictionary["search"].pop("num_trials", None)
    for key in _FIXED:
        if before.get(key) != now[key]:
            changes = _changes(key, now[key], before.get(key))
            raise ValueError(
                f"{key} differs from that of the sweep in {folder} ({changes}): "
                "its trials could not be compared; resume it with the file it was started with, or give the "
                "new one another name"
            )


def check_same_data(folder: Path, data_identity: str) -> None:
    """Refuses to go on with other images than those that the sweep was started with.

    Args:
        folder: the sweep's.
        data_identity: of the images that are there now.

    Raises ValueError where they have changed; warns where the journal does not say what they were.
    """
    events = read_events(folder / "journal.jsonl")
    noted = [event["protocol"] for event in events if event["event"] == "protocol"]
    before = noted[-1]["data.identity"] if noted else None
    if not noted and any(event["event"] == "report" for event in events):
        log.warning("%s: its figures so far are of an %s: whether the images are the same is not known",
                    folder, UNKNOWN)  # fmt: skip
    if before not in (None, data_identity):
        raise ValueError(
            f"the images have changed since the sweep in {folder} was started (they are {data_identity}, not "
            f"{before}): its figures would not compare with new ones; put back the files (with their times: "
            "cp -a, rsync -a), or give the new sweep another name"
        )


def _changes(key: str, now: Any, before: Any) -> str:
    """The first values that differ, by their dotted names."""
    if not isinstance(now, dict) or not isinstance(before, dict):
        return f"{shown(now)}, not {shown(before)}"
    new, old = flatten(now, f"{key}."), flatten(before, f"{key}.")
    found = [name for name in dict.fromkeys([*new, *old]) if new.get(name) != old.get(name)]
    texts = [f"{name} is {shown(new.get(name))}, not {shown(old.get(name))}" for name in found[:_MAX_SHOWN]]
    more = f"; and {len(found) - _MAX_SHOWN} more" if len(found) > _MAX_SHOWN else ""
    return "; ".join(texts) + more


def data_changed(trials: Mapping[str, TrialRecord], trial_id: str, report: Report) -> str | None:
    """In words how the images of a trial's new report differ from those of the reports before, or None."""
    now = report.protocol.get("data.identity")
    if now is None:
        return None
    known = (p.get("data.identity") for t in trials.values() for p in t.protocols.values())
    before = next(filter(None, known), None)
    if before in (None, now):
        return None
    return (
        f"the images have changed: {trial_id} was evaluated at step {report.step} on {now}, those before "
        f"on {before}; put the same files (names, sizes, times) on all machines, and --resume"
    )
