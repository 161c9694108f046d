"""From captions to samples: a model trains on digits by their captions, and draws what it is told."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_clip import CHANNELS, write_clip
from tiny_trials import Recorder, batches_of, digits, distances, final_state, tensors_of, tiny_config

from dtr_ray import evaluate, sample
from dtr_ray.config import TrialConfig
from dtr_ray.diffusion.drawing import draw
from dtr_ray.diffusion.loss import diffusion_losses
from dtr_ray.diffusion.noise import noise_schedule
from dtr_ray.distributed import Group
from dtr_ray.evaluation.evaluate import Evaluator
from dtr_ray.export.folder import export_model
from dtr_ray.export.pipeline import DTRPipeline
from dtr_ray.export.trained import build_pipeline, open_model
from dtr_ray.models.dit import DiT
from dtr_ray.training import train
from dtr_ray.training.batches import Batches
from dtr_ray.training.state import TrainingState
from dtr_ray.training.step import build_step

CPU = torch.device("cpu")
STEPS = 120


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip"), num_hidden_layers=1)


def text_config(clip: Path, **changes: Any) -> TrialConfig:
    return tiny_config(
        **{
            "data__text_encoder": str(clip),
            "data__text_channels": CHANNELS,
            "model__depth": 2,
            "model__patch_size": 2,
            "routing__name": "dtr",
            "training__num_steps": STEPS,
            "training__batch_size": 24,
            "training__log_every_steps": 20,
            "evaluation__every_steps": STEPS // 2,
            "evaluation__grid_images": 6,
            "sampling__num_steps": 4,
            "sampling__guidance_scale": 2.0,
            **changes,
        }
    )


@pytest.fixture(scope="module")
def config(clip: Path) -> TrialConfig:
    return text_config(clip)


@pytest.fixture(scope="module")
def mnist(clip: Path) -> TrialConfig:
    return text_config(clip, data__name="mnist", data__resolution=16, model__patch_size=4)


@pytest.fixture(scope="module")
def trial(config: TrialConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished trial."""
    folder = tmp_path_factory.mktemp("trial")
    list(train(config, folder, digits(config)))
    return folder


@pytest.fixture(scope="module")
def export(trial: Path) -> Path:
    return export_model(trial, trial.parent / "export", name="told")


@pytest.fixture(scope="module")
def pipeline(export: Path) -> DTRPipeline:
    return DTRPipeline.from_pretrained(export)


def pixels(pipeline: DTRPipeline, *args: Any, **kwargs: Any) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    images: torch.Tensor = pipeline(*args, output_type="pt", **kwargs).images
    return images


def tokens_of(config: TrialConfig, numbers: list[int]) -> torch.Tensor:
    captions = digits(config).captions
    assert captions is not None
    return captions.tokens(torch.tensor(numbers))


def fixed_loss(config: TrialConfig, state: TrainingState) -> float:
    """The mean error of the predicted noise on one batch."""
    schedule, batch = noise_schedule("cosine", 1000), batches_of(config, state).at(10_000)
    with torch.no_grad():
        found = diffusion_losses(
            state.model.eval(), schedule, batch.x, batch.t, batch.noise, {"y": batch.conditions}
        )
    state.model.train()
    return found["mse"].mean().item()


def test_mnist_with_captions_trains(mnist: TrialConfig) -> None:
    state, batches = TrainingState.build(mnist, CPU), batches_of(mnist)
    before = fixed_loss(mnist, state)
    step = build_step(mnist, state, Group())
    for state.step in range(60):
        step(batches.at(state.step))
    assert fixed_loss(mnist, state) < 0.5 * before


def test_training_lowers_the_loss_on_a_fixed_noised_batch(config: TrialConfig, trial: Path) -> None:
    untrained, trained = TrainingState.build(config, CPU), final_state(config, trial)
    assert fixed_loss(config, trained) < 0.6 * fixed_loss(config, untrained)


def test_training_uses_the_text(config: TrialConfig, trial: Path) -> None:
    model = final_state(config, trial).ema
    for block in model.blocks:  # type: ignore[union-attr]
        assert block.cross_attn.proj.weight.any()
    x, t = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([400, 400])
    with torch.no_grad():
        told, other = (model(x, t, tokens_of(config, numbers).float()) for numbers in ([1, 2], [5, 9]))
    assert (told - other).abs().max() > 1e-4


def test_batches_hold_captions_and_some_without(config: TrialConfig) -> None:
    batches, empty = batches_of(config), tokens_of(config, [0]).float()
    steps = [batches.at(step).conditions for step in range(30)]
    assert steps[0].shape == (24, 77, CHANNELS)
    assert steps[0].dtype == torch.float32
    without = (torch.cat(steps) == empty).flatten(1).all(1).float().mean()
    assert 0.05 < without < 0.15
    assert torch.equal(batches_of(config).at(3).conditions, steps[3])
    assert not torch.equal(steps[3], steps[4])


