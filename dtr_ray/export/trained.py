"""Trained models, opened from whatever folder holds one."""

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from dtr_ray.cache import cache_dir
from dtr_ray.config import TrialConfig
from dtr_ray.config.files import inside, needed, read_json
from dtr_ray.data.images import sample_captions
from dtr_ray.data.latents import load_vae
from dtr_ray.data.text import load_text_encoder
from dtr_ray.export.model import EXPORTED, DTRModel
from dtr_ray.export.pipeline import SCHEDULERS, DTRPipeline
from dtr_ray.models import load_weights
from dtr_ray.training.checksums import MANIFEST_FILE, find_damage
from dtr_ray.training.state import CONFIG_FILE, EMA_FILE, TRAINING_FILE, latest_checkpoint

INDEX_FILE = "model_index.json"
EXPORT_FOLDER = "model"
"""Name of the export within a folder of `train_best`."""


@dataclass(frozen=True)
class TrainedModel:
    """A model with its averaged weights, and the configuration that it was trained with."""

    config: TrialConfig
    model: DTRModel
    """In evaluation mode, float32."""
    folder: Path
    """The checkpoint or export that it was read from."""


def find_model(path: Path) -> Path:
    """The folder with the weights that `path` stands for.

    Args:
        path: an export or a checkpoint; a trial's folder (its best checkpoint), a sweep's (that of its best
            trial), or one of `train_best` (its export).

    Raises:
        ValueError: it is none of these.
    """
    if (path / INDEX_FILE).is_file() or (path / EMA_FILE).is_file():
        return path
    if (path / EXPORT_FOLDER / INDEX_FILE).is_file():
        return path / EXPORT_FOLDER
    best = path / "best.json"
    if best.is_file():
        found = read_json(best)
        needed(found, {"step": int}, str(best))
        # A sweep's tells the place, a trial's the step.
        place = str(found.get("checkpoint") or f"checkpoints/{found['step']:08d}")
        folder = inside(path, place, best)
        if (folder / EMA_FILE).is_file():
            return folder
    newest = latest_checkpoint(path)
    if newest is not None:
        return newest
    what = "holds no trained model" if path.is_dir() else "is not a folder"
    if (path / MANIFEST_FILE).is_file() or (path / TRAINING_FILE).is_file():
        what = f"is a damaged checkpoint: it has no {EMA_FILE}"
    raise ValueError(f"{path} {what}: give a checkpoint, an export, or the folder of a trial or sweep")


def read_config(folder: Path) -> TrialConfig:
    """The configuration of the model in a folder that `find_model` found.

    Raises:
        ValueError: it has none, or one that cannot be read.
    """
    if not (folder / CONFIG_FILE).is_file():
        raise ValueError(f"{folder} has no {CONFIG_FILE}, the configuration that its model was trained with")
    return TrialConfig.load(folder / CONFIG_FILE)


def open_model(path: Path, device: torch.device | str = "cpu") -> TrainedModel:
    """Reads a model from any folder that `find_model` knows.

    Raises:
        ValueError: there is no model, it is damaged, or its weights do not fit its configuration.
    """
    folder = find_model(path)
    exported = (folder / INDEX_FILE).is_file()
    # Of a checkpoint, that which is read below.
    _check_whole(folder, None if exported else (EMA_FILE, TRAINING_FILE, CONFIG_FILE))
    config = read_config(folder)
    if exported:
        model = _read_export(folder / "transformer", EXPORTED[config.model.family])
    else:
        model = DTRModel.from_trial(config, _steps_done(folder))
        load_weights(model, folder / EMA_FILE)
    return TrainedModel(config, model.to(device).eval().requires_grad_(False), folder)


