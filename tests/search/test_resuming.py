"""A sweep goes on with the search, the protocol and the images that it was started with, or not at all."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_sweeps import METRIC, folder_of, tiny_sweep

from dtr_ray.config.protocol import protocol_of
from dtr_ray.search.journal import Journal
from dtr_ray.search.resuming import check_resumable, check_same_data
from dtr_ray.search.state import SweepState, save_config
from dtr_ray.training import Report


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = tiny_sweep(tmp_path)
    folder_of(config).mkdir()
    save_config(config, folder_of(config))
    return folder_of(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trial__sampling__num_steps": 3}, r"protocol differs .*sampling\.num_steps is 3, not 2"),
        ({"trial__evaluation__num_samples": 33}, r"protocol differs .*evaluation\.num_samples is 33, not 32"),
        ({"trial__evaluation__seed": 1}, r"protocol differs .*evaluation\.seed is 1, not 0"),
        ({"trial__training__lr": 0.1}, r"trial differs .*\(trial\.training\.lr is 0\.1, not 0\.003\)"),
        (
            {"trial__evaluation__proxy": {"until_step": 10, "num_samples": 8}},
            r"trial differs .*trial\.evaluation\.proxy\.until_step is 10, not null",
        ),
        ({"early_stopping__sigma": 1.0}, r"early_stopping differs .*sigma is 1, not 0"),
    ],
)
def test_what_differs_is_named(folder: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_resumable(tiny_sweep(folder.parent, **changes), folder)


def test_a_sweep_from_before_a_key_was_there_goes_on_with_its_default(folder: Path) -> None:
    path = folder / "sweep.json"
    old = json.loads(path.read_text(encoding="utf-8"))
    for key in ("standard_error", "extrapolate", "proxy"):
        del old["trial"]["evaluation"][key]
    del old["early_stopping"]["sigma"]
    path.write_text(json.dumps(old), encoding="utf-8")
    check_resumable(tiny_sweep(folder.parent), folder)


def report(identity: str | None, step: int = 10) -> Report:
    trial = tiny_sweep(Path("runs")).trial
    metrics = {METRIC: 5.0, "train_seconds": 1.0}
    return Report(step, metrics, f"checkpoints/{step:08d}", "g.png", protocol_of(trial, identity))


def test_images_that_have_changed_are_refused_before_anything_runs(folder: Path) -> None:
    SweepState(tiny_sweep(folder.parent), folder, "digits-8-a").close()
    check_same_data(folder, "digits-8-a")
    with pytest.raises(ValueError, match=r"images have changed .*digits-8-b, not digits-8-a"):
        check_same_data(folder, "digits-8-b")


def test_figures_from_before_protocols_were_kept_are_told(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    journal = Journal(folder / "journal.jsonl")
    journal.write("trial", id="t0000", number=0, params={})
    event = {"metrics": {METRIC: 1.0}, "checkpoint": "", "wall_s": 1.0, "stop": None}
    journal.write("report", id="t0000", step=10, **event)
    journal.close()
    check_same_data(folder, "digits-8-a")
    assert "unknown protocol" in caplog.text
    state = SweepState(tiny_sweep(folder.parent), folder, "digits-8-a")
    assert state.trials["t0000"].protocols == {10: {}}


def test_a_report_of_other_images_is_not_taken_and_ends_the_sweep(folder: Path) -> None:
    state = SweepState(tiny_sweep(folder.parent), folder, "digits-8-a")
    first, second = state.next_trial(), state.next_trial()
    assert first != "finished"
    assert second != "finished"
    assert state.report(first.trial_id, report("digits-8-a")) is None
    reason = state.report(second.trial_id, report("digits-8-b"))
    assert reason == state.ending
    assert reason is not None
    assert "evaluated at step 10 on digits-8-b, those before on digits-8-a" in reason
    assert not state.trials[second.trial_id].reports
    assert state.trials[second.trial_id].status == "running"
    assert not state.budget_spent


def test_the_protocol_is_noted_once(folder: Path) -> None:
    def events() -> list[str]:
        lines = (folder / "journal.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line)["event"] for line in lines]

    config = tiny_sweep(folder.parent)
    SweepState(config, folder, "digits-8-a").close()
    state = SweepState(config, folder, "digits-8-a")
    assert events().count("protocol") == 1
    assert state.protocol == protocol_of(state.config.trial, "digits-8-a")
    # Without a look at the images (all trials have ended) what is noted stands.
    assert SweepState(config, folder).protocol == state.protocol
    assert events().count("protocol") == 1
