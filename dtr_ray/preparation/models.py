"""Models: the networks that images pass through, loaded once a process."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dtr_ray.config.prepare import PrepareConfig
from dtr_ray.data.latents import load_vae, vae_digest
from dtr_ray.data.text import TextEncoder, load_text_encoder
from dtr_ray.evaluation.features import Extractor, Inception, build_extractor
from dtr_ray.preparation.files import write_json
from dtr_ray.preparation.job import Job


@dataclass(frozen=True)
class Models:
    """What a configuration asks for, on one device."""

    device: torch.device
    vae: Any
    """diffusers' AutoencoderKL, or None."""
    extractors: list[Extractor]
    text_encoder: TextEncoder | None

    @classmethod
    def load(cls, config: PrepareConfig, device: torch.device | str) -> "Models":
        """Loads them all; raises ValueError where one cannot be had or does not fit the configuration."""
        device = torch.device(device)
        data = config.data(config.output, 1)
        vae = None if config.vae is None else load_vae(data).to(device)
        text = None if config.text_encoder is None else load_text_encoder(data)
        if text is not None:
            text.model.to(device)
        names = dict.fromkeys(config.features)
        extractors = [
            build_extractor(name, config.feature_weights if name == Inception.name else None, device)
            for name in names
        ]
        return cls(device, vae, extractors, text)

    def digests(self) -> dict[str, str]:
        """Hashes of the weights, by the keys and names of the configuration."""
        found = {extractor.name: _digest(extractor.weights()) for extractor in self.extractors}
        if self.vae is not None:
            found["vae"] = vae_digest(self.vae)
        if self.text_encoder is not None:
            found["text_encoder"] = self.text_encoder.digest()
        return found


def keep_digests(job: Job, found: dict[str, str]) -> None:
    """Notes the models' digests with a job, or compares them with those that its first shards were made by.

    Raises:
        ValueError: weights have changed since.
    """
    if not job.digests_file.exists():
        write_json(job.digests_file, found)
        return
    before = read_digests(job)
    other = [key for key in found if before.get(key) != found[key]]
    if other:
        raise ValueError(
            f"{job.folder} was begun with other weights of {', '.join(other)}: choose another name "
            "(--set name=...), or remove the folder"
        )


def read_digests(job: Job) -> dict[str, str]:
    """What `keep_digests` has noted."""
    found: dict[str, str] = json.loads(job.digests_file.read_text(encoding="utf-8"))
    return found


def _digest(weights: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        digest.update(name.encode())
        digest.update(weight.cpu().contiguous().numpy().data)
    return digest.hexdigest()[:16]
