"""ImageData: labelled images of one size, and what the model sees of them.

Shapes: N images, B batch, C channels, H = W = resolution.
"""

import numpy as np
import torch
from torch import Tensor

from dtr_ray.data.captions import Captions


class ImageData:
    """Images in memory or in a read-only memory map; the model sees pixels in [-1, 1].

    Attributes:
        labels: int64 (N,), in [0, num_classes); all 0 for unconditional data.
        num_classes: number of classes; 1 is unconditional.
        identity: name, resolution and content hash of the pixels, to key caches by.
        captions: what the images are called, where text conditions the model; None otherwise.
    """

    captions: Captions | None = None

    def __init__(self, pixels: np.ndarray, labels: Tensor, num_classes: int, identity: str) -> None:
        assert pixels.dtype == np.uint8
        assert pixels.shape[:1] == labels.shape
        self._pixels = pixels
        self.labels = labels.to(torch.int64)
        self.num_classes = num_classes
        self.identity = identity

    def __len__(self) -> int:
        return len(self._pixels)

    @property
    def num_channels(self) -> int:
        """Channels of the pixels: 1 for gray, 3 for RGB."""
        return int(self._pixels.shape[1])

    def pixels(self, indices: Tensor) -> Tensor:
        """The images of the given indices, int64 (B,), as uint8 (B, C, H, W)."""
        return torch.from_numpy(np.array(self._pixels[indices.numpy()]))

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
