import gc
import json
import logging
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_trials import (
    METRIC,
    WEIGHTINGS,
    KillAt,
    KilledError,
    PlantedNaN,
    Recorder,
    batches_of,
    digits,
    distances,
    final_state,
    in_workers,
    stop_and_resume,
    tensors_of,
    tiny_config,
    train_each_weighting,
    train_with_nan_on_the_last_worker,
)

from dtr_ray.config import TrialConfig
from dtr_ray.config.protocol import protocol_of
from dtr_ray.data import ImageData
from dtr_ray.data.order import batch_indices
from dtr_ray.diffusion.loss import diffusion_losses
from dtr_ray.diffusion.noise import noise_schedule
from dtr_ray.distributed import Group
from dtr_ray.models import FAMILIES
from dtr_ray.models.dit import DiT
from dtr_ray.training import Report, TrainingDivergedError, latest_checkpoint, train
from dtr_ray.training.batches import Batch
from dtr_ray.training.reports import ReportFile
from dtr_ray.training.retention import MOST
from dtr_ray.training.state import (
    CONFIG_FILE,
    EMA_FILE,
    MANIFEST_FILE,
    MODEL_FILE,
    TRAINING_FILE,
    TrainingState,
    checkpoint_folder,
    find_damage,
)
from dtr_ray.training.step import build_step

CPU = torch.device("cpu")


def run(config: TrialConfig, folder: Path, **options: Any) -> tuple[list[Report], Recorder]:
    observer = options.pop("observer", Recorder())
    data = options.pop("data", None) or digits(config)
    return list(train(config, folder, data, observer=observer, **options)), observer


def assert_same(config: TrialConfig, one: Path, other: Path) -> None:
    """Both trials' newest checkpoints hold the same, bit for bit."""
    first, second = (final_state(config, folder) for folder in (one, other))
    assert (first.step, first.losses) == (second.step, second.losses)
    tensors, others = tensors_of(first), tensors_of(second)
    assert tensors.keys() == others.keys()
    assert [name for name in tensors if not torch.equal(tensors[name], others[name])] == []


def checkpoints_of(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in (folder / "checkpoints").glob("[0-9]*"))


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "ant_uw": {"weighting__name": "ant_uw", "training__gradient_clip": 0.5},
    "ant_pcgrad, accumulation": {
        "weighting__name": "ant_pcgrad",
        "weighting__num_clusters": 3,
        "training__accumulation_steps": 6,
    },
    "ant_nash, bf16": {
        "weighting__name": "ant_nash",
        "weighting__every_steps": 4,
        "training__precision": "bf16",
        "training__accumulation_steps": 2,
    },
    "bf16, EMA warm-up, flip, weight decay": {
        "training__precision": "bf16",
        "training__ema_warmup": True,
        "data__horizontal_flip": True,
        "training__weight_decay": 0.1,
    },
    "unconditional, random routing, p2, DDPM": {
        "data__num_classes": 1,
        "routing__name": "random",
        "weighting__name": "p2",
        "sampling__sampler": "ddpm",
    },
    "U-Net with dropout, roaming masks": {
        "model": {
            "name": "ADM",
            "hidden_size": 32,
            "channel_multipliers": [1],
            "num_res_blocks": 1,
            "attention_resolutions": [],
            "num_head_channels": 32,
            "dropout": 0.3,
        },
        "routing__name": "max_roaming",
        "routing__every_steps": 2,
    },
}


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> TrialConfig:
    changes = {"training__checkpoint_every_steps": 1, "training__log_every_steps": 3}
    return tiny_config(**changes, evaluation__every_steps=4, **VARIANTS[request.param])


def test_a_run_killed_after_every_step_equals_the_uninterrupted_one(variant: TrialConfig, tmp_path: Path):
    expected, heard = run(variant, tmp_path / "whole")
    losses: dict[int, float] = {}
    for step in range(1, 8):
        observer = KillAt(step) if step < 7 else Recorder()
        resumed = train(variant, tmp_path / "killed", digits(variant), observer=observer)
        if step < 7:
            with pytest.raises(KilledError):
                list(resumed)
            # Killed before its checkpoint, so the step is trained again, and no other.
            assert observer.steps == ([step] if step == 1 else [step - 1, step])
        else:
            reports = list(resumed)
            assert observer.steps == [6]
        losses |= observer.losses
    assert distances(reports) == distances(expected)
    assert losses == heard.losses
    assert heard.losses.keys() == {3, 6}
    assert_same(variant, tmp_path / "whole", tmp_path / "killed")


