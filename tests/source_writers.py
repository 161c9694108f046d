"""The same few pictures in every form that `prepare` reads, each written as its own tools write it."""

import hashlib
import io
import json
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image
from pydantic import TypeAdapter

from dtr_ray.config.prepare import SourceConfig

SIZE = 32


@dataclass(frozen=True)
class Picture:
    """One labelled picture with captions: SIZE x SIZE, RGB, a PNG."""

    folder: str
    label: int
    captions: tuple[str, ...]
    data: bytes
    number: int

    @property
    def name(self) -> str:
        return f"{self.folder}/{self.number:03d}.png"

    @property
    def stem(self) -> str:
        return self.name.removesuffix(".png")

    @property
    def pixels(self) -> np.ndarray:
        """uint8 (3, SIZE, SIZE)."""
        return np.asarray(Image.open(io.BytesIO(self.data))).transpose(2, 0, 1)


CLASSES = ("n01440764", "n01443537", "n02123045")


def make_pictures(count: int = 8) -> list[Picture]:
    """Sorted by class and name."""
    random = np.random.default_rng(0)
    found = []
    for i in range(count):
        label = i * len(CLASSES) // count
        file = io.BytesIO()
        pixels = random.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file, "PNG")
        captions = (f"picture {i} of a fïsh", "another, \u2028 with a break")[: 1 + i % 2]
        found.append(Picture(CLASSES[label], label, captions, file.getvalue(), i))
    return found


