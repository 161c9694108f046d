"""Prepared folders made in a moment, of content that the test knows."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dtr_ray.config import DataConfig
from dtr_ray.config.data import TEXT_TOKENS
from dtr_ray.data.latents import vae_digest
from dtr_ray.data.manifest import (
    CAPTIONS,
    LABELS,
    TOKENS,
    FileEntry,
    Manifest,
    ReferenceEntry,
    ShardEntry,
    SourceEntry,
    TextEntry,
    VaeEntry,
    caption_names,
)
from dtr_ray.evaluation.features import build_extractor
from dtr_ray.evaluation.references import kept_images, write_statistics


def save_vae(folder: Path) -> Path:
    """A diffusers AutoencoderKL of four levels, 8 x 8 pixels to a latent, with random weights."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 8, 8),
        norm_num_groups=2,
        latent_channels=4,
        sample_size=32,
    )
    vae.save_pretrained(folder)
    return folder


class FolderWriter:
    """Writes shards of given sizes: `FolderWriter(path, [5, 3]).pixels(x).latents(x, vae).write()`."""

    def __init__(
        self, folder: Path, counts: Sequence[int], resolution: int = 32, num_classes: int = 1
    ) -> None:
        self.folder, self.counts, self.resolution, self.num_classes = folder, counts, resolution, num_classes
        self.total = sum(counts)
        self.labels = np.arange(self.total) % num_classes
        self.entries: list[dict[str, Any]] = [{"num_images": count} for count in counts]
        self.vae: VaeEntry | None = None
        self.text: TextEntry | None = None
        self.references: dict[str, ReferenceEntry] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def pixels(self, pixels: np.ndarray) -> "FolderWriter":
        """uint8 (N, 3, H, W)."""
        return self._shards("pixels", pixels)

    def latents(self, latents: np.ndarray, vae: Path, scale: float = 0.5) -> "FolderWriter":
        """(N, 1 or 2, 2, C, h, w) of a VAE that is on disk."""
        from diffusers import AutoencoderKL

        self.vae = VaeEntry(
            name=str(vae),
            digest=vae_digest(AutoencoderKL.from_pretrained(vae).float()),
            scale=scale,
            dtype=str(latents.dtype),
            shape=list(latents.shape[3:]),
            flip=latents.shape[1] == 2,
        )
        return self._shards("latents", latents)

    def captions(self, texts: list[list[str]], encoder: str, tokens: np.ndarray) -> "FolderWriter":
        """Texts of each image; float16 (U, 77, D), in the order of `caption_names`."""
        import json

        assert tokens.shape[:2] == (len(caption_names(texts)), TEXT_TOKENS)
        (self.folder / CAPTIONS).write_text(json.dumps(texts))
        np.save(self.folder / TOKENS, tokens)
        self.text = TextEntry(name=encoder, digest="0", channels=tokens.shape[2], num_captions=len(tokens))
        return self

    def reference(self, pixels: np.ndarray, name: str = "efficientnet_lite0") -> "FolderWriter":
        """Statistics and features of the images, made as `prepare` makes them."""
        extractor = build_extractor(name, None, "cpu")
        return self.reference_of(extractor(torch.from_numpy(pixels)).numpy(), name)

    def reference_of(self, features: np.ndarray, name: str = "efficientnet_lite0") -> "FolderWriter":
        """Statistics and features (n, D), of all images or of some."""
        folder = self.folder / "references"
        folder.mkdir(exist_ok=True)
        chosen = kept_images(len(features)).numpy()
        paths = f"references/{name}.npz", f"references/{name}-features-{len(chosen)}.npy"
        write_statistics(iter([features.astype(np.float64)]), len(features), self.folder / paths[0])
        np.save(self.folder / paths[1], features[chosen])
        self.references[name] = ReferenceEntry(
            digest="0",
            num_features=features.shape[1],
            statistics=paths[0],
            features=paths[1],
            num_kept=len(chosen),
        )
        return self

    def write(self, *, checksums: bool = True) -> Path:
        """Labels, and the manifest at the end."""
        np.save(self.folder / LABELS, self.labels)
        files = {}
        for path in sorted(path for path in self.folder.rglob("*") if path.is_file()):
            name, content = path.relative_to(self.folder).as_posix(), path.read_bytes() if checksums else b""
            digest = hashlib.sha256(content).hexdigest()
            files[name] = FileEntry(sha256=digest, num_bytes=path.stat().st_size)
        Manifest(
            name=self.folder.name,
            identity=f"prepared-{self.resolution}-{self.folder.name}",
            resolution=self.resolution,
            num_images=self.total,
            num_classes=self.num_classes,
            class_names=[],
            class_counts=np.bincount(self.labels, minlength=self.num_classes).tolist(),
            num_enlarged=0,
            source=SourceEntry(digest="0", num_images=self.total),
            vae=self.vae,
            text_encoder=self.text,
            shards=[ShardEntry(**entry) for entry in self.entries],
            references=self.references,
            skipped=[],
            files=files,
            config={},
        ).write(self.folder)
        return self.folder

    def data(self, **changes: Any) -> dict[str, Any]:
        """The `data` section that goes with the folder."""
        section: dict[str, Any] = {
            "name": "prepared",
            "path": str(self.folder),
            "resolution": self.resolution,
        }
        if self.text is not None:
            section |= {"text_encoder": self.text.name, "text_channels": self.text.channels}
        else:
            section["num_classes"] = self.num_classes
        if self.vae is not None:
            section |= {"vae": self.vae.name, "latent_scale": self.vae.scale}
        return section | changes

    def config(self, **changes: Any) -> DataConfig:
        return DataConfig.from_dict(self.data(**changes))

    def _shards(self, kind: str, values: np.ndarray) -> "FolderWriter":
        (self.folder / kind).mkdir(exist_ok=True)
        parts = np.split(values, np.cumsum(self.counts)[:-1])
        for number, (entry, part) in enumerate(zip(self.entries, parts, strict=True)):
            entry[kind] = f"{kind}/{number:05d}.npy"
            np.save(self.folder / entry[kind], part)
        return self
