"""torchvision's data sets where they have been downloaded."""

import importlib
import threading
from pathlib import Path
from typing import Any

import numpy as np

from dtr_ray.config.prepare import TorchvisionSource
from dtr_ray.sources.file_source import FileSource
from dtr_ray.sources.files import FolderFiles
from dtr_ray.sources.layout import check_count, number_classes
from dtr_ray.sources.listing import Item, Names, Source, digest_of

_SPLITS = {
    "CIFAR10": ("train", "test"),
    "CIFAR100": ("train", "test"),
    "FashionMNIST": ("train", "test"),
    "Flowers102": ("train", "val", "test"),
    "MNIST": ("train", "test"),
    "STL10": ("train", "test", "unlabeled", "train+unlabeled"),
    "SVHN": ("train", "test", "extra"),
}
# Where below its root torchvision keeps each.
_PLACES = {
    "CIFAR10": "cifar-10-batches-py",
    "CIFAR100": "cifar-100-python",
    "FashionMNIST": "FashionMNIST/raw",
    "Flowers102": "flowers-102",
    "MNIST": "MNIST/raw",
    "STL10": "stl10_binary",
    "SVHN": "{split}_32x32.mat",
}
_DIGITS = tuple("0123456789")


class TorchvisionImages(Source):
    """A data set that torchvision holds in memory: each process that reads loads it once."""

    def __init__(
        self, config: TorchvisionSource, labels: np.ndarray, class_names: tuple[str, ...], digest: str
    ) -> None:
        names = Names(f"{config.dataset} {config.split}[{i}]" for i in range(len(labels)))
        super().__init__(names, labels, class_names, digest)
        self._labels = labels
        self._config = config
        self._lock = threading.Lock()
        self._data: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lock": None, "_data": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def read(self, index: int) -> Item:
        """The image, and no captions."""
        with self._lock:
            if self._data is None:
                self._data = _load(self._config)
        return Item(self._data[index][0], int(self._labels[index]), ())


def torchvision_source(config: TorchvisionSource, num_classes: int | None, captions: bool) -> Source:
    """One split of a data set. See `open_source`."""
    where = f"{config.dataset} {config.split}"
    if captions:
        raise ValueError(f"{where} has no captions")
    if config.split not in _SPLITS[config.dataset]:
        known = ", ".join(_SPLITS[config.dataset])
        raise ValueError(f"{config.dataset} has no split {config.split!r}; it has {known}")
    data = _load(config)
    values = next(getattr(data, key) for key in ("targets", "labels", "_labels") if hasattr(data, key))
    labels = np.zeros(len(values), dtype=np.int64)
    class_names: tuple[str, ...] = ()
    if "unlabeled" in config.split:
        check_count(0, num_classes, where)
    else:
        names = getattr(data, "classes", None)
        names = _DIGITS if config.dataset == "SVHN" else names
        labels, class_names = number_classes(np.asarray(values).tolist(), num_classes, where, names)
    digest = _digest(config)
    if config.dataset == "Flowers102":
        paths = [Path(path) for path in data._image_files]
        files = FolderFiles(paths[0].parent, [path.name for path in paths])
        return FileSource(files.names, labels, class_names, digest, files, None)
    return TorchvisionImages(config, labels, class_names, digest)


def _load(config: TorchvisionSource) -> Any:
    datasets = importlib.import_module("torchvision.datasets")
    root = Path(config.path).expanduser()
    if _SPLITS[config.dataset] == ("train", "test"):
        split: dict[str, Any] = {"train": config.split == "train"}
    else:
        split = {"split": config.split}
    try:
        return getattr(datasets, config.dataset)(str(root), download=False, **split)
    # A missing, cut or changed file raises anything from RuntimeError to struct.error.
    except Exception as error:
        rule = f"download it with torchvision.datasets.{config.dataset}({str(root)!r}, download=True)"
        raise ValueError(f"torchvision cannot read {config.dataset} in {root} ({error}): {rule}") from error


def _digest(config: TorchvisionSource) -> str:
    root = Path(config.path).expanduser()
    place = root / _PLACES[config.dataset].format(split=config.split)
    files = sorted(file for file in place.rglob("*") if file.is_file()) if place.is_dir() else [place]
    return digest_of(root, [str(file.relative_to(root)) for file in files], config.split)