def cut(pictures: Sequence[Picture], index: int) -> list[Picture]:
    """The pictures, one of them with half of its bytes."""
    broken = pictures[index]
    changed = list(pictures)
    changed[index] = replace(broken, data=broken.data[: len(broken.data) // 2])
    return changed


def config_of(**values: object) -> SourceConfig:
    adapter: TypeAdapter[SourceConfig] = TypeAdapter(SourceConfig)
    return adapter.validate_python({key: str(value) for key, value in values.items()})


def members(pictures: Sequence[Picture]) -> dict[str, bytes]:
    """Images and caption files by name."""
    found = {}
    for p in pictures:
        found[p.name] = p.data
        found[f"{p.stem}.txt"] = "\n".join(p.captions).encode()
    return found


def write_folder(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def write_zip(path: Path, files: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def write_tar(path: Path, files: dict[str, bytes], mode: str = "w", kind: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, mode, format=kind) as archive:  # type: ignore[call-overload]
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def folder(root: Path, pictures: Sequence[Picture]) -> SourceConfig:
    return config_of(type="folder", path=write_folder(root / "pictures", members(pictures)))


def zip_stored(root: Path, pictures: Sequence[Picture]) -> SourceConfig:
    return config_of(type="archive", path=write_zip(root / "pictures.zip", members(pictures)))


def zip_deflated(root: Path, pictures: Sequence[Picture]) -> SourceConfig:
    shuffled = dict(reversed(members(pictures).items()))
    path = write_zip(root / "pictures.zip", shuffled, zipfile.ZIP_DEFLATED)
    return config_of(type="archive", path=path)


def zip_stylegan(root: Path, pictures: Sequence[Picture]) -> SourceConfig:
    """As StyleGAN's and EDM's dataset_tool writes it: folders that are no classes, labels in a JSON."""
    files, labels = {}, []
    for i, p in enumerate(pictures):
        stem = f"{i // 3:05d}/img{i:08d}"
        files[f"{stem}.png"] = p.data
        files[f"{stem}.txt"] = "\n".join(p.captions).encode()
        labels.append([f"{stem}.png", p.label])
    files["dataset.json"] = json.dumps({"labels": labels}).encode()
    return config_of(type="archive", path=write_zip(root / "edm.zip", files))


def tar_plain(root: Path, pictures: Sequence[Picture]) -> SourceConfig:
    """As `tar cf pictures.tar pictures` writes it: with its top folder, in any order."""
    files = {f"./pictures/{name}": data for name, data in reversed(members(pictures).items())}
    return config_of(type="archive", path=write_tar(root / "pictures.tar", files, kind=tarfile.GNU_FORMAT))


def tar_gz(root: Path, pictures: Sequence[Picture]) -> SourceConfig:
    return config_of(type="archive", path=write_tar(root / "pictures.tar.gz", members(pictures), "w:gz"))


def webdataset(root: Path, pictures: Sequence[Picture]) -> SourceConfig:
    return _shards(root, pictures, "txt", lambda p: "\n".join(p.captions).encode())


def webdataset_json(root: Path, pictures: Sequence[Picture]) -> SourceConfig:
    """As img2dataset writes it."""
    config = _shards(root, pictures, "json", lambda p: json.dumps({"caption": p.captions, "key": 1}).encode())
    return config_of(
        type="webdataset", path=f"{config.path}/train-{{000..{(len(pictures) - 1) // 3:03d}}}.tar"
    )


def _shards(
    root: Path, pictures: Sequence[Picture], suffix: str, text: Callable[[Picture], bytes]
) -> SourceConfig:
    path = root / "shards"
    path.mkdir()
    for shard in range(0, len(pictures), 3):
        files = {}
        for p in pictures[shard : shard + 3]:
            key = f"{p.number:06d}"
            files |= {f"{key}.cls": b"%d" % p.label, f"{key}.png": p.data, f"{key}.{suffix}": text(p)}
        write_tar(path / f"train-{shard // 3:03d}.tar", files, kind=tarfile.USTAR_FORMAT)
    return config_of(type="webdataset", path=path)


def _table(pictures: Sequence[Picture]) -> "object":
    import datasets

    classes = datasets.ClassLabel(names=list(CLASSES))
    features = {
        "picture": datasets.Image(),
        "kind": classes,
        "texts": datasets.List(datasets.Value("string")),
    }
    values = {
        "picture": [{"bytes": p.data, "path": p.name} for p in pictures],
        "kind": [p.label for p in pictures],
        "texts": [list(p.captions) for p in pictures],
    }
    return datasets.Dataset.from_dict(values, features=datasets.Features(features))


def _huggingface(path: Path, **more: str) -> SourceConfig:
    columns = {"image_column": "picture", "label_column": "kind", "caption_column": "texts"}
    return config_of(type="huggingface", path=path, **columns, **more)


def saved(root: Path, pictures: Sequence[Picture]) -> SourceConfig:
    _table(pictures).save_to_disk(root / "saved", num_shards=2)  # type: ignore[attr-defined]
    return _huggingface(root / "saved")


def saved_splits(root: Path, pictures: Sequence[Picture]) -> SourceConfig:
    import datasets

    both = {"train": _table(pictures[:2]), "holdout": _table(pictures)}
    datasets.DatasetDict(both).save_to_disk(root / "saved")
    return _huggingface(root / "saved", split="holdout")


def parquet(root: Path, pictures: Sequence[Picture]) -> SourceConfig:
    """As the hub holds it: several files a split, each of several groups of rows."""
    path = root / "hub" / "data"
    path.mkdir(parents=True)
    for number, part in enumerate((pictures[:5], pictures[5:])):
        table = _table(part)
        table.to_parquet(path / f"train-{number:05d}-of-00002.parquet", batch_size=2)  # type: ignore[attr-defined]
    _table(pictures[:1]).to_parquet(path / "test-00000-of-00001.parquet")  # type: ignore[attr-defined]
    return _huggingface(root / "hub")


def imagenet(root: Path, pictures: Sequence[Picture]) -> SourceConfig:
    write_folder(root / "train", {p.name: p.data for p in pictures})
    return config_of(type="imagenet", path=root / "train")


def imagenet_tar(root: Path, pictures: Sequence[Picture]) -> SourceConfig:
    """A tar of a tar for each synset, in another order than the synsets'."""
    outer = {}
    for name in reversed(CLASSES):
        own = {Path(p.name).name: p.data for p in reversed(pictures) if p.folder == name}
        inner = write_tar(root / "inner.tar", own, kind=tarfile.GNU_FORMAT)
        outer[f"{name}.tar"] = inner.read_bytes()
        inner.unlink()
    path = write_tar(root / "ILSVRC2012_img_train.tar", outer, kind=tarfile.GNU_FORMAT)
    return config_of(type="imagenet", path=path)


def coco(root: Path, pictures: Sequence[Picture]) -> SourceConfig:
    write_folder(root / "train2014", {p.name: p.data for p in pictures})
    images = [{"id": 1000 - p.number, "file_name": p.name, "height": SIZE} for p in pictures]
    texts = [
        {"id": 10 * p.number + i, "image_id": 1000 - p.number, "caption": f"{text} "}
        for p in pictures
        for i, text in enumerate(p.captions)
    ]
    path = root / "captions.json"
    path.write_text(json.dumps({"info": {}, "images": images, "annotations": texts}))
    return config_of(type="coco", path=root / "train2014", annotations=path)


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


WRITERS: dict[str, Callable[[Path, Sequence[Picture]], SourceConfig]] = {
    "folder": folder,
    "zip_stored": zip_stored,
    "zip_deflated": zip_deflated,
    "zip_stylegan": zip_stylegan,
    "tar_plain": tar_plain,
    "tar_gz": tar_gz,
    "webdataset": webdataset,
    "webdataset_json": webdataset_json,
    "saved": saved,
    "saved_splits": saved_splits,
    "parquet": parquet,
    "imagenet": imagenet,
    "imagenet_tar": imagenet_tar,
    "coco": coco,
}
"""All sources whose images are files."""

WITHOUT_CLASSES = frozenset({"coco"})
WITHOUT_CAPTIONS = frozenset({"imagenet", "imagenet_tar"})
NUMBERED = frozenset({"zip_stylegan", "webdataset", "webdataset_json"})
"""Their classes have numbers for names."""
