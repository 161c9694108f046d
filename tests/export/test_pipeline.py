from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from tiny_trials import digits, tiny_config

from dtr_ray.config import TrialConfig
from dtr_ray.data.dataset import quantise
from dtr_ray.data.latents import decode_latents
from dtr_ray.diffusion.drawing import draw
from dtr_ray.diffusion.noise import noise_schedule
from dtr_ray.distributed import Group
from dtr_ray.evaluation.evaluate import Evaluator
from dtr_ray.export.model import DTRModel
from dtr_ray.export.pipeline import DTRPipeline
from dtr_ray.export.trained import TrainedModel, build_pipeline, open_model


@pytest.fixture(scope="module")
def pipeline(trial: Path) -> DTRPipeline:
    return build_pipeline(open_model(trial))


def pixels(pipeline: DTRPipeline, *args: object, **kwargs: object) -> torch.Tensor:
    return pipeline(*args, output_type="pt", **kwargs).images


def untrained(**changes: object) -> TrainedModel:
    """A model that predicts something other than zero."""
    config = tiny_config(**changes)
    torch.manual_seed(0)
    model = DTRModel.from_trial(config)
    torch.nn.init.normal_(model.final_layer.linear.weight, std=0.1)
    return TrainedModel(config, model.eval(), Path())


def test_pipeline_draws_the_evaluations_samples(config: TrialConfig, trial: Path, pipeline: DTRPipeline):
    data = digits(config)
    evaluator = Evaluator(config, data, Group(), torch.device("cpu"))
    expected = data.to_pixels(evaluator.draw(open_model(trial).model, torch.arange(16))) / 255
    torch.testing.assert_close(pixels(pipeline, num_images=16), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm_solver++"])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("variance", ["learned_range", "fixed_small"])
def test_every_sampler_and_schedule_survives_saving(
    sampler: str, schedule: str, variance: str, tmp_path: Path
):
    trained = untrained(
        sampling__sampler=sampler,
        sampling__num_steps=4,
        diffusion__schedule=schedule,
        diffusion__variance=variance,
        diffusion__num_timesteps=200,
    )
    config = trained.config
    evaluator = Evaluator(config, digits(config), Group(), torch.device("cpu"))
    expected = quantise(evaluator.draw(trained.model, torch.arange(3))) / 255
    build_pipeline(trained).save_pretrained(tmp_path)
    loaded = DTRPipeline.from_pretrained(tmp_path)
    torch.testing.assert_close(pixels(loaded, num_images=3), expected, atol=1e-5, rtol=0)


def test_samples_depend_on_seed_number_and_label_alone(pipeline: DTRPipeline):
    whole = pixels(pipeline, num_images=7)
    assert torch.equal(pixels(pipeline, num_images=7, batch_size=3), whole)
    assert torch.equal(pixels(pipeline, num_images=3, first_index=4), whole[4:])
    assert torch.equal(pixels(pipeline, [0, 1, 2]), whole[:3])
    assert not torch.equal(pixels(pipeline, [1, 1, 2])[0], whole[0])
    assert not torch.equal(pixels(pipeline, num_images=7, seed=6), whole)
    assert torch.equal(pixels(pipeline, num_images=7, seed=5), whole)


def test_one_label_serves_all_images(pipeline: DTRPipeline):
    assert torch.equal(pixels(pipeline, 3, 2), pixels(pipeline, [3, 3]))


def test_generator_gives_other_images_at_each_call_and_the_same_when_seeded_again(pipeline: DTRPipeline):
    generator = torch.Generator().manual_seed(1)
    first, second = (pixels(pipeline, [1], generator=generator) for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(pixels(pipeline, [1], generator=generator.manual_seed(1)), first)


def test_output_types_show_the_same_images(pipeline: DTRPipeline):
    (expected,) = pixels(pipeline, [4])
    (array,) = pipeline([4], output_type="np", return_dict=False)[0]
    (picture,) = pipeline([4]).images
    assert torch.equal(torch.from_numpy(array).permute(2, 0, 1), expected)
    assert picture.mode == "L"
    np.testing.assert_array_equal(np.asarray(picture), (expected[0] * 255).round())


def test_another_scheduler_is_another_sampler(pipeline: DTRPipeline, trial: Path):
    other = build_pipeline(open_model(trial))
    other.scheduler = DPMSolverMultistepScheduler.from_config(other.scheduler.config)
    assert not torch.equal(pixels(other, [4]), pixels(pipeline, [4]))
    other.scheduler = EulerDiscreteScheduler.from_config(other.scheduler.config)
    with pytest.raises(ValueError, match="EulerDiscreteScheduler: it must be one of DDPMScheduler"):
        other([4])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_labels": [10]}, r"class label 10 is not in \[0, 10\)"),
        ({"class_labels": [-1]}, r"class label -1 is not in \[0, 10\)"),
        ({"class_labels": [1, 2], "num_images": 3}, "num_images is 3, but there are 2 class_labels"),
        ({"num_images": 0}, "num_images 0"),
        ({"guidance_scale": 0.5}, "guidance_scale is 0.5: it must be at least 1"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"num_inference_steps": 1001}, "num_steps is 1001: it must be from 1 to 1000"),
        ({"output_type": "jpg"}, "output_type is 'jpg': it must be pil, np or pt"),
    ],
)
def test_wrong_arguments_are_refused(pipeline: DTRPipeline, arguments: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        pipeline(**arguments)


def test_guidance_without_classes_is_refused():
    pipeline = build_pipeline(untrained(data__num_classes=1))
    assert len(pipeline(num_images=2).images) == 2
    with pytest.raises(ValueError, match="it needs null_label"):
        pipeline(guidance_scale=2.0)


def test_half_precision_draws_nearly_the_same():
    pipeline, half = build_pipeline(untrained()), build_pipeline(untrained()).to(torch.float16)
    assert half.transformer.dtype == torch.float16
    torch.testing.assert_close(pixels(half, num_images=2), pixels(pipeline, num_images=2), atol=0.05, rtol=0)


def test_latents_are_decoded_with_the_vae_of_the_export(tmp_path: Path):
    torch.manual_seed(0)
    blocks = ["DownEncoderBlock2D"] * 4, ["UpDecoderBlock2D"] * 4
    vae = AutoencoderKL(3, 3, *blocks, block_out_channels=(8,) * 4, latent_channels=4, norm_num_groups=4)
    vae.save_pretrained(tmp_path / "vae")
    config = {"data__resolution": 32, "data__vae": str(tmp_path / "vae"), "sampling__clip_denoised": False}
    guidance = {"sampling__guidance_scale": 4.0, "sampling__guidance_channels": "first_three"}
    trained = untrained(**config, **guidance)
    torch.nn.init.normal_(trained.model.final_layer.adaLN_modulation[1].weight, std=0.5)
    x = draw(
        trained.model,
        noise_schedule("cosine", 1000),
        trained.config.sampling,
        (4, 4, 4),
        seed=0,
        indices=torch.arange(3),
        labels=torch.arange(3),
        device=torch.device("cpu"),
    )
    expected = decode_latents(vae, x, trained.config.data.latent_scale, gray=True) / 255
    build_pipeline(trained).save_pretrained(tmp_path / "export")
    loaded = DTRPipeline.from_pretrained(tmp_path / "export")
    images = pixels(loaded, num_images=3)
    assert images.shape == (3, 1, 32, 32)
    torch.testing.assert_close(images, expected, atol=1e-5, rtol=0)
    loaded.register_to_config(guidance_channels="all")
    assert not torch.equal(pixels(loaded, num_images=3), images)
