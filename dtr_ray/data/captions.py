"""Captions of the images, encoded once and shared by all processes.

N images, B batch, U different captions, L = 77 tokens, D channels of a token.
"""

import hashlib
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dtr_ray.cache import build_once, write_npy
from dtr_ray.config import DataConfig
from dtr_ray.config.data import TEXT_TOKENS
from dtr_ray.data.manifest import caption_names
from dtr_ray.data.rows import Rows
from dtr_ray.data.text import TextEncoder, load_text_encoder

_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_TEMPLATES = ("a handwritten {}", "the digit {} in white on black", "a photo of the number {}", "{}")
_CHUNK_CAPTIONS = 64

_log = logging.getLogger(__name__)


class Captions:
    """The captions of N images: their texts, and the tokens of each text in a read-only memory map.

    Captions go by number: 0 is the empty one, which stands for no caption.
    """

    def __init__(self, texts: Sequence[Sequence[str]], tokens: Rows, names: Sequence[str]) -> None:
        """Texts of each image; tokens float16 (U, L, D) of the different `names`, the empty one first."""
        numbers = {name: number for number, name in enumerate(names)}
        self._tokens = tokens
        self._names = names
        self._numbers = torch.tensor([numbers[text] for own in texts for text in own])
        self._counts = torch.tensor([len(own) for own in texts])
        self._starts = self._counts.cumsum(0) - self._counts

    def drawn(self, indices: Tensor, draws: Tensor) -> Tensor:
        """Number of one caption of each of the given images, int64 (B,).

        Args:
            indices: int64 (B,), images.
            draws: float (B,), uniform in [0, 1): which of its captions.
        """
        counts = self._counts[indices]
        chosen = (draws.double() * counts).long()
        return self._numbers[self._starts[indices] + chosen]

    def of_samples(self, indices: Tensor) -> Tensor:
        """Number of the caption that a sample of the given number has in evaluation, int64 (B,).

        It is the first of the sample's image, see `sample_images`.
        """
        return self._numbers[self._starts[sample_images(indices, len(self._starts))]]

    def texts(self, numbers: Tensor) -> list[str]:
        """The captions of the given numbers in words."""
        return [self._names[number] for number in numbers.tolist()]

    def tokens(self, numbers: Tensor) -> Tensor:
        """The tokens of the captions of the given numbers, float16 (B, L, D), on the CPU."""
        return torch.from_numpy(self._tokens.take(numbers.numpy()))


def sample_images(indices: Tensor, num_images: int) -> Tensor:
    """The image whose caption a sample of the given number has in evaluation, int64 (B,), in [0, N).

    Samples run through the images in strides that are prime to N: N samples use each image once, and a
    few have captions from all over the data.
    """
    stride = max(1, round(num_images * (math.sqrt(5) - 1) / 2))
    while math.gcd(stride, num_images) != 1:
        stride += 1
    return (indices * stride) % num_images


def digit_captions(labels: Tensor) -> list[list[str]]:
    """What a digit's picture may be called, for labels int64 (N,) in [0, 10); "a handwritten ..." first."""
    of_digit = [[template.format(digit) for template in _TEMPLATES] for digit in _DIGITS]
    return [of_digit[label] for label in labels.tolist()]


def load_captions(config: DataConfig, texts: list[list[str]], cache_dir: Path) -> Captions:
    """Captions of each image with their tokens, encoded where they are not cached yet.

    The cache takes 118 KB for each different caption with CLIP ViT-L/14 (49 GB for MS-COCO's 414,000).

    Args:
        config: names the encoder.
        texts: the captions of each image, at least one.
        cache_dir: where tokens are kept; processes may share it.

    Raises:
        ValueError: the encoder cannot be loaded, or makes tokens of other channels.
    """
    encoder = load_text_encoder(config)
    names = caption_names(texts)
    digest = hashlib.sha256("\n".join(names).encode("utf-8", "surrogatepass")).hexdigest()[:16]
    path = cache_dir / f"captions-{digest}-{encoder.digest()}.npy"
    build_once(path, lambda temporary: _encode_all(names, encoder, config.text_channels, temporary))
    return Captions(texts, Rows.of_file(path), names)


def _encode_all(names: list[str], encoder: TextEncoder, channels: int, path: Path) -> None:
    """Writes the tokens of all captions, float16 (U, L, D)."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    _log.info("encoding %d captions on %s, once", len(names), device)
    cut = [name for name in names if encoder.is_cut(name)]
    if cut:
        _log.warning("%d captions are cut after %d tokens, such as %r", len(cut), TEXT_TOKENS, cut[0])
    encoder.model.to(device)

    def chunks() -> Iterator[np.ndarray]:
        for start in range(0, len(names), _CHUNK_CAPTIONS):
            yield encoder.encode(names[start : start + _CHUNK_CAPTIONS]).cpu().numpy()

    with torch.no_grad():
        write_npy(path, (len(names), TEXT_TOKENS, channels), np.float16, chunks())