def test_captions_of_a_batch_belong_to_its_images(mnist: TrialConfig) -> None:
    data = digits(mnist)
    labels = digits(tiny_config(data__name="mnist", data__resolution=16)).labels
    captions = data.captions
    assert captions is not None
    batch = batches_of(mnist).at(1)
    everything, images = captions.tokens(torch.arange(41)).float(), data.batch(torch.arange(len(data)))
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    for x, tokens in zip(batch.x, batch.conditions, strict=True):
        number = int((everything == tokens).flatten(1).all(1).nonzero()[0])
        label = int(labels[(images == x).flatten(1).all(1)][0])
        (text,) = captions.texts(torch.tensor([number]))
        assert text == "" or words[label] in text.split()


@pytest.mark.parametrize("world_size", [2, 3])
def test_workers_shares_of_captions_are_the_batch_of_one_process(
    config: TrialConfig, world_size: int
) -> None:
    whole = batches_of(config).at(5).conditions
    shares = [
        Batches(config, digits(config), Group(rank, world_size), CPU, null_label=None, intervals=None)
        .at(5)
        .conditions
        for rank in range(world_size)
    ]
    assert torch.equal(torch.cat(shares), whole)


def test_models_keep_the_empty_captions_tokens(config: TrialConfig, trial: Path) -> None:
    state, empty = final_state(config, trial), tokens_of(config, [0])[0].float()
    for model in (state.model, state.ema):
        assert isinstance(model, DiT)
        assert model.null_tokens is not None
        assert torch.equal(model.null_tokens, empty)


def test_without_dropout_no_tokens_are_kept_and_guidance_is_refused(clip: Path, tmp_path: Path) -> None:
    changes = {"model__class_dropout_prob": 0.0, "training__num_steps": 2, "evaluation__every_steps": 2}
    config = text_config(clip, **changes, sampling__guidance_scale=1.0)
    list(train(config, tmp_path, digits(config)))
    assert "null_tokens" not in final_state(config, tmp_path).model.state_dict()
    pipeline = build_pipeline(open_model(tmp_path))
    with pytest.raises(ValueError, match="it needs null_label"):
        pipeline(guidance_scale=2.0)
    with pytest.raises(ValueError, match=r"model\.class_dropout_prob above 0"):
        text_config(clip, **changes)


def test_a_resumed_run_repeats_the_uninterrupted_one(
    config: TrialConfig, trial: Path, tmp_path: Path
) -> None:
    observer = Recorder()
    run = train(config, tmp_path, digits(config), observer=observer)
    next(run)
    run.close()
    reports = list(train(config, tmp_path, digits(config), observer=observer))
    expected, found = tensors_of(final_state(config, trial)), tensors_of(final_state(config, tmp_path))
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    lines = (trial / "reports.jsonl").read_text(encoding="utf-8").splitlines()
    metric = config.evaluation.metric
    assert distances(reports) == {
        int(line["step"]): line["metrics"][metric] for line in map(json.loads, lines)
    }


def test_samples_follow_their_captions_and_guidance_changes_them(config: TrialConfig, trial: Path) -> None:
    def drawn(numbers: list[int], **sampling: Any) -> torch.Tensor:
        return draw(
            open_model(trial).model,
            noise_schedule("cosine", 1000),
            config.sampling.model_copy(update=sampling),
            config.data.sample_shape,
            seed=0,
            indices=torch.arange(len(numbers)),
            labels=tokens_of(config, numbers),
            device=CPU,
        )

    base = drawn([3, 8, 12])
    other = drawn([3, 30, 12])
    torch.testing.assert_close(other[[0, 2]], base[[0, 2]], atol=1e-5, rtol=0)
    assert (other[1] - base[1]).abs().max() > 1e-4
    plain, stronger = (drawn([3, 8, 12], guidance_scale=scale) for scale in (1.0, 4.0))
    assert (plain - base).abs().max() > 1e-4
    assert (stronger - base).abs().max() > 1e-4
    # No caption is what guidance leans against, so there it changes nothing.
    empty = [drawn([0], guidance_scale=scale) for scale in (1.0, 4.0)]
    torch.testing.assert_close(empty[1], empty[0], atol=1e-5, rtol=0)


def test_exports_draw_the_evaluations_samples(
    config: TrialConfig, trial: Path, pipeline: DTRPipeline
) -> None:
    data = digits(config)
    evaluator = Evaluator(config, data, Group(), CPU)
    expected = data.to_pixels(evaluator.draw(open_model(trial).model, torch.arange(6))) / 255
    # One step of 8 bits: a prompt is encoded anew, in another batch than that of the cache.
    torch.testing.assert_close(pixels(pipeline, num_images=6), expected, atol=1.01 / 255, rtol=0)


