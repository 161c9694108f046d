"""A proxy is measured on a sweep's own checkpoints, and an interrupted study goes on."""

import csv
import io
from pathlib import Path

import pytest
from rich.console import Console
from tiny_sweeps import METRIC, folder_of, tiny_sweep
from tiny_trials import digits

from dtr_ray.analysis import proxies
from dtr_ray.analysis.proxies import Measured, ProxyStudy, study_proxy, write_study
from dtr_ray.analysis.proxy_table import study_lines, study_table
from dtr_ray.search.state import save_config
from dtr_ray.training import Report, train

PROXY = "proxy_fd_efficientnet_lite0_16"


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[Report]]]:
    """Three trained trials with a proxy, and their reports."""
    config = tiny_sweep(
        tmp_path_factory.mktemp("swept"),
        trial__training__num_steps=4,
        trial__evaluation__every_steps=2,
        trial__evaluation__proxy={"until_step": 2, "num_samples": 16, "num_steps": 1},
        early_stopping={"name": "none"},
    )
    folder, reports = folder_of(config), {}
    folder.mkdir()
    save_config(config, folder)
    for number in range(3):
        trial = config.trial_config({"training.lr": 10.0 ** -(number + 1)})
        reports[f"t{number}"] = list(train(trial, folder / "trials" / f"t{number}", digits(trial)))
    return folder, reports


@pytest.fixture
def study(swept: tuple[Path, dict[str, list[Report]]]) -> ProxyStudy:
    return study_proxy(swept[0])


def test_the_full_figures_are_those_that_the_trials_reported(
    swept: tuple[Path, dict[str, list[Report]]], study: ProxyStudy
) -> None:
    assert (study.metric, study.proxy_metric) == (METRIC, PROXY)
    assert {each.trial: each.step for each in study.measured} == dict.fromkeys(("t0", "t1", "t2"), 4)
    for each in study.measured:
        last = swept[1][each.trial][-1].metrics
        assert each.full == pytest.approx(last[METRIC], rel=1e-5)
        assert each.full_stderr == pytest.approx(last[f"{METRIC}_stderr"], rel=1e-3)
        assert each.proxy != each.full
        assert min(each.proxy_seconds, each.full_seconds) > 0


def test_what_was_measured_is_kept_and_a_new_study_goes_on(
    swept: tuple[Path, dict[str, list[Report]]], study: ProxyStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = study.partial.read_text(encoding="utf-8").splitlines(keepends=True)
    assert len(lines) == 3
    measured: list[str] = []
    measure = proxies._measure

    def watched(place: tuple[str, int, str], *rest: object) -> Measured:
        measured.append(place[0])
        if len(measured) == 2:
            raise KeyboardInterrupt
        return measure(place, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(proxies, "_measure", watched)
    # As if it had been killed in its second line.
    study.partial.write_text(lines[0] + lines[1][:40], encoding="utf-8")
    with pytest.raises(KeyboardInterrupt):
        study_proxy(swept[0])
    assert measured == ["t1", "t2"]
    assert [m.trial for m in study_proxy(swept[0]).measured] == ["t0", "t1", "t2"]
    assert measured == ["t1", "t2", "t2"]
    assert len(study_proxy(swept[0], ["evaluation.proxy.num_samples=12"]).measured) == 3
    assert len(measured) == 6


def test_the_table_and_the_file_have_every_checkpoint(study: ProxyStudy, tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=120)
    console.print(study_table(study))
    assert isinstance(console.file, io.StringIO)
    assert all(each.trial in console.file.getvalue() for each in study.measured)
    write_study(study, tmp_path / "proxy.csv")
    with (tmp_path / "proxy.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["trial"], float(row["full"])) for row in rows] == [(m.trial, m.full) for m in study.measured]


def test_ranks_are_compared_step_by_step(study: ProxyStudy, tmp_path: Path) -> None:
    def row(trial: str, step: int, proxy: float, full: float) -> Measured:
        return Measured(trial, step, "", proxy, None, 1.0, full, None, 10.0)

    early = [row("a", 10, 3.0, 9.0), row("b", 10, 2.0, 8.0), row("c", 10, 1.0, 7.0)]
    late = [row("a", 20, 0.3, 0.7), row("b", 20, 0.2, 0.8), row("c", 20, 0.1, 0.9)]
    mixed = ProxyStudy(METRIC, PROXY, study.protocols, [*early, *late], tmp_path)
    found = {each.step: each for each in mixed.agreements}
    assert [found[step].kendall.value for step in (10, 20)] == [1.0, -1.0]
    assert found[None].kendall.value > 0
    text = "\n".join(study_lines(mixed))
    assert "step 20, 3 checkpoints: Spearman -1.00" in text
    assert "flatters" in text
    assert "time: 1 s against 10 s (medians), 0.1 of it" in text
    alone = ProxyStudy(METRIC, PROXY, study.protocols, early[:2], tmp_path)
    assert "no training step has checkpoints of three trials" in "\n".join(study_lines(alone))


def test_what_holds_no_checkpoints_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not the folder of a sweep"):
        study_proxy(tmp_path)
    proxy = {"until_step": 10, "num_samples": 8}
    save_config(tiny_sweep(tmp_path, trial__evaluation__proxy=proxy), tmp_path)
    with pytest.raises(ValueError, match="no trial has kept a checkpoint"):
        study_proxy(tmp_path)
