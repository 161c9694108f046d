"""From the names of files to images and classes: what a folder, a zip and a tar have in common."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np

IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})

# A number above is a mistake, and names for all below it would fill the memory.
_MOST_CLASSES = 1_000_000


@dataclass(frozen=True)
class Layout:
    """Which of the files that were listed are the images, in order, and what class each has.

    Attributes:
        order: int64 (N,), positions in the list of names.
        labels: int64 (N,).
        class_names: of the K classes; empty without classes.
    """

    order: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]


def is_image(name: str) -> bool:
    """Whether a file counts as an image: by its suffix, unless it or a folder above it is hidden."""
    dot = name.rfind(".")
    return dot >= 0 and name[dot:].lower() in IMAGE_SUFFIXES and not (name[0] == "." or "/." in name)


def by_path(name: str) -> str:
    """Key that sorts names as pathlib does: folder by folder."""
    return name.replace("/", "\0")


def lay_out(names: Sequence[str], num_classes: int | None, where: str) -> Layout:
    """Images in the order of their paths; the first folder of each is its class, in the order of the names.

    Args:
        names: of the images, with slashes, relative to the top.
        num_classes: 1 leaves classes out; None takes those that there are; else images without a class
            folder are passed over, as torchvision's ImageFolder does.
        where: what messages call the whole.

    Raises:
        ValueError: no image, other than `num_classes` classes, or images both with and without a class.
    """
    if not names:
        raise no_image(where)
    folders = [name[: max(0, name.find("/"))] for name in names]
    classes = sorted({folder for folder in folders if folder})
    if num_classes is None and classes and "" in folders:
        rule = "set num_classes to 1 to leave classes out"
        raise ValueError(
            f"{where} has images beside the class folders, such as {names[folders.index('')]}: {rule}"
        )
    if num_classes == 1:
        classes = []
    check_count(len(classes), num_classes, where)
    # Not `enumerate(names)`: a sort by numbers keeps a million names where they are.
    order = sorted(range(len(names)), key=lambda i: by_path(names[i]))
    if not classes:
        return Layout(np.array(order, dtype=np.int64), np.zeros(len(order), dtype=np.int64), ())
    numbers = {name: number for number, name in enumerate(classes)}
    order = [i for i in order if folders[i]]
    labels = np.array([numbers[folders[i]] for i in order], dtype=np.int64)
    return Layout(np.array(order, dtype=np.int64), labels, tuple(classes))


def number_classes(
    labels: Sequence[int], num_classes: int | None, where: str, class_names: Sequence[str] | None = None
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Checks labels that a source gives as numbers; the labels, int64 (N,), and the names of the classes.

    Args:
        labels: N integers.
        num_classes: 1 leaves classes out; None takes those that there are.
        where: what messages call the source.
        class_names: of all classes; default: their numbers, up to the highest label.

    Raises:
        ValueError: a label is negative or above the names, or `num_classes` is another number.
    """
    if num_classes == 1:
        return np.zeros(len(labels), dtype=np.int64), ()
    highest = _MOST_CLASSES - 1 if class_names is None else len(class_names) - 1
    wrong = next((label for label in labels if not 0 <= label <= highest), None)
    if wrong is not None:
        raise ValueError(f"{where} has the label {wrong}: labels are 0 to {highest}")
    names = tuple(class_names or map(str, range(max(labels, default=-1) + 1)))
    check_count(len(names), num_classes, where)
    return np.array(labels, dtype=np.int64), names


def no_image(where: str) -> ValueError:
    """What is wrong with a place that has no image."""
    return ValueError(f"no image in {where} (looked for {', '.join(sorted(IMAGE_SUFFIXES))}, at any depth)")


def check_count(found: int, num_classes: int | None, where: str) -> None:
    """Raises ValueError where a source has not the number of classes that was asked for."""
    if num_classes not in (None, 1, found):
        raise ValueError(f"num_classes is {num_classes}, but {where} has {found} classes")


def safe_names(names: Iterable[str], where: str) -> list[str]:
    """Names of an archive's members without `./`; one that leads out of the archive is refused.

    Raises:
        ValueError: a name is absolute or has `..`; or a name comes twice.
    """
    safe = []
    for name in names:
        if name[:1] == "/" or name[1:3] in (":/", ":\\") or ".." in name.replace("\\", "/").split("/"):
            raise ValueError(f"{where}: the name {name!r} leads out of it; refused")
        # Most names are as they should be.
        plain = name[:1] != "." and name[-1:] != "/" and "/." not in name and "//" not in name
        safe.append(name if plain else PurePosixPath(name).as_posix())
    if len(set(safe)) < len(safe):
        twice, _ = Counter(safe).most_common(1)[0]
        raise ValueError(f"{where}: {twice!r} is in it twice")
    return safe
