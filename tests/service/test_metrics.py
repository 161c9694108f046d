"""What a sweep exports, as Prometheus scrapes it from the machine's exporter; and the dashboard's queries."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from scraping import Scraper, scrape
from tiny_sweeps import METRIC, Finished, folder_of, tiny_sweep, wait_until

from dtr_ray.search.state import SweepState
from dtr_ray.service import metrics
from dtr_ray.service.metrics import METRICS, TrialMetrics, exported, sweep_of
from dtr_ray.service.worker import run_worker
from dtr_ray.training import Report

DASHBOARD = Path(__file__).parents[2] / "cluster" / "grafana-dashboard.json"
EXPORTED = {
    f"ray_{name}{'_total' * (kind.kind == 'counter')}": set(kind.tags) for name, kind in METRICS.items()
}


def now(name: str, **labels: str) -> dict[str, float]:
    """Values of a metric at this moment by trial, or status, of the series with these labels."""
    found = {}
    for (full, own), value in scrape().items():
        pairs = dict(own)
        if full == f"ray_{name}" and labels.items() <= pairs.items():
            found[pairs.get("trial") or pairs.get("status", "")] = value
    return found


def test_a_real_sweep_is_seen_by_prometheus(finished_sweep: Finished, scraper: Scraper):
    trials = finished_sweep.outcome.state.trials
    done = [len([t for t in trials.values() if t.status == status]) for status in ("completed", "pruned")]
    assert max(scraper.values("dtr_ray_trials", sweep="tiny", status="running")) >= 1
    assert max(scraper.values("dtr_ray_trials", sweep="tiny", status="to come")) >= 1
    assert max(scraper.values("dtr_ray_trials", sweep="tiny", status="completed")) <= done[0]
    # A trial of a second may end before Ray's exporter hears of it.
    known = {v[METRIC] for t in trials.values() for v in t.reports.values()}
    assert set(scraper.values("dtr_ray_trial_distance", sweep="tiny", metric=METRIC)) <= known
    assert set(scraper.values("dtr_ray_trial_attempt", sweep="tiny")) <= {1.0}
    assert min(scraper.values("dtr_ray_records_waiting", sweep="tiny")) >= 0
    for name, labels in scraper.seen:
        assert {key for key, _ in labels} == EXPORTED[name]


def test_a_sweeps_trials_failures_and_records_are_told_while_it_runs(
    ray_cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(metrics, "_TELL_EVERY_S", 0.2)
    config = tiny_sweep(tmp_path, name="told", search__num_trials=5)
    folder_of(config).mkdir()
    state = SweepState(config, folder_of(config))
    with exported(state, lambda: 7):
        first, second, third = (state.next_trial() for _ in range(3))
        assert not isinstance(first, str)
        assert not isinstance(second, str)
        assert not isinstance(third, str)
        state.report(first.trial_id, Report(10, {METRIC: 300.0}, "c", "g"), seconds=1800.0)
        state.finish(first.trial_id, "completed")
        state.report(second.trial_id, Report(10, {METRIC: 200.0}, "c", "g"))
        state.finish(second.trial_id, "failed", "out of memory")
        expected = {"running": 1.0, "completed": 1.0, "failed": 1.0, "pruned": 0.0, "to come": 2.0}
        wait_until(lambda: now("dtr_ray_trials", sweep="told") == expected, 15.0)
        assert now("dtr_ray_failures_total", sweep="told") == {"": 1.0}
        # What a failed trial has reported is not the best.
        assert now("dtr_ray_best_distance", sweep="told", metric=METRIC) == {"": 300.0}
        assert now("dtr_ray_records_waiting", sweep="told") == {"": 7.0}
        assert now("dtr_ray_device_hours", sweep="told") == {"": 0.5}
    assert [type(listener) for listener in state.listeners] == []


def test_a_trial_is_seen_from_its_first_report_to_its_end(
    ray_cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(metrics, "_FIRST_S", 0.0)
    config = tiny_sweep(tmp_path, name="alone")
    folder = folder_of(config)
    folder.mkdir()
    (folder / "sweep.json").write_text("{}")
    reports = run_worker(config.trial, folder, "t0007")
    report = next(reports)
    distance = report.metrics[METRIC]
    wait_until(lambda: now("dtr_ray_trial_distance", sweep="alone") == {"t0007": distance}, 15.0)
    assert now("dtr_ray_trial_attempt", sweep="alone") == {"t0007": 1.0}
    assert 0 < now("dtr_ray_trial_step", sweep="alone")["t0007"] <= report.step
    assert now("dtr_ray_trial_images_per_s", sweep="alone")["t0007"] > 0
    reports.close()
    wait_until(lambda: now("dtr_ray_trial_step", sweep="alone") == {}, 15.0)


def test_there_are_series_of_running_trials_alone(ray_cluster: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(metrics, "_FIRST_S", 0.0)
    trials = [TrialMetrics("many", f"t{number}", 16, attempt=2) for number in range(2)]
    for trial in trials:
        trial.progress(0)
        trial.progress(3)
        trial.evaluated("proxy_fd", 5.0)
        trial.evaluated("fd", 6.0)
    wait_until(lambda: now("dtr_ray_trial_step", sweep="many") == {"t0": 3.0, "t1": 3.0}, 15.0)
    assert now("dtr_ray_trial_attempt", sweep="many") == {"t0": 2.0, "t1": 2.0}
    assert min(now("dtr_ray_trial_images_per_s", sweep="many").values()) > 0
    assert now("dtr_ray_trial_distance", sweep="many", metric="fd") == {"t0": 6.0, "t1": 6.0}
    assert now("dtr_ray_trial_distance", sweep="many", metric="proxy_fd") == {}
    trials[0].close()
    trials[1].progress(4)
    wait_until(lambda: "t0" not in now("dtr_ray_trial_step", sweep="many"), 15.0)
    for name in ("step", "images_per_s", "attempt", "distance"):
        assert list(now(f"dtr_ray_trial_{name}", sweep="many")) == ["t1"], name


def test_the_final_training_goes_by_its_sweeps_name(tmp_path: Path):
    folder = tmp_path / "flowers"
    (folder / "best").mkdir(parents=True)
    assert sweep_of(folder) == "flowers"
    (folder / "sweep.json").write_text("{}")
    assert sweep_of(folder) == "flowers"
    assert sweep_of(folder / "best") == "flowers/best"


def queries(node: Any) -> list[str]:
    """All PromQL in a dashboard."""
    if isinstance(node, dict):
        own = [v for k, v in node.items() if k in ("expr", "definition", "query") and isinstance(v, str)]
        return own + [text for value in node.values() for text in queries(value)]
    return [text for value in node for text in queries(value)] if isinstance(node, list) else []


def test_every_query_of_the_dashboard_names_what_is_exported_with_its_tags():
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    texts = [text for text in queries(dashboard) if text != "prometheus"]
    assert len(texts) >= 14
    named = set()
    for text in texts:
        names = re.findall(r"\bray_\w+", text)
        assert names, text
        named |= set(names)
        tags = set.intersection(*(EXPORTED[name] for name in names))
        used = re.findall(r"(\w+)=~", text) + [
            tag.strip() for group in re.findall(r"by \(([^)]*)\)", text) for tag in group.split(",")
        ]
        assert set(used) <= tags, text
    assert named == set(EXPORTED)
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24, panel["title"]
