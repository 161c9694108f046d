"""A run's folder: one configuration each, gone on with or left alone."""

from pathlib import Path

from dtr_ray.config import TrialConfig, flatten
from dtr_ray.config.errors import ConfigError
from dtr_ray.config.files import make_folder
from dtr_ray.training.state import CONFIG_FILE

# Training does not depend on these.
_MAY_CHANGE = (
    "training.num_steps",
    "training.log_every_steps",
    "training.checkpoint_every_steps",
    "evaluation.every_steps",
    "evaluation.grid_images",
)


def check_folder(folder: Path, config: TrialConfig, *, resume: bool) -> None:
    """Refuses to mix two runs in one folder; writes nothing.

    Args:
        folder: the run's.
        config: what is to be trained there.
        resume: go on with the run that is there; only its length, and how often it logs, saves and
            evaluates, may change.

    Raises:
        ValueError: the folder holds a run already (or none, with `resume`), or another one.
    """
    path = folder / CONFIG_FILE
    try:
        exists = path.exists()
    except (OSError, ValueError) as error:
        raise ConfigError(f"{str(folder)[:200]} cannot be a run's folder: {error}"[:400]) from error
    if exists and not resume:
        raise ValueError(f"{folder} holds a run already: --resume goes on, --output DIR starts another")
    if resume and not exists:
        raise ValueError(f"there is no run to resume in {folder}")
    if exists:
        before, now = flatten(TrialConfig.load(path).to_dict()), flatten(config.to_dict())
        for key in sorted(before.keys() | now.keys()):
            if before.get(key) != now.get(key) and key not in _MAY_CHANGE:
                raise ValueError(
                    f"{key} is {now.get(key)}, but {before.get(key)} in the run in {folder}: "
                    "resume it as it was started, or give another --output"
                )


def claim_folder(folder: Path, config: TrialConfig, *, resume: bool) -> None:
    """Checks as `check_folder`, makes the folder, and keeps the configuration in it."""
    check_folder(folder, config, resume=resume)
    make_folder(folder)
    config.save(folder / CONFIG_FILE)
