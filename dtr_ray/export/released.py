"""import_checkpoint: released weights as a checkpoint of ours, for sampling, evaluation and export."""

import shutil
from pathlib import Path

from safetensors.torch import save_file

from dtr_ray.config import TrialConfig
from dtr_ray.models import build_model, load_weights
from dtr_ray.training.checksums import write_checksums
from dtr_ray.training.state import CONFIG_FILE, EMA_FILE


def import_checkpoint(file: Path, trial: TrialConfig, folder: Path) -> Path:
    """Writes a folder that `sample`, `evaluate` and `export_model` take, from a file of released weights.

    Training cannot go on from it: the optimizer's state is left behind.

    Args:
        file: weights of an official DiT, or a training file of DTR or Switch-DiT, of which the averaged
            weights are taken; see `load_weights`.
        trial: what the weights were trained as (model, routing, data with the VAE, diffusion), and how they
            are to be sampled and evaluated. For official DiT: `routing: {name: none}`, `diffusion:
            {schedule: linear}`, and `sampling: {guidance_channels: first_three}` for the published samples.
        folder: new; it appears whole or not at all.

    Returns:
        `folder`.

    Raises:
        ValueError: `folder` is there already, or the weights do not fit the trial's model.
    """
    if folder.exists():
        raise ValueError(f"{folder} is there already: give a new folder")
    model = build_model(trial.resolved_model, trial.routing, trial.diffusion.num_timesteps)
    load_weights(model, file)
    temporary = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file(model.state_dict(), temporary / EMA_FILE)
    trial.save(temporary / CONFIG_FILE)
    write_checksums(temporary)
    temporary.rename(folder)
    return folder
