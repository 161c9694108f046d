"""What is made of all shards together: references as evaluation makes them, an identity of the pixels."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_preparations import job_of, prepare_config, prepare_here, write_digits

from dtr_ray.data import load_images
from dtr_ray.data.manifest import Manifest
from dtr_ray.evaluation import references
from dtr_ray.evaluation.features import build_extractor
from dtr_ray.evaluation.references import reference_features, reference_statistics
from dtr_ray.preparation.finish import gather

FEATURES = ["efficientnet_lite0"]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory, shared_cache: Path) -> Path:
    """500 digits: two whole batches of what extracts features."""
    folder = tmp_path_factory.mktemp("digits")
    write_digits(folder, 500)
    return folder


@pytest.fixture(scope="module")
def prepared(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("prepared")
    prepare_here(prepare_config(digits, output, features=FEATURES, shard_images=130))
    return output / "tiny"


def test_references_are_those_that_evaluation_makes_of_the_same_images(
    prepared: Path, tmp_path: Path
) -> None:
    manifest = Manifest.read(prepared)
    config = prepare_config(prepared, tmp_path).data(str(prepared), 10)
    data, extractor = load_images(config, tmp_path), build_extractor("efficientnet_lite0")
    data.references = {}
    expected = reference_statistics(data, extractor, tmp_path)
    entry = manifest.references["efficientnet_lite0"]
    with np.load(prepared / entry.statistics) as found:
        assert sorted(found.files) == ["mu", "num_images", "root", "sigma"]
        for name in ("mu", "sigma", "root"):
            np.testing.assert_allclose(
                found[name], getattr(expected, name), rtol=1e-10, atol=1e-10 * np.abs(found[name]).max()
            )
        assert int(found["num_images"]) == 500
    features = np.load(prepared / entry.features)
    np.testing.assert_array_equal(features, reference_features(data, extractor, tmp_path))
    assert (features.shape, entry.num_kept, entry.num_features) == ((500, 1280), 500, 1280)


def test_of_many_images_the_features_of_some_are_kept_by_evaluations_rule(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(references, "MAX_FEATURES", 90)
    manifest = prepare_here(prepare_config(digits, tmp_path, features=FEATURES, shard_images=260))
    entry = manifest.references["efficientnet_lite0"]
    assert (entry.num_kept, entry.features) == (90, "references/efficientnet_lite0-features-90.npy")
    data = load_images(prepare_config(digits, tmp_path).data(str(tmp_path / "tiny"), 10), tmp_path)
    chosen = references.kept_images(500)
    assert len(chosen) == 90
    expected = build_extractor("efficientnet_lite0")(data.pixels(chosen)).numpy()
    np.testing.assert_allclose(np.load(tmp_path / "tiny" / entry.features), expected, rtol=0, atol=1e-4)


def test_the_identity_is_of_the_pixels_whatever_the_shards(
    digits: Path, prepared: Path, tmp_path: Path
) -> None:
    manifest = Manifest.read(prepared)
    other = prepare_here(prepare_config(digits, tmp_path, name="other", shard_images=77, num_classes=1))
    assert manifest.identity == other.identity
    assert manifest.identity.startswith("prepared-16-")
    smaller = prepare_here(prepare_config(digits, tmp_path, name="smaller", resolution=8))
    assert smaller.identity.removeprefix("prepared-8-") != manifest.identity.removeprefix("prepared-16-")
    next(digits.rglob("0*.png")).unlink()
    fewer = prepare_here(prepare_config(digits, tmp_path, name="fewer"))
    assert fewer.identity != manifest.identity


def test_all_files_are_in_the_manifest_with_checksums_that_hold(prepared: Path) -> None:
    manifest = Manifest.read(prepared)
    found = {p.relative_to(prepared).as_posix() for p in prepared.rglob("*") if p.is_file()}
    assert found - {"manifest.json"} == set(manifest.files)
    assert manifest.broken_files(prepared) == []
    assert np.load(prepared / "labels.npy").dtype == np.int64


def test_a_source_without_a_readable_image_is_an_error(tmp_path: Path) -> None:
    write_digits(tmp_path / "digits", 1, num_corrupt=4)
    config = prepare_config(tmp_path / "digits", tmp_path)
    with pytest.raises(ValueError, match="1 images could be read; 2 are the least"):
        prepare_here(config)
    with pytest.raises(ValueError, match="1 images could be read"):
        gather(job_of(config))


def test_weights_are_told_apart() -> None:
    from dtr_ray.config import PrepareConfig
    from dtr_ray.preparation.models import Models

    config = PrepareConfig.from_dict(
        {"name": "x", "source": {"type": "folder", "path": "x"}, "features": FEATURES}
    )
    models = Models.load(config, "cpu")
    before = models.digests()
    assert list(before) == FEATURES
    with torch.no_grad():
        next(iter(models.extractors[0].weights().values())).add_(1)
    assert models.digests() != before
