"""ImageData: labelled images of one size, and what the model sees of them.

Shapes: N images, B batch, C channels, H = W = resolution.
"""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dtr_ray.data.captions import Captions
from dtr_ray.data.rows import Rows


class References(NamedTuple):
    """What an extractor has found of a data set's images: files as `evaluation.references` writes them."""

    statistics: Path
    features: Path


class ImageData:
    """Images in memory or in read-only memory maps; the model sees pixels in [-1, 1].

    Attributes:
        labels: int64 (N,), in [0, num_classes); all 0 for unconditional data.
        num_classes: number of classes; 1 is unconditional.
        identity: name, resolution and content hash of the pixels, to key caches by.
        captions: what the images are called, where text conditions the model; None otherwise.
        references: what was made of the images beforehand, by the extractor's name.
        num_channels: channels of the pixels: 1 for gray, 3 for RGB.
    """

    captions: Captions | None = None
    references: Mapping[str, References] = MappingProxyType({})

    def __init__(
        self, pixels: np.ndarray | Rows | None, labels: Tensor, num_classes: int, identity: str
    ) -> None:
        """Pixels uint8 (N, C, H, W), or None where those of RGB images are not kept."""
        if isinstance(pixels, np.ndarray):
            pixels = Rows.of_array(pixels)
        if pixels is not None:
            assert pixels.dtype == np.uint8
            assert pixels.shape[:1] == labels.shape
        self._pixels = pixels
        self.labels = labels.to(torch.int64)
        self.num_classes = num_classes
        self.identity = identity
        self.num_channels = 3 if pixels is None else pixels.shape[1]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def has_pixels(self) -> bool:
        """Whether `pixels` can be asked for."""
        return self._pixels is not None

    def pixels(self, indices: Tensor) -> Tensor:
        """The images of the given indices, int64 (B,), as uint8 (B, C, H, W).

        Raises:
            ValueError: the images' latents alone are kept.
        """
        if self._pixels is None:
            raise ValueError(f"the data {self.identity} keeps latents alone: there are no pixels to look at")
        return torch.from_numpy(self._pixels.take(indices.numpy()))

    def batch(
        self, indices: Tensor, flip: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """What the model sees of the given images: float32 (B, C, H, W), pixels in [-1, 1].

        Args:
            indices: int64 (B,).
            flip: bool (B,), which images to mirror left to right; default: none.
            generator: a CPU generator for data that is itself random (latents); pixels draw nothing.
        """
        x = self.pixels(indices).float() / 127.5 - 1
        return x if flip is None else torch.where(flip[:, None, None, None], x.flip(-1), x)

    def to_pixels(self, x: Tensor) -> Tensor:
        """The way back: float (B, C, H, W), clamped to [-1, 1], to uint8 (B, C, H, W) on the same device."""
        return quantise(x)


def quantise(x: Tensor) -> Tensor:
    """Pixels in [-1, 1], clamped and rounded to uint8."""
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
