"""Zips and tars: their members listed once, then read by seeking; nothing is unpacked."""

import stat
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from dtr_ray.config.files import parse_json
from dtr_ray.config.prepare import ArchiveSource
from dtr_ray.sources.file_source import CaptionFiles, FileSource
from dtr_ray.sources.files import ZIP_MEMBER, Archives, Files, TarFiles, ZipFiles, seekable
from dtr_ray.sources.layout import (
    Layout,
    by_path,
    check_count,
    is_image,
    lay_out,
    no_image,
    number_classes,
    safe_names,
)
from dtr_ray.sources.listing import Names, Source, digest_of

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
_ENCRYPTED = 0x1
_LARGEST = np.iinfo(np.uint32).max


def archive_source(config: ArchiveSource, num_classes: int | None, captions: bool) -> Source:
    """The images of a zip or tar. See `open_source`."""
    path = Path(config.path).expanduser()
    names, files = list_archive(path)
    images = [i for i, name in enumerate(names) if is_image(name)]
    if not images:
        raise no_image(str(path))
    top = _top([names[i] for i in images], names)
    relative = [names[i][len(top) :] for i in images]
    layout = _labelled(relative, names, files, f"{top}dataset.json", num_classes, str(path))
    order = np.array(images, dtype=np.int64)[layout.order]
    texts = CaptionFiles(files.take(_caption_members(order, names, str(path)))) if captions else None
    digest, found = digest_of(path.parent, [path.name]), files.take(order)
    return FileSource(found.names, layout.labels, layout.class_names, digest, found, texts)


def list_archive(path: Path) -> tuple[list[str], Files]:
    """Names of all files in an archive, and the files.

    Raises:
        ValueError: it is missing, damaged, encrypted, or of another format; or a name leads out of it.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not a file" if path.exists() else f"{path} does not exist")
    if path.name.lower().endswith(".zip"):
        return _list_zip(path)
    if not path.name.lower().endswith(TAR_SUFFIXES):
        raise ValueError(
            f"{path} is no archive that can be read in place: .zip, {', '.join(TAR_SUFFIXES)} can"
        )
    return list_tars([path])


def list_tars(paths: Sequence[Path]) -> tuple[list[str], TarFiles]:
    """Names of all files in tars, one tar after another, and the files; else as `list_archive`."""
    names: list[str] = []
    places: list[tuple[int, int, int]] = []
    for number, path in enumerate(paths):
        members = list(tar_members(path))
        names += safe_names((name for name, _, _ in members), str(path))
        places += [(number, start, size) for _, start, size in members]
    table = np.array(places, dtype=np.int64).reshape(-1, 3)
    return names, TarFiles(Archives(paths), Names(names), *table.T)


def tar_members(path: Path, start: int = 0) -> Iterator[tuple[str, int, int]]:
    """Name, first byte and size of each file in a tar that begins at byte `start` of a file.

    Raises:
        ValueError: the tar is damaged or cut off, or an image in it is a link or has holes.
    """
    try:
        with seekable(path).open("rb") as file:
            file.seek(start)
            with tarfile.open(fileobj=file, mode="r:") as archive:
                while (member := archive.next()) is not None:
                    # It would keep an object for each.
                    archive.members.clear()  # type: ignore[attr-defined]
                    if member.isreg() and not member.issparse():
                        yield member.name, member.offset_data, member.size
                    elif is_image(member.name) and not member.isdir():
                        rule = "pack anew with `tar --hard-dereference --dereference`, without --sparse"
                        raise ValueError(f"{path}: {member.name} is a link or has holes: {rule}")
                # tarfile takes a header that it does not understand for the end.
                file.seek(archive.offset)
                block = file.read(tarfile.BLOCKSIZE)
            if len(block) < tarfile.BLOCKSIZE or any(block):
                raise ValueError(
                    f"{path} is damaged or cut off at byte {archive.offset}: no member and no end"
                )
    except (tarfile.TarError, OSError) as error:
        raise ValueError(f"{path} cannot be read as a tar: {error}") from error


def _list_zip(path: Path) -> tuple[list[str], ZipFiles]:
    try:
        with zipfile.ZipFile(path) as archive:
            infos = [info for info in archive.infolist() if not info.is_dir()]
    except (zipfile.BadZipFile, NotImplementedError, OSError) as error:
        raise ValueError(f"{path} cannot be read as a zip: {error}") from error
    members = np.empty(len(infos), dtype=ZIP_MEMBER)
    for i, info in enumerate(infos):
        if info.flag_bits & _ENCRYPTED:
            raise ValueError(f"{path}: {info.filename} is encrypted")
        if stat.S_ISLNK(info.external_attr >> 16) and is_image(info.filename):
            raise ValueError(f"{path}: {info.filename} is a link: pack the zip anew without --symlinks")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"{path}: {info.filename} is neither stored nor deflated: pack the zip anew")
        sizes = min(info.compress_size, _LARGEST), min(info.file_size, _LARGEST)
        deflated = info.compress_type == zipfile.ZIP_DEFLATED
        members[i] = (info.header_offset, *sizes, info.CRC, deflated)
    # Windows writes backslashes.
    names = safe_names((info.filename.replace("\\", "/") for info in infos), str(path))
    return names, ZipFiles(Archives([path]), Names(names), members)


def _top(images: Sequence[str], names: Sequence[str]) -> str:
    """The folder, with its slash, that the whole data set was packed in; empty where there is none."""
    first = images[0].partition("/")[0] + "/"
    if not all(name.startswith(first) for name in images):
        return ""
    deeper = all(name.count("/") > 1 for name in images)
    return first if deeper or f"{first}dataset.json" in names else ""


def _labelled(
    images: Sequence[str],
    names: Sequence[str],
    files: Files,
    labels_name: str,
    num_classes: int | None,
    where: str,
) -> Layout:
    """The layout by `dataset.json` where there is one, else by folders."""
    if labels_name not in names or num_classes == 1:
        return lay_out(images, num_classes, where)
    number = names.index(labels_name)
    try:
        found = parse_json(files.read(number), files.name(number), dict)["labels"]
        labels = dict(found) if found is not None else None
    except (ValueError, TypeError, KeyError) as error:
        rule = 'must be {"labels": [[NAME, CLASS], ...]} or {"labels": null}'
        raise ValueError(f"{files.name(number)} {rule}: {error!r}") from error
    if labels is None:
        # StyleGAN's folders are no classes.
        check_count(0, num_classes, files.name(number))
        return lay_out(images, 1, where)
    order = sorted(range(len(images)), key=lambda i: by_path(images[i]))
    values: list[int] = []
    for i in order:
        value = labels.get(images[i])
        if type(value) is not int:
            raise ValueError(f"{files.name(number)} gives {images[i]} no class by number, but {value!r:.80}")
        values.append(value)
    numbers, class_names = number_classes(values, num_classes, files.name(number))
    return Layout(np.array(order, dtype=np.int64), numbers, class_names)


def _caption_members(images: np.ndarray, names: Sequence[str], where: str) -> np.ndarray:
    """Positions of the members that hold the captions of images; ValueError where one has none."""
    places = {name: i for i, name in enumerate(names) if name.endswith(".txt")}
    found = []
    for i in images.tolist():
        name = names[i][: names[i].rindex(".")] + ".txt"
        if name not in places:
            raise ValueError(f"{where}: {names[i]} has no captions: {name} is missing")
        found.append(places[name])
    return np.array(found, dtype=np.int64)