def test_another_seed_gives_another_run(tmp_path: Path):
    losses = [run(tiny_config(training__seed=seed), tmp_path / str(seed))[1].losses for seed in (0, 1)]
    assert losses[0] != losses[1]


def test_global_random_state_changes_nothing_and_is_left_alone(tmp_path: Path):
    config = tiny_config(training__num_steps=2, evaluation__every_steps=2)
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        found.append(run(config, tmp_path / str(seed))[1].losses)
        assert torch.equal(torch.get_rng_state(), before)
    assert found[0] == found[1]


class Untold(Recorder):
    """Is killed when the first evaluation is done, before the report is on disk or the caller has it."""

    def __init__(self, when: str) -> None:
        super().__init__()
        self.when = when

    def progress(self, step: int, phase: str) -> None:
        super().progress(step, phase)
        if phase == self.when:
            raise KilledError

    def evaluated(self, report: Report) -> None:
        super().evaluated(report)
        if self.when == "evaluated":
            raise KilledError


def test_a_run_killed_while_it_evaluates_evaluates_at_once_and_trains_nothing_twice(tmp_path: Path):
    config = tiny_config(evaluation__every_steps=3)
    expected, _ = run(config, tmp_path / "whole")
    with pytest.raises(KilledError):
        run(config, tmp_path / "killed", observer=Untold("evaluating"))
    assert checkpoints_of(tmp_path / "killed") == [3]
    resumed = train(config, tmp_path / "killed", digits(config), observer=(observer := Recorder()))
    assert next(resumed).metrics[METRIC] == expected[0].metrics[METRIC]
    assert observer.steps == []
    assert distances(list(resumed)) == distances(expected[1:])
    assert observer.steps == [4, 5, 6]


def test_a_report_whose_observer_was_lost_is_told_and_yielded_again(tmp_path: Path):
    config = tiny_config(evaluation__every_steps=3)
    with pytest.raises(KilledError):
        run(config, tmp_path, observer=Untold("evaluated"))
    reports, observer = run(config, tmp_path)
    assert observer.evaluated_steps == [3, 6]
    assert [report.step for report in reports] == [3, 6]


def test_a_caller_that_was_lost_gets_the_same_reports_again(tmp_path: Path):
    config = tiny_config(evaluation__every_steps=3)
    first = train(config, tmp_path, digits(config))
    report = next(first)
    first.close()
    again = train(config, tmp_path, digits(config))
    assert next(again) == report
    rest = list(again)
    reports, observer = run(config, tmp_path)
    assert reports == [report, *rest] == ReportFile(tmp_path / "reports.jsonl").read()
    assert observer.steps == []


_SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in (EMA_FILE, CONFIG_FILE, MANIFEST_FILE)]