def test_exports_bring_their_encoder_and_need_no_data(
    export: Path, config: TrialConfig, tmp_path: Path
) -> None:
    moved = tmp_path / "moved"
    export.rename(moved)
    try:
        values = json.loads((moved / "trial.json").read_text(encoding="utf-8"))
        expected = pixels(build_pipeline(open_model(moved)), prompt=["a handwritten two"])
        values["data"]["text_encoder"] = "./gone"
        (tmp_path / "kept.json").write_text((moved / "trial.json").read_text(encoding="utf-8"))
        # As the message for an edited folder says; put back below.
        (moved / "manifest.json").rename(tmp_path / "manifest.json")
        (moved / "trial.json").write_text(json.dumps(values), encoding="utf-8")
        again = build_pipeline(open_model(moved))
        assert again.config.prompts[0].startswith("a handwritten ")
        assert torch.equal(pixels(again, prompt=["a handwritten two"]), expected)
        (moved / "trial.json").write_text((tmp_path / "kept.json").read_text(encoding="utf-8"))
        (tmp_path / "manifest.json").rename(moved / "manifest.json")
    finally:
        moved.rename(export)


def test_diffusers_itself_loads_an_export(export: Path, pipeline: DTRPipeline) -> None:
    from diffusers import DiffusionPipeline

    loaded = DiffusionPipeline.from_pretrained(export, trust_remote_code=True)
    assert type(loaded.text_encoder).__name__ == "CLIPTextModel"
    assert torch.equal(
        pixels(loaded, prompt="a handwritten one"), pixels(pipeline, prompt="a handwritten one")
    )


def test_the_card_says_how_to_ask(export: Path) -> None:
    card = (export / "README.md").read_text(encoding="utf-8")
    assert "pipeline_tag: text-to-image" in card
    assert 'pipeline(prompt=["a handwritten ' in card
    assert "captions by " in card


def test_prompts_decide_number_by_number(pipeline: DTRPipeline) -> None:
    two = pixels(pipeline, prompt=["a handwritten two", "a handwritten one"])
    other = pixels(pipeline, prompt=["a handwritten two", "a handwritten six"])
    torch.testing.assert_close(other[0], two[0], atol=1.01 / 255, rtol=0)
    assert not torch.equal(other[1], two[1])
    same = pixels(pipeline, None, 2, prompt="a handwritten two")
    torch.testing.assert_close(same[0], two[0], atol=1.01 / 255, rtol=0)
    later = pixels(pipeline, prompt=["a handwritten one"], first_index=1)
    torch.testing.assert_close(later[0], two[1], atol=1.01 / 255, rtol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_labels": [1]}, "class_labels are for models of classes: this one takes a prompt"),
        ({"prompt": ["a", "b"], "num_images": 3}, "num_images is 3, but there are 2 prompts"),
        ({"prompt": []}, "there are 0 prompts"),
    ],
)
def test_wrong_arguments_are_refused(pipeline: DTRPipeline, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipeline(**arguments)


def test_sample_draws_what_it_is_told(
    trial: Path, export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "grid.png"
    words = ["--prompt", "a handwritten two", "--prompt", "a handwritten nine", "--num", "4"]
    for folder in (trial, export):
        assert sample.main([str(folder), "--output", str(output), *words]) == 0
        # Two columns and two rows of 8 x 8 pixels with a line between, enlarged 8 times.
        assert Image.open(output).size == (19 * 8, 19 * 8)
    assert sample.main([str(trial), "--output", str(output), "--num", "4"]) == 0
    assert sample.main([str(trial), "--output", str(output), "--labels", "1"]) == 2
    assert "class_labels are for models of classes" in capsys.readouterr().err


def test_a_model_of_classes_takes_no_prompt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config(training__num_steps=1, evaluation__every_steps=1)
    list(train(config, tmp_path, digits(config)))
    assert sample.main([str(tmp_path), "--output", str(tmp_path / "a.png"), "--prompt", "two"]) == 2
    assert "prompt is for models of captions" in capsys.readouterr().err


def test_evaluate_repeats_the_trials_own_figure(
    trial: Path, config: TrialConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate.main([str(trial)]) == 0
    name, value = capsys.readouterr().out.split()[:2]
    lines = (trial / "reports.jsonl").read_text(encoding="utf-8").splitlines()
    best = min(json.loads(line)["metrics"][config.evaluation.metric] for line in lines)
    assert name == config.evaluation.metric
    assert float(value) == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("name", ["vanilla", "min_snr", "ant_uw"])
def test_text_goes_with_weightings_and_half_precision(clip: Path, name: str, tmp_path: Path) -> None:
    config = text_config(
        clip,
        weighting__name=name,
        training__num_steps=3,
        evaluation__every_steps=3,
        training__precision="bf16",
    )
    (report,) = train(config, tmp_path, digits(config))
    assert report.metrics[config.evaluation.metric] > 0
