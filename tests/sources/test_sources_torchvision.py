"""torchvision's data sets, from small files in their true formats, whose checksums torchvision is told."""

import multiprocessing
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from source_writers import config_of, md5

from dtr_ray.config.prepare import SourceConfig
from dtr_ray.data.decoding import decode
from dtr_ray.sources import Source, open_source

COUNT = 7
RANDOM = np.random.default_rng(0)
CLASSES = {
    "MNIST": 10,
    "FashionMNIST": 10,
    "CIFAR10": 10,
    "CIFAR100": 100,
    "SVHN": 10,
    "STL10": 10,
    "Flowers102": 102,
}

Written = tuple[np.ndarray, list[int]]
"""Pixels uint8 (N, C, H, W) and labels."""


def _pixels(size: int, channels: int = 3) -> np.ndarray:
    return RANDOM.integers(0, 256, (COUNT, channels, size, size), dtype=np.uint8)


def _labels(classes: int) -> list[int]:
    return [0, classes - 1, *RANDOM.integers(0, classes, COUNT - 2).tolist()]


def _mnist(name: str) -> Callable[[Path, pytest.MonkeyPatch], Written]:
    def write(root: Path, patch: pytest.MonkeyPatch) -> Written:
        folder = root / name / "raw"
        folder.mkdir(parents=True)
        pixels, labels = _pixels(28, 1), _labels(10)
        for part in ("t10k", "train"):
            head = struct.pack(">iiii", 2051, COUNT, 28, 28)
            (folder / f"{part}-images-idx3-ubyte").write_bytes(head + pixels.tobytes())
            head = struct.pack(">ii", 2049, COUNT)
            (folder / f"{part}-labels-idx1-ubyte").write_bytes(head + bytes(labels))
        return pixels, labels

    return write


def _cifar(root: Path, patch: pytest.MonkeyPatch, name: str, place: str, key: str, classes: int) -> Written:
    from torchvision import datasets

    kind = getattr(datasets, name)
    folder = root / place
    folder.mkdir()
    pixels, labels = _pixels(32), _labels(classes)
    parts = np.array_split(np.arange(COUNT), len(kind.train_list))
    for (file, _), part in zip(kind.train_list + kind.test_list, [*parts, parts[0]], strict=True):
        batch = {"data": pixels[part].reshape(len(part), -1), key: [labels[i] for i in part]}
        (folder / file).write_bytes(pickle.dumps(batch))
    names = [f"class {i}" for i in range(classes)]
    (folder / kind.meta["filename"]).write_bytes(pickle.dumps({kind.meta["key"]: names}))
    for files in ("train_list", "test_list"):
        patch.setattr(kind, files, [[file, md5(folder / file)] for file, _ in getattr(kind, files)])
    patch.setattr(kind, "meta", {**kind.meta, "md5": md5(folder / kind.meta["filename"])})
    return pixels, labels


def _cifar10(root: Path, patch: pytest.MonkeyPatch) -> Written:
    return _cifar(root, patch, "CIFAR10", "cifar-10-batches-py", "labels", 10)


def _cifar100(root: Path, patch: pytest.MonkeyPatch) -> Written:
    return _cifar(root, patch, "CIFAR100", "cifar-100-python", "fine_labels", 100)


def _svhn(root: Path, patch: pytest.MonkeyPatch) -> Written:
    from scipy.io import savemat
    from torchvision.datasets import SVHN

    pixels, labels = _pixels(32), _labels(10)
    path = root / "train_32x32.mat"
    numbers = np.array([[label or 10] for label in labels], dtype=np.uint8)
    savemat(path, {"X": pixels.transpose(2, 3, 1, 0), "y": numbers})
    patch.setattr(SVHN, "split_list", {**SVHN.split_list, "train": ["", path.name, md5(path)]})
    return pixels, labels


def _stl10(root: Path, patch: pytest.MonkeyPatch) -> Written:
    from torchvision.datasets import STL10

    folder = root / "stl10_binary"
    folder.mkdir()
    pixels, labels = _pixels(96), _labels(10)
    for file, _ in STL10.train_list + STL10.test_list:
        images = file.endswith("X.bin")
        content = pixels.transpose(0, 1, 3, 2).tobytes() if images else bytes(label + 1 for label in labels)
        (folder / file).write_bytes(content)
    (folder / "class_names.txt").write_text("\n".join(f"class {i}" for i in range(10)))
    for files in ("train_list", "test_list"):
        patch.setattr(STL10, files, [[file, md5(folder / file)] for file, _ in getattr(STL10, files)])
    return pixels, labels