@pytest.mark.parametrize("file", [MODEL_FILE, TRAINING_FILE, *_SLOW])
def test_a_damaged_checkpoint_is_trained_again_from_the_one_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, file: str
):
    config = tiny_config(evaluation__every_steps=2)
    expected, _ = run(config, tmp_path / "whole")
    started = train(config, tmp_path / "damaged", digits(config))
    [next(started) for _ in range(2)]
    started.close()
    newest = checkpoint_folder(tmp_path / "damaged", 4)
    earlier = train(config, tmp_path / "earlier", digits(config))
    next(earlier)
    earlier.close()
    # The one before goes when a trial is stopped; one that is killed has it still.
    before = checkpoint_folder(tmp_path / "damaged", 2)
    shutil.copytree(checkpoint_folder(tmp_path / "earlier", 2), before, dirs_exist_ok=True)
    content = (newest / file).read_bytes()
    (newest / file).write_bytes(content[: min(1000, len(content) // 2)])
    with caplog.at_level(logging.WARNING):
        reports, observer = run(config, tmp_path / "damaged")
    assert f"{newest} is damaged" in caplog.text
    assert observer.steps == [3, 4, 5, 6]
    assert distances(reports) == distances(expected)
    assert [r.step for r in ReportFile(tmp_path / "damaged" / "reports.jsonl").read()] == [2, 4, 6]
    assert_same(config, tmp_path / "whole", tmp_path / "damaged")


def test_without_a_whole_checkpoint_a_trial_is_trained_again_from_its_first_step(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    config = tiny_config(training__num_steps=4, evaluation__every_steps=2)
    expected, _ = run(config, tmp_path)
    for step in checkpoints_of(tmp_path):
        model = checkpoint_folder(tmp_path, step) / MODEL_FILE
        content = bytearray(model.read_bytes())
        content[-1] ^= 1
        model.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        reports, observer = run(config, tmp_path)
    assert f"no checkpoint of {tmp_path} is whole" in caplog.text
    assert observer.steps == [1, 2, 3, 4]
    assert distances(reports) == distances(expected)
    assert [r.step for r in ReportFile(tmp_path / "reports.jsonl").read()] == [2, 4]


def test_the_best_and_the_newest_checkpoint_are_kept_and_the_one_before_while_it_trains(tmp_path: Path):
    # At this rate the distance goes up and down.
    config = tiny_config(
        training__num_steps=12,
        training__lr=0.02,
        training__checkpoint_every_steps=1,
        evaluation__every_steps=2,
        evaluation__num_samples=16,
    )
    seen: list[Report] = []
    bests = set()
    for report in train(config, tmp_path, digits(config)):
        seen.append(report)
        best = min(seen, key=lambda known: known.metrics[METRIC])
        bests.add(best.step)
        assert checkpoints_of(tmp_path) == sorted({best.step, report.step - 1, report.step})
        assert json.loads((tmp_path / "best.json").read_text())["step"] == best.step
        for known in (best, report):
            assert find_damage(tmp_path / known.checkpoint) is None
            assert (tmp_path / known.grid).stat().st_size > 0
    assert len(bests) > 1
    assert len(bests) < len(seen)
    assert checkpoints_of(tmp_path) == sorted({best.step, 12})


def test_a_trial_that_is_stopped_keeps_the_best_and_the_last_checkpoint(tmp_path: Path):
    config = tiny_config(training__checkpoint_every_steps=1, evaluation__every_steps=2)
    reports = train(config, tmp_path, digits(config))
    next(reports)
    last = next(reports)
    assert checkpoints_of(tmp_path)[-2:] == [3, 4]
    reports.close()
    best = json.loads((tmp_path / "best.json").read_text())["step"]
    assert checkpoints_of(tmp_path) == sorted({best, last.step})


def test_never_more_than_three_checkpoints_are_on_the_disk_and_never_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = tiny_config(training__num_steps=8, training__checkpoint_every_steps=1, evaluation__every_steps=2)
    seen: list[list[int]] = []
    write = TrainingState._write

    def look(state: TrainingState, folder: Path, config: TrialConfig) -> None:
        write(state, folder, config)
        seen.append(checkpoints_of(tmp_path))

    monkeypatch.setattr(TrainingState, "_write", look)
    list(train(config, tmp_path, digits(config)))
    # With the one that has just been written beside them.
    assert max(map(len, seen)) <= MOST - 1
    assert all(step - 1 in kept for step, kept in enumerate(seen[1:], 2))


def test_evaluations_are_at_multiples_and_at_the_last_step(tmp_path: Path):
    config = tiny_config(training__num_steps=5, evaluation__every_steps=3)
    reports, observer = run(config, tmp_path)
    assert [report.step for report in reports] == [3, 5] == observer.evaluated_steps
    assert checkpoints_of(tmp_path)[-1] == 5
    for report in reports:
        assert report.metrics.keys() == {METRIC, f"{METRIC}_stderr", "eval_seconds", "train_seconds"}
        assert report.checkpoint == f"checkpoints/{report.step:08d}"


PROXY = {"until_step": 4, "num_samples": 8, "num_steps": 1}


def test_early_evaluations_are_of_the_proxy_and_the_best_is_of_the_full_distance(tmp_path: Path):
    config = tiny_config(training__num_steps=8, evaluation__every_steps=2, evaluation__proxy=PROXY)
    proxy = "proxy_fd_efficientnet_lite0_8"
    reports, _ = run(config, tmp_path / "whole")
    assert [proxy in report.metrics for report in reports] == [True, True, False, False]
    assert [METRIC in report.metrics for report in reports] == [False, False, True, True]
    identity = digits(config).identity
    assert [report.protocol for report in reports] == [
        protocol_of(config, identity, proxy=is_proxy) for is_proxy in (True, True, False, False)
    ]
    best = json.loads((tmp_path / "whole" / "best.json").read_text())
    assert best["step"] == min(reports[2:], key=lambda report: report.metrics[METRIC]).step
    # A run that is lost while its evaluations are proxies goes on to the same figures.
    with pytest.raises(KilledError):
        run(config, tmp_path / "killed", observer=KillAt(3))
    assert not (tmp_path / "killed" / "best.json").exists()
    again, _ = run(config, tmp_path / "killed")
    assert [timeless(report) for report in again] == [timeless(report) for report in reports]


def timeless(report: Report) -> tuple[int, dict[str, float], dict[str, Any]]:
    values = {name: value for name, value in report.metrics.items() if not name.endswith("_seconds")}
    return report.step, values, report.protocol


def test_a_run_does_not_go_on_with_other_images(tmp_path: Path):
    config = tiny_config(training__num_steps=4, evaluation__every_steps=2)
    run(config, tmp_path)
    longer = tiny_config(training__num_steps=6, evaluation__every_steps=2)
    data = digits(longer)
    other = ImageData(data.pixels(torch.arange(len(data))).numpy(), data.labels, 10, "digits-8-other")
    with pytest.raises(ValueError, match=r"protocol has changed \(data\.identity is 'digits-8-other', not"):
        list(train(longer, tmp_path, other))


def test_an_untrained_model_is_evaluated_where_it_is_asked_for(tmp_path: Path):
    config = tiny_config()
    plain, _ = run(config, tmp_path / "plain")
    reports, observer = run(config, tmp_path / "untrained", evaluate_untrained=True)
    assert [report.step for report in reports] == [0, 6] == observer.evaluated_steps
    assert reports[0].checkpoint == ""
    assert (tmp_path / "untrained" / reports[0].grid).exists()
    assert distances(reports[1:]) == distances(plain)
    assert json.loads((tmp_path / "untrained" / "best.json").read_text())["step"] == 6
    again, observer = run(config, tmp_path / "untrained", evaluate_untrained=True)
    assert (again, observer.steps) == (reports, [])


def test_a_longer_run_starts_from_another_trial_s_checkpoint(tmp_path: Path):
    short, long = (tiny_config(training__num_steps=n, evaluation__every_steps=3) for n in (3, 6))
    run(short, tmp_path / "short")
    checkpoint = latest_checkpoint(tmp_path / "short")
    assert checkpoint is not None
    expected, _ = run(long, tmp_path / "whole")
    reports, observer = run(long, tmp_path / "long", start_from=checkpoint)
    assert observer.steps == [4, 5, 6]
    assert distances(reports) == distances(expected)
    assert (tmp_path / "long" / reports[0].checkpoint).parent.exists()
    assert_same(long, tmp_path / "whole", tmp_path / "long")
    # Once it has checkpoints of its own, those count.
    again, observer = run(long, tmp_path / "long", start_from=tmp_path / "nowhere")
    assert (again, observer.steps) == (reports, [])


def test_a_checkpoint_to_start_from_that_is_not_there_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"nowhere is missing or damaged: .*No such file"):
        run(tiny_config(), tmp_path / "trial", start_from=tmp_path / "nowhere")


def test_the_observer_hears_of_every_step_and_every_record(tmp_path: Path):
    changes = {"training__num_steps": 5, "evaluation__every_steps": 5}
    by_one, by_two = (tiny_config(training__log_every_steps=every, **changes) for every in (1, 2))
    _, observer = run(by_two, tmp_path / "by two")
    assert observer.steps == [1, 2, 3, 4, 5]
    each = run(by_one, tmp_path / "by one")[1].losses
    assert observer.losses == {
        2: (each[1] + each[2]) / 2,
        4: (each[3] + each[4]) / 2,
        5: each[5],
    }


@pytest.fixture(scope="module", params=[2, 3])
def workers_results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return in_workers(train_each_weighting, request.param, tmp_path_factory.mktemp("workers"))


@pytest.fixture(scope="module")
def one_process_results(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return train_each_weighting(Group(), tmp_path_factory.mktemp("single"))


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_several_workers_train_as_one_process_does(
    weighting: str, workers_results: list[Any], one_process_results: Any
):
    losses, values = one_process_results[weighting]
    assert losses.keys() == {1, 2, 3, 4, 5, 6}
    for rank, results in enumerate(workers_results):
        found_losses, found_values = results[weighting]
        # The main worker alone records; every worker reports.
        assert found_losses == (pytest.approx(losses, rel=1e-5) if rank == 0 else {})
        assert found_values == pytest.approx(values, rel=1e-5)
        assert found_values == workers_results[0][weighting][1]


def test_workers_that_stop_and_resume_go_on_as_one_process_would(tmp_path: Path):
    losses, values = stop_and_resume(Group(), tmp_path / "single")
    (found_losses, found_values), (nothing, same_values) = in_workers(stop_and_resume, 2, tmp_path / "two")
    assert found_losses == pytest.approx(losses, rel=1e-5)
    assert found_losses.keys() == {2, 4, 6}
    assert nothing == {}
    assert found_values == same_values == pytest.approx(values, rel=1e-5)


def test_workers_that_cannot_share_a_batch_are_refused(tmp_path: Path):
    steps = train(tiny_config(), tmp_path, digits(), group=Group(0, 5))
    with pytest.raises(ValueError, match=r"training\.batch_size 12 .* 5 workers"):
        next(steps)
    steps = train(tiny_config(evaluation__num_samples=2), tmp_path, digits(), group=Group(0, 3))
    with pytest.raises(ValueError, match=r"evaluation\.num_samples 2 .* 3 workers"):
        next(steps)


def saved_weights_are_finite(folder: Path) -> bool:
    config = tiny_config()
    state = TrainingState.build(config, CPU)
    for checkpoint in (folder / "checkpoints").glob("[0-9]*"):
        state.load(checkpoint, config)
        if not state.is_finite():
            return False
    return True


@pytest.mark.parametrize("every", [1, 2, 6])
def test_a_rate_far_too_high_fails_the_trial_and_saves_nothing_broken(tmp_path: Path, every: int):
    config = tiny_config(training__lr=1e20, training__checkpoint_every_steps=every)
    with pytest.raises(TrainingDivergedError, match=r"at step [2-6]|after step [1-6]"):
        run(config, tmp_path)
    assert saved_weights_are_finite(tmp_path)
    assert ReportFile(tmp_path / "reports.jsonl").read() == []


def test_the_step_of_the_first_loss_that_is_not_finite_is_named(tmp_path: Path):
    config = tiny_config(training__log_every_steps=6)
    data = digits(config)
    index = int(batch_indices(len(data), 12, 3, config.training.seed)[5])
    with pytest.raises(TrainingDivergedError, match=r"the loss is nan at step 4: lower training\.lr"):
        run(config, tmp_path, data=PlantedNaN(data, index))
    assert latest_checkpoint(tmp_path) is None


def test_a_loss_that_is_not_finite_on_one_worker_fails_all(tmp_path: Path):
    for error in in_workers(train_with_nan_on_the_last_worker, 2, tmp_path):
        assert isinstance(error, TrainingDivergedError)
        assert "nan at step 3" in str(error)
    assert latest_checkpoint(tmp_path / "trial") is None


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # The loss is that of the weights before the step, so the last step's harm shows in the weights alone.
    class Broken(torch.optim.AdamW):
        def step(self, closure: Any = None) -> Any:
            super().step(closure)
            self.param_groups[0]["params"][0].data.fill_(torch.inf)

    monkeypatch.setattr(torch.optim, "AdamW", Broken)
    config = tiny_config(training__num_steps=1, evaluation__every_steps=1)
    with pytest.raises(TrainingDivergedError, match="the weights are not finite after step 1"):
        run(config, tmp_path)
    assert latest_checkpoint(tmp_path) is None


def test_a_distance_of_samples_that_are_not_finite_is_not_reported(tmp_path: Path):
    # Weights so large that the model's output overflows, though each of them is finite.
    config = tiny_config(
        training__lr=1e30, training__num_steps=1, evaluation__every_steps=1, sampling__clip_denoised=False
    )
    with pytest.raises(TrainingDivergedError, match=rf"{METRIC} is nan at step 1"):
        run(config, tmp_path)
    assert ReportFile(tmp_path / "reports.jsonl").read() == []
    assert not (tmp_path / "grids").exists()


def test_bf16_trains_close_to_fp32_with_float32_weights(tmp_path: Path):
    losses = {}
    for precision in ("fp32", "bf16"):
        config = tiny_config(training__precision=precision)
        _, observer = run(config, tmp_path / precision)
        losses[precision] = observer.losses
        state = final_state(config, tmp_path / precision)
        assert {weight.dtype for weight in state.model.parameters()} == {torch.float32}
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.02)
    assert losses["bf16"] != losses["fp32"]


def one_step(config: TrialConfig) -> TrainingState:
    state = TrainingState.build(config, CPU)
    state.model.train()
    build_step(config, state, Group())(batches_of(config, state).at(0))
    return state


def test_gradient_clip_bounds_the_gradient():
    # The first moment after one step of AdamW is (1 - beta1) times the gradient.
    norms = {}
    for clip in (None, 100.0, 0.05):
        state = one_step(tiny_config(training__gradient_clip=clip))
        moments = [m["exp_avg"] for m in state.optimizer.state_dict()["state"].values()]
        norms[clip] = torch.cat([m.flatten() for m in moments]).norm().item() * 10
    assert norms[None] == pytest.approx(norms[100.0], rel=1e-6)
    assert norms[None] > 0.05
    assert norms[0.05] == pytest.approx(0.05, rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "step", "decay"),
    [
        ({}, 0, 0.9),
        ({"ema_warmup": True}, 0, 0.1),
        ({"ema_warmup": True}, 8, 0.5),
        ({"ema_warmup": True}, 500, 0.9),
    ],
)
def test_the_average_moves_by_its_decay_of_which_the_warm_up_is_a_part(
    changes: dict[str, bool], step: int, decay: float
):
    config = tiny_config(training__ema_decay=0.9, **{f"training__{k}": v for k, v in changes.items()})
    state = TrainingState.build(config, CPU)
    state.step = step
    before = [weight.clone() for weight in state.ema.parameters()]
    build_step(config, state, Group())(batches_of(config, state).at(0))
    for old, average, new in zip(before, state.ema.parameters(), state.model.parameters(), strict=True):
        torch.testing.assert_close(average, decay * old + (1 - decay) * new.detach())


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("routing", ["none", "dtr", "random"])
def test_training_lowers_the_loss_of_a_fixed_batch(routing: str, weighting: str):
    config = tiny_config(
        routing__name=routing, weighting__name=weighting, training__batch_size=64, training__lr=2e-3
    )
    state = TrainingState.build(config, CPU)
    batches, schedule = batches_of(config, state), noise_schedule("cosine", 1000)
    fixed: Batch = batches_of(tiny_config(training__batch_size=256)).at(10_000)

    @torch.no_grad()
    def loss() -> float:
        arguments = (state.model, schedule, fixed.x, fixed.t, fixed.noise, {"y": fixed.conditions})
        return float(diffusion_losses(*arguments)["mse"].mean())

    before = loss()
    step = build_step(config, state, Group())
    for number in range(60):
        step(batches.at(number))
    assert before == pytest.approx(1, abs=0.05)  # the model begins by predicting nothing of unit noise
    assert loss() < 0.75 * before


@pytest.mark.slow
@pytest.mark.parametrize("weighting", ["vanilla", "ant_uw"])
def test_a_compiled_model_trains_as_the_plain_one(weighting: str, tmp_path: Path):
    plain, compiled = (
        run(tiny_config(weighting__name=weighting, training__compile=c), tmp_path / str(c))
        for c in (False, True)
    )
    assert compiled[1].losses == pytest.approx(plain[1].losses, rel=1e-4)
    assert distances(compiled[0]) == pytest.approx(distances(plain[0]), rel=1e-2)


@pytest.mark.parametrize("weighting", ["vanilla", "ant_uw"])
def test_a_run_that_is_closed_early_frees_its_model(
    weighting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    references: list[weakref.ref[Any]] = []

    class Watched(DiT):
        # Not in __init__: the average is a deep copy.
        def __new__(cls, *args: Any, **kwargs: Any) -> "Watched":
            model = super().__new__(cls)
            references.append(weakref.ref(model))
            return model

    monkeypatch.setitem(FAMILIES, "DiT", Watched)
    config = tiny_config(weighting__name=weighting, evaluation__every_steps=3)
    steps = train(config, tmp_path, digits(config))
    next(steps)
    assert len(references) == 2  # the model and its average
    assert None not in [reference() for reference in references]
    steps.close()
    gc.collect()
    assert [reference() for reference in references] == [None, None]


@pytest.mark.gpu
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_nothing_in_a_step_waits_for_the_gpu(weighting: str):
    config = tiny_config(
        weighting__name=weighting,
        training__gradient_clip=1.0,
        training__precision="bf16",
        data__horizontal_flip=True,
        # Only new weights of NashMTL are waited for.
        **({"weighting__every_steps": 2} if weighting == "ant_nash" else {}),
    )
    state = TrainingState.build(config, torch.device("cuda", torch.cuda.current_device()))
    batches, step = batches_of(config, state), build_step(config, state, Group())
    step(batches.at(0))
    state.step += 1
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(batches.at(1))
    finally:
        torch.cuda.set_sync_debug_mode("default")