def _check_whole(folder: Path, names: Sequence[str] | None) -> None:
    """Raises ValueError where a file is not as it was written; folders from before checksums have none."""
    if not (folder / MANIFEST_FILE).exists() and not (folder / MANIFEST_FILE).is_symlink():
        return
    damage = find_damage(folder, names)
    if damage is not None:
        raise ValueError(
            f"{folder} is damaged: {damage}. Copy it again from where it is whole, or take another checkpoint"
            f" (where you changed it yourself, remove its {MANIFEST_FILE})"
        )


def _read_export(folder: Path, kind: Any) -> DTRModel:
    """The network of an export; raises ValueError where it cannot be read."""
    try:
        model: DTRModel = kind.from_pretrained(folder, low_cpu_mem_usage=False, use_safetensors=True)
    # What diffusers lets through for a broken configuration or broken weights.
    except (OSError, RuntimeError, ValueError, TypeError, AttributeError, KeyError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"the export {folder} cannot be read: {type(error).__name__}: {reason}") from error
    return model


def _steps_done(checkpoint: Path) -> int:
    """Training steps behind a checkpoint; 0 for released weights, which come without."""
    file = checkpoint / TRAINING_FILE
    if not file.is_file():
        return 0
    try:
        # Mapped: the optimizer's state in the file is not read.
        step = torch.load(file, map_location="cpu", weights_only=True, mmap=True)["step"]
    except (
        pickle.UnpicklingError,
        OSError,
        RuntimeError,
        EOFError,
        KeyError,
        TypeError,
        ValueError,
    ) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{file} is damaged, or not written by training: {reason}") from error
    if type(step) is not int:
        raise ValueError(f"{file} is not written by training: its step is {step!r:.80}")
    return step


def build_pipeline(trained: TrainedModel, prompts: Sequence[str] | None = None) -> DTRPipeline:
    """The pipeline that draws what evaluation drew, with VAE and text encoder where the model needs them.

    Args:
        trained: the model.
        prompts: what a model of captions draws where it is not told; default: the captions that evaluation
            took from the data.

    Raises:
        ValueError: VAE, text encoder or captions are not where the configuration says.
    """
    config = trained.config
    schedule = {"linear": "linear"}.get(config.diffusion.schedule, "squaredcos_cap_v2")
    num_timesteps, sampler = config.diffusion.num_timesteps, config.sampling.sampler
    settings = {"num_train_timesteps": num_timesteps, "beta_schedule": schedule, "prediction_type": "epsilon"}
    if schedule == "linear":
        settings |= {"beta_start": 0.1 / num_timesteps, "beta_end": 20 / num_timesteps}
    if sampler == "ddpm":
        settings["variance_type"] = config.diffusion.variance
    if sampler != "dpm_solver++":
        settings["clip_sample"] = config.sampling.clip_denoised
    pipeline = DTRPipeline(
        trained.model,
        SCHEDULERS[sampler](**settings),
        None if config.data.vae is None else load_vae(config.data).to(trained.model.device),
        num_inference_steps=config.sampling.num_steps,
        guidance_scale=config.sampling.guidance_scale,
        guidance_channels=config.sampling.guidance_channels,
        clip_denoised=config.sampling.clip_denoised,
        precision=config.training.precision,
        seed=config.evaluation.seed,
        latent_scale=config.data.latent_scale,
        gray=config.data.path is None,
        **_text_parts(trained, prompts),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _text_parts(trained: TrainedModel, prompts: Sequence[str] | None) -> dict[str, Any]:
    """What a pipeline needs for captions; nothing where the model is of classes. An export brings its own."""
    config, index = trained.config, trained.folder / INDEX_FILE
    if config.data.text_encoder is None:
        return {}
    exported = index.is_file()
    encoder = load_text_encoder(config.data, trained.folder if exported else None)
    if prompts is None and exported:
        prompts = read_json(index)["prompts"]
    if prompts is None:
        count = min(config.evaluation.grid_images, config.evaluation.num_samples)
        prompts = sample_captions(config.data, count, cache_dir())
    return {
        "text_encoder": encoder.model.to(trained.model.device),
        "tokenizer": encoder.tokenizer,
        "prompts": list(prompts),
    }