def _flowers(root: Path, patch: pytest.MonkeyPatch) -> Written:
    from scipy.io import savemat
    from torchvision.datasets import Flowers102

    folder = root / "flowers-102"
    (folder / "jpg").mkdir(parents=True)
    labels = _labels(102)
    pixels = np.zeros((COUNT, 3, 40, 40), dtype=np.uint8)
    for i in range(COUNT):
        path = folder / "jpg" / f"image_{i + 1:05d}.jpg"
        Image.fromarray(_pixels(40)[i].transpose(1, 2, 0)).save(path)
        pixels[i] = decode(path, 40, "")
    savemat(folder / "imagelabels.mat", {"labels": np.array([labels]) + 1})
    ids = {"trnid": np.arange(1, COUNT + 1)[None], "valid": [[1, 2]], "tstid": [[3, 4]]}
    savemat(folder / "setid.mat", ids)
    sums = {
        key: (name, md5(folder / name)) for key, (name, _) in Flowers102._file_dict.items() if key != "image"
    }
    patch.setattr(Flowers102, "_file_dict", {**Flowers102._file_dict, **sums})
    return pixels, labels


WRITERS = {
    "MNIST": _mnist("MNIST"),
    "FashionMNIST": _mnist("FashionMNIST"),
    "CIFAR10": _cifar10,
    "CIFAR100": _cifar100,
    "SVHN": _svhn,
    "STL10": _stl10,
    "Flowers102": _flowers,
}


def _config(name: str, root: Path, split: str = "train") -> SourceConfig:
    return config_of(type="torchvision", dataset=name, path=root, split=split)


def _all(source: Source) -> list[tuple[bytes, int]]:
    items = [source.read(i) for i in range(len(source))]
    return [(decode(item.data, 28, "x").tobytes(), item.label) for item in items]


def _send_all(pickled: bytes, queue: "multiprocessing.Queue[list[tuple[bytes, int]]]") -> None:
    queue.put(_all(pickle.loads(pickled)))


@pytest.mark.parametrize("name", WRITERS)
def test_images_labels_and_classes_are_those_written(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels, labels = WRITERS[name](tmp_path, monkeypatch)
    source = open_source(_config(name, tmp_path), CLASSES[name], captions=False)
    assert source.labels is not None
    assert source.labels.tolist() == labels
    assert len(source.class_names) == source.num_classes == CLASSES[name]
    for i in range(COUNT):
        item = source.read(i)
        expected = np.broadcast_to(pixels[i], (3, *pixels.shape[2:]))
        assert np.array_equal(decode(item.data, pixels.shape[-1], source.names[i]), expected)
        assert (item.label, item.captions) == (labels[i], ())
    assert len(pickle.dumps(source)) < 6_000
    context = multiprocessing.get_context("fork")
    queue: multiprocessing.Queue[list[tuple[bytes, int]]] = context.Queue()
    child = context.Process(target=_send_all, args=(pickle.dumps(source), queue))
    child.start()
    assert queue.get(timeout=60) == _all(source)
    child.join(60)
    assert open_source(_config(name, tmp_path), 1, captions=False).class_names == ()
    with pytest.raises(ValueError, match=rf"num_classes is 3, but {name} train has {CLASSES[name]} classes"):
        open_source(_config(name, tmp_path), 3, captions=False)
    with pytest.raises(ValueError, match=f"{name} train has no captions"):
        open_source(_config(name, tmp_path), None, captions=True)


def test_splits_differ_and_those_without_labels_have_no_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _stl10(tmp_path, monkeypatch)
    train, both = (
        open_source(_config("STL10", tmp_path, s), None, False) for s in ("train", "train+unlabeled")
    )
    assert train.digest != both.digest
    assert (len(train), len(both)) == (COUNT, 2 * COUNT)
    assert (both.class_names, both.read(COUNT).label) == ((), 0)
    with pytest.raises(ValueError, match=r"num_classes is 10, but STL10 unlabeled has 0 classes"):
        open_source(_config("STL10", tmp_path, "unlabeled"), 10, captions=False)
    with pytest.raises(ValueError, match="STL10 has no split 'val'; it has train, test, unlabeled"):
        open_source(_config("STL10", tmp_path, "val"), 10, captions=False)


@pytest.mark.parametrize("name", WRITERS)
def test_what_is_missing_or_changed_is_said_with_how_to_download_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = rf"torchvision cannot read {name} in .*: download it with torchvision\.datasets\.{name}\("
    with pytest.raises(ValueError, match=message):
        open_source(_config(name, tmp_path), None, captions=False)
    WRITERS[name](tmp_path, monkeypatch)
    for file in tmp_path.rglob("*"):
        if file.is_file() and file.suffix != ".jpg":
            file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(ValueError, match=message):
        open_source(_config(name, tmp_path), None, captions=False)


def test_a_cut_flower_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _flowers(tmp_path, monkeypatch)
    path = tmp_path / "flowers-102" / "jpg" / "image_00003.jpg"
    path.write_bytes(path.read_bytes()[:200])
    source = open_source(_config("Flowers102", tmp_path), None, captions=False)
    with pytest.raises(ValueError, match=r"image_00003\.jpg cannot be read as an image"):
        decode(source.read(2).data, 16, source.names[2])
