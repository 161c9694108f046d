"""An image folder of one's own: listed and checked.

With classes, each subfolder is a class, in the order of their names, as in torchvision's ImageFolder;
without, every image below the folder counts, at any depth. Hidden files and folders are passed over.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dtr_ray.sources.layout import is_image, lay_out, no_image
from dtr_ray.sources.listing import digest_of, status_of


@dataclass(frozen=True)
class ImageFiles:
    """The images of a folder: their paths, class of each, and a hash of names, sizes and times."""

    root: Path
    names: list[str]
    """Relative to `root`, with slashes."""
    labels: list[int]
    class_names: tuple[str, ...]
    """Empty without classes."""
    digest: str

    @property
    def paths(self) -> list[Path]:
        """Path of each image."""
        return [self.root / name for name in self.names]


def check_folder(path: str, num_classes: int | None) -> None:
    """A quick look that decodes nothing: raises ValueError where the folder cannot be what is asked for."""
    root = Path(path).expanduser()
    for folder in _class_folders(root, num_classes):
        if next(walk_images(folder), None) is None:
            raise no_image(str(folder))


def list_images(path: str, num_classes: int | None) -> ImageFiles:
    """All images of the folder with their classes, sorted by class and path.

    Args:
        path: the folder.
        num_classes: 1 leaves classes out; None takes the subfolders as classes where there are some.

    Raises:
        ValueError: the path is missing or no folder, holds no image, or its subfolders are not
            `num_classes` in number.
    """
    check_folder(path, num_classes)
    root = Path(path).expanduser()
    names = _image_names(root, num_classes)
    layout = lay_out(names, num_classes, str(root))
    names = [names[i] for i in layout.order]
    digest = digest_of(root, names)
    return ImageFiles(root, names, layout.labels.tolist(), layout.class_names, digest)


def _class_folders(root: Path, num_classes: int | None) -> list[Path]:
    try:
        exists = root.exists()
    except OSError as error:
        raise ValueError(f"the folder {str(root)[:200]} cannot be looked up: {error.strerror}") from error
    if not exists:
        raise ValueError(f"the folder {root} does not exist")
    if not root.is_dir():
        raise ValueError(f"{root} is not a folder")
    if num_classes in (None, 1):
        return [root]
    folders = subfolders(root)
    if len(folders) != num_classes:
        raise ValueError(f"num_classes is {num_classes}, but {root} has {len(folders)} class folders")
    return folders


def subfolders(root: Path) -> list[Path]:
    """The folders that are classes, in the order of their names."""
    return sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))


def _image_names(root: Path, num_classes: int | None) -> list[str]:
    if num_classes is None:
        folders = subfolders(root)
        names = [path.name for path in root.iterdir() if is_image(path.name) and not path.is_dir()]
    else:
        folders, names = _class_folders(root, num_classes), []
    # Each class is walked on its own: an image that a link shows in two of them is in both.
    for folder in folders:
        above = "" if folder == root else f"{folder.name}/"
        names += [above + name for name in _walk(folder)]
    return names


def _refuse(error: OSError) -> None:
    # os.walk would leave out a folder that it may not read.
    raise ValueError(f"{error.filename} cannot be read: {error}") from error


def walk_images(folder: Path) -> Iterator[Path]:
    """Paths of the images below a folder, links followed, each folder visited once."""
    return (folder / name for name in _walk(folder))


def _walk(folder: Path) -> Iterator[str]:
    """Names of the images relative to the folder, with slashes."""
    seen: set[tuple[int, int]] = set()
    # Texts, since a million Paths take a minute.
    top = len(os.path.join(folder, ""))  # noqa: PTH118
    for where, folders, files in os.walk(folder, followlinks=True, onerror=_refuse):
        status = status_of(where)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (os.path.join(where, name)[top:] for name in files if is_image(name))  # noqa: PTH118
