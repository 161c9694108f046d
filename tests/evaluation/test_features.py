"""Extractors: the weights fit, damage is ordered as one would, and Inception is clean-fid's or refused."""

import hashlib
import urllib.request
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtr_ray.config import DataConfig
from dtr_ray.data import load_images
from dtr_ray.evaluation.features import (
    Extractor,
    build_extractor,
    extract,
    inception_weights,
    load_efficientnet_lite0,
)
from dtr_ray.evaluation.metrics import frechet_distance, statistics
from dtr_ray.weights import finding as weights_module


@pytest.fixture(scope="module")
def efficientnet() -> Extractor:
    return build_extractor("efficientnet_lite0")


def test_efficientnet_recognises_photographs() -> None:
    from sklearn.datasets import load_sample_images

    pictures = [
        torch.from_numpy(i.copy()).permute(2, 0, 1).float() / 255 for i in load_sample_images().images
    ]
    x = torch.stack(
        [F.interpolate(p[None, :, :, 106:533], 224, mode="bilinear", antialias=True)[0] for p in pictures]
    )
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        logits = load_efficientnet_lite0()((x - mean[:, None, None]) / std[:, None, None])
    palace, daisy = 698, 985
    assert palace in logits[0].topk(2).indices
    assert daisy in logits[1].topk(1).indices


def test_features_do_not_depend_on_the_batch_and_gray_is_rgb(efficientnet: Extractor) -> None:
    gray = torch.randint(
        0, 256, (3, 1, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    found = efficientnet(gray)
    assert (found.shape, found.dtype) == ((3, efficientnet.num_features), torch.float32)
    torch.testing.assert_close(efficientnet(gray.expand(-1, 3, -1, -1)), found)
    one_by_one = extract(efficientnet, (image[None] for image in gray))
    assert one_by_one.dtype == torch.float64
    torch.testing.assert_close(one_by_one.float(), found, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(efficientnet(gray), found)


def test_probabilities_from_features_are_those_of_the_whole_network(efficientnet: Extractor) -> None:
    images = torch.randint(
        0, 256, (5, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        expected = load_efficientnet_lite0()((images / 255 - mean[:, None, None]) / std[:, None, None])
    found = efficientnet.probabilities(efficientnet(images))
    assert found.shape == (5, efficientnet.num_classes)
    torch.testing.assert_close(found, expected.softmax(1), rtol=1e-3, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(efficientnet.probabilities(efficientnet(images)), found)


def test_what_is_no_batch_of_images_is_refused(efficientnet: Extractor) -> None:
    for images in (torch.zeros(2, 1, 8, 8), torch.zeros(2, 4, 8, 8, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="images are uint8"):
            efficientnet(images)


@pytest.mark.slow
def test_the_distance_orders_damage(efficientnet: Extractor, shared_cache: Path) -> None:
    data = load_images(DataConfig(resolution=32), shared_cache)
    generator = torch.Generator().manual_seed(0)
    clean = data.pixels(torch.randperm(len(data), generator=generator)[:1600])
    first, second = clean.split(800)
    noise = 0.05 * 255 * torch.randn(second.shape, generator=generator)
    noisy = (second + noise).clamp(0, 255).round().to(torch.uint8)
    blurred = F.avg_pool2d(second.float(), 3, 1, 1).round().to(torch.uint8)
    reference = statistics(efficientnet(first))
    half, noise_distance, blur_distance = (
        frechet_distance(*reference, *statistics(efficientnet(images))) for images in (second, noisy, blurred)
    )
    # With all 5,000 digits: 18, 1,200, 270; fewer samples raise the first most.
    assert half < 80
    assert 3 * half < blur_distance < 400
    assert 3 * blur_distance < noise_distance < 2000


class _Layers(nn.Module):
    """Looks like Inception from outside: normalised RGB of 299 x 299 in, 2,048 features out."""

    def forward(self, x: Tensor) -> Tensor:
        pooled = F.adaptive_avg_pool2d(x, (32, 22)).flatten(1)
        return pooled[:, :2048].reshape(-1, 2048, 1, 1)


class _Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = _Layers()
        self.output = nn.Linear(2048, 1008)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.layers(x).flatten(1))


@pytest.fixture
def small_inception(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A TorchScript file of clean-fid's interface, which counts as the right one."""
    path = tmp_path / "weights" / "inception-2015-12-05.pt"
    path.parent.mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.jit.script(_Network()).save(str(path))
    monkeypatch.setattr(weights_module, "_INCEPTION_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def test_inception_features_are_clean_fids(small_inception: Path) -> None:
    from cleanfid.inception_torchscript import InceptionV3W
    from cleanfid.resize import build_resizer

    images = torch.randint(
        0, 256, (5, 3, 20, 30), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    resize = build_resizer("clean")
    resized = np.stack([resize(image.permute(1, 2, 0).numpy()) for image in images])
    theirs = InceptionV3W(str(small_inception.parent), download=False)(
        torch.from_numpy(resized).permute(0, 3, 1, 2)
    )
    extractor = build_extractor("inception", str(small_inception))
    assert (extractor.name, extractor.num_features) == ("inception", 2048)
    torch.testing.assert_close(extractor(images), theirs)
    gray = images[:, :1]
    torch.testing.assert_close(extractor(gray), extractor(gray.expand(-1, 3, -1, -1)))


def test_inceptions_classes_come_from_its_last_layer_without_the_bias(small_inception: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        output = torch.jit.load(str(small_inception)).output
    extractor = build_extractor("inception", str(small_inception))
    features = torch.randn(7, 2048, generator=torch.Generator().manual_seed(0))
    found = extractor.probabilities(features)
    assert found.shape == (7, extractor.num_classes) == (7, 1008)
    torch.testing.assert_close(found, (features @ output.weight.T).softmax(1))
    assert not torch.allclose(found, output(features).softmax(1))


def test_inception_is_downloaded_once_into_the_cache(
    small_inception: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DTR_RAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("DTR_RAY_MIRROR", small_inception.parent.as_uri())
    path = inception_weights()
    assert path == tmp_path / "cache" / small_inception.name
    assert path.read_bytes() == small_inception.read_bytes()
    small_inception.unlink()
    assert inception_weights() == path


def test_a_download_that_is_not_clean_fids_file_is_thrown_away(
    small_inception: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DTR_RAY_CACHE", str(tmp_path / "cache"))
    small_inception.write_bytes(b"<html>not found</html>")
    monkeypatch.setenv("DTR_RAY_MIRROR", small_inception.parent.as_uri())
    with pytest.raises(ValueError, match=r"cannot be fetched from file://.* sends has the SHA-256"):
        inception_weights()
    assert not list((tmp_path / "cache").glob("*.pt"))


def test_offline_the_error_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setenv("DTR_RAY_CACHE", str(tmp_path))
    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    with pytest.raises(ValueError, match=r"https://.*inception-2015.*no route.*efficientnet_lite0"):
        build_extractor("inception")


def test_weights_that_are_missing_wrong_or_of_no_use_are_refused(tmp_path: Path) -> None:
    other = tmp_path / "other.pt"
    other.write_bytes(b"something else")
    cases = [
        ("inception", str(tmp_path / "missing.pt"), r"missing\.pt is no file"),
        ("inception", str(other), r"other\.pt is not clean-fid's Inception \(it has the SHA-256"),
        ("efficientnet_lite0", str(other), "brings its own"),
        ("resnet", None, "unknown features 'resnet'"),
    ]
    for name, weights, message in cases:
        with pytest.raises(ValueError, match=message):
            build_extractor(name, weights)
