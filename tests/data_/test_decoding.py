"""Decoding: the same pixels from a file, its bytes and an image; nothing damaged or too large passes."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from dtr_ray.data.decoding import decode


def _encoded(kind: str, size: tuple[int, int] = (40, 24)) -> bytes:
    random = np.random.default_rng(0)
    file = io.BytesIO()
    Image.fromarray(random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP"])
def test_files_bytes_and_images_decode_alike(kind: str, tmp_path: Path) -> None:
    data = _encoded(kind)
    (tmp_path / "x").write_bytes(data)
    expected = decode(data, 16, "x")
    assert (expected.shape, expected.dtype) == ((3, 16, 16), np.uint8)
    with Image.open(io.BytesIO(data)) as image:
        for other in (tmp_path / "x", image):
            assert np.array_equal(decode(other, 16, "x"), expected)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF"])
def test_a_cut_file_is_refused_wherever_it_is_cut(kind: str) -> None:
    data = _encoded(kind)
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    for share in (0, 0.01, 0.3, 0.9, 0.97):
        with pytest.raises(ValueError, match=r"^a/b\.img cannot be read as an image: .*"):
            decode(data[: int(share * len(data))], 16, "a/b.img")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("limit", [24 * 40 - 1, 24 * 40 // 2 - 1, 1])
def test_decompression_bombs_are_refused_where_pillow_only_warns(
    limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = _encoded("PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(ValueError, match=r"bomb\.png cannot be read as an image: .*(960|40 x 24) pixels"):
        decode(data, 16, "bomb.png")
