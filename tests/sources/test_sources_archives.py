"""Zips, tars, shards and ImageNet's tar: what is wrong with one is said with file and member."""

import io
import json
import logging
import pickle
import tarfile
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from source_writers import (
    CLASSES,
    config_of,
    imagenet,
    imagenet_tar,
    make_pictures,
    write_folder,
    write_tar,
    write_zip,
)

from dtr_ray.sources import Source, open_source
from dtr_ray.sources.archives import list_archive

PICTURES = make_pictures(4)
PNG = PICTURES[0].data


def of(
    path: Path | str, num_classes: int | None = None, captions: bool = False, kind: str = "archive"
) -> Source:
    return open_source(config_of(type=kind, path=path), num_classes, captions)


def _write(path: Path, files: dict[str, bytes]) -> Path:
    return write_zip(path, files) if path.suffix == ".zip" else write_tar(path, files)


NAME = st.text(
    st.characters(blacklist_characters="/\\\0:", blacklist_categories=["Cs"]), min_size=1, max_size=40
)
NAMES = st.lists(st.lists(NAME, min_size=1, max_size=3), min_size=1, max_size=6)


@settings(derandomize=True, deadline=None, max_examples=40)
@given(NAMES, st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, None]))
def test_all_members_are_found_under_any_names(parts: list[list[str]], kind: int | None) -> None:
    names = {"/".join(f"x{part}" for part in own) for own in parts}
    files = {name: name.encode() * 3 for name in names}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.zip" if kind is None else "x.tar")
        write_zip(path, files, zipfile.ZIP_DEFLATED) if kind is None else write_tar(path, files, kind=kind)
        found, members = list_archive(path)
        assert {name: members.read(i) for i, name in enumerate(found)} == files
        assert members.name(0) == f"{path}: {found[0]}"


@pytest.mark.parametrize("suffix", [".zip", ".tar"])
@pytest.mark.parametrize("name", ["../a.png", "/a.png", "a/../../b.png", "C:/a.png", "a/.."])
def test_a_name_that_leads_out_is_refused(suffix: str, name: str, tmp_path: Path) -> None:
    path = _write(tmp_path / f"x{suffix}", {"a/1.png": PNG, name: PNG})
    with pytest.raises(ValueError, match=rf"x\{suffix}: the name '.*' leads out of it; refused"):
        of(path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("suffix", [".zip", ".tar"])
def test_archives_that_cannot_be_data_sets_are_refused(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"x{suffix}"
    _write(path, {"readme.md": b"hello", ".hidden/a.png": PNG, "__MACOSX/._a.png": b""})
    with pytest.raises(ValueError, match=rf"no image in .*x\{suffix}"):
        of(path)
    _write(
        path, {"a/1.png": PNG, "./a/1.png": PNG} if suffix == ".tar" else {"a/1.png": PNG, "a//1.png": PNG}
    )
    with pytest.raises(ValueError, match=r"'a/1\.png' is in it twice"):
        of(path)
    _write(path, {"a/1.png": PNG, "a/1.txt": b"one", "b/2.png": PNG})
    with pytest.raises(ValueError, match=rf"x\{suffix}: b/2\.png has no captions: b/2\.txt is missing"):
        of(path, captions=True)
    _write(path, {"a/1.png": PNG, "a/1.txt": b"\n \n"})
    with pytest.raises(ValueError, match=rf"x\{suffix}: a/1\.txt are empty"):
        of(path, captions=True).read(0)
    path.write_bytes(b"no archive at all, but long enough to be one" * 30)
    with pytest.raises(ValueError, match=rf"x\{suffix} cannot be read as a (zip|tar)"):
        of(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=rf"x\{suffix} cannot be read as a (zip|tar)"):
        of(path)


@pytest.mark.parametrize("suffix", [".rar", ".tar.bz2", ".7z", ""])
def test_other_archives_are_refused_by_their_suffix(suffix: str, tmp_path: Path) -> None:
    (tmp_path / f"x{suffix}").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"no archive that can be read in place: \.zip, \.tar"):
        of(tmp_path / f"x{suffix}")
    with pytest.raises(ValueError, match="is not a file"):
        of(tmp_path)


def test_a_flat_archive_has_no_classes_and_one_below_a_top_folder_has_its_own(tmp_path: Path) -> None:
    flat = of(_write(tmp_path / "flat.zip", {"2.png": PNG, "1.png": PNG}))
    assert (flat.class_names, flat.num_classes, list(flat.names)) == ((), 1, ["1.png", "2.png"])
    deep = of(_write(tmp_path / "deep.zip", {"top/b/2.png": PNG, "top/a/x/1.png": PNG}))
    assert (deep.class_names, list(deep.names)) == (("a", "b"), ["top/a/x/1.png", "top/b/2.png"])
    single = of(_write(tmp_path / "single.zip", {"cats/2.png": PNG, "cats/1.png": PNG}))
    assert single.class_names == ("cats",)


def test_labels_of_stylegan_are_checked(tmp_path: Path) -> None:
    def labelled(content: object, num_classes: int | None = None) -> Source:
        files = {"00000/1.png": PNG, "00001/2.png": PNG, "dataset.json": json.dumps(content).encode()}
        return of(_write(tmp_path / "edm.zip", files), num_classes)

    none = labelled({"labels": None})
    assert none.class_names == ()
    both = labelled({"labels": [["00001/2.png", 0], ["00000/1.png", 1]], "more": 1})
    assert both.labels is not None
    assert both.labels.tolist() == [1, 0]
    assert labelled({"labels": [["00001/2.png", 0]]}, num_classes=1).class_names == ()
    for content, num_classes, message in [
        ({"labels": None}, 2, r"num_classes is 2, but .*edm\.zip: dataset\.json has 0 classes"),
        (
            {"labels": [["00001/2.png", 0]]},
            None,
            r"dataset\.json gives 00000/1\.png no class by number, but None",
        ),
        (
            {"labels": [["00000/1.png", [0.5]], ["00001/2.png", 0]]},
            None,
            r"gives 00000/1\.png .* but \[0\.5\]",
        ),
        ({"labels": [["00000/1.png", True], ["00001/2.png", 0]]}, None, r"gives 00000/1\.png .* but True"),
        ({"labels": [["00000/1.png", 2**70], ["00001/2.png", 0]]}, None, r"edm\.zip"),
        ({"labels": [["00000/1.png", -1], ["00001/2.png", 0]]}, None, r"dataset\.json has the label -1"),
        ({"labels": 3}, None, r"dataset\.json must be"),
        ({}, None, r"dataset\.json must be"),
        ([], None, r"dataset\.json must be"),
    ]:
        with pytest.raises(ValueError, match=message):
            labelled(content, num_classes)


def test_a_damaged_member_of_a_zip_is_named(tmp_path: Path) -> None:
    for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        path = write_zip(tmp_path / "x.zip", {"a/1.png": PNG, "a/2.png": PNG}, compression)
        data = bytearray(path.read_bytes())
        data[len(PNG) // 2] ^= 0xFF
        path.write_bytes(data)
        source = of(path)
        with pytest.raises(ValueError, match=r"x\.zip: a/1\.png is damaged"):
            source.read(0)
        assert source.read(1).data == PNG
    data[:4] = b"none"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"x\.zip: a/1\.png is damaged: the archive has no member where"):
        of(path).read(0)
    path.write_bytes(data[:-100])
    with pytest.raises(ValueError, match=r"x\.zip cannot be read as a zip"):
        of(path)


def test_zips_that_hide_or_inflate_their_members_are_refused(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "x.zip", {"a/1.png": bytes(1 << 22)}, zipfile.ZIP_DEFLATED)
    data = path.read_bytes()
    directory = data.rindex(b"PK\x01\x02")

    def changed(offset: int, value: int, size: int) -> Path:
        new = bytearray(data)
        new[directory + offset : directory + offset + size] = value.to_bytes(size, "little")
        path.write_bytes(new)
        return path

    with pytest.raises(ValueError, match=r"a/1\.png is encrypted"):
        of(changed(8, 1, 2))
    with pytest.raises(ValueError, match=r"a/1\.png is neither stored nor deflated"):
        of(changed(10, 14, 2))
    with pytest.raises(ValueError, match=r"a/1\.png has more than 1073741824 bytes"):
        of(changed(24, 0xFFFF_FFF0, 4)).read(0)
    with pytest.raises(ValueError, match=r"a/1\.png is damaged: its size"):
        of(changed(24, 1000, 4)).read(0)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_links_to_images_in_a_tar_are_refused(kind: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as archive:
        first = tarfile.TarInfo("a/1.png")
        first.size = len(PNG)
        archive.addfile(first, io.BytesIO(PNG))
        link = tarfile.TarInfo("a/2.png")
        link.type, link.linkname = kind, "a/1.png"
        archive.addfile(link)
    with pytest.raises(ValueError, match=r"x\.tar: a/2\.png is a link or has holes: pack anew"):
        of(path)


def test_a_tar_cut_anywhere_is_refused(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", {f"a/{i}.png": PNG for i in range(3)}, kind=tarfile.USTAR_FORMAT)
    data = path.read_bytes()
    member = 512 + -(-len(PNG) // 512) * 512
    for length in (
        100,
        512,
        600,
        member,
        member + 1,
        member + 511,
        member + 512,
        2 * member + 700,
        3 * member,
    ):
        path.write_bytes(data[:length])
        with pytest.raises(
            ValueError, match=r"x\.tar (cannot be read as a tar|is damaged or cut off at byte)"
        ):
            of(path)
    path.write_bytes(data[: 3 * member + 512])
    assert len(of(path)) == 3


def test_a_damaged_header_does_not_end_a_tar_quietly(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", {f"a/{i}.png": PNG for i in range(3)}, kind=tarfile.USTAR_FORMAT)
    data = bytearray(path.read_bytes())
    second = 512 + -(-len(PNG) // 512) * 512
    data[second + 3] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"x\.tar is damaged or cut off at byte {second}"):
        of(path)


def test_a_gzipped_tar_is_unpacked_once_into_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("DTR_RAY_CACHE", str(cache))
    path = write_tar(tmp_path / "x.tgz", {"a/1.png": PNG}, "w:gz")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert pickle.loads(pickle.dumps(of(path))).read(0).data == PNG
    assert len([r for r in caplog.records if "x.tgz is packed as a whole" in r.message]) == 1
    assert len(list(cache.glob("*.tar"))) == 1
    for data in (path.read_bytes()[:-50], path.read_bytes()[:60] + b"\xff" * 50, b"\x1f\x8b" + bytes(100)):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"x\.tgz is damaged"):
            of(path)
    assert len(list(cache.glob("*unpacked*.tar"))) == 1


def test_an_archive_that_changed_after_it_was_listed_is_named(tmp_path: Path) -> None:
    path = _write(tmp_path / "x.tar", {"a/1.png": PNG})
    source = of(path)
    with path.open("ab") as file:
        file.write(b"more")
    with pytest.raises(ValueError, match=r"x\.tar has changed since its images were listed"):
        source.read(0)
    path.unlink()
    with pytest.raises(ValueError, match=r"x\.tar cannot be read: .*No such file"):
        source.read(0)


def test_many_shards_are_read_with_few_open_files(tmp_path: Path) -> None:
    for i in range(40):
        write_tar(tmp_path / f"{i:02d}.tar", {f"{i:04d}.png": PNG, f"{i:04d}.cls": b"%d\n" % (i % 5)})
    source = of(tmp_path, kind="webdataset")
    before = len(list(Path("/proc/self/fd").iterdir()))
    assert [source.read(i).label for i in range(40)] == [i % 5 for i in range(40)]
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 8
    assert source.names[7] == "07.tar/0007.png"
    del source
    assert len(list(Path("/proc/self/fd").iterdir())) <= before


def test_shards_are_found_by_folder_pattern_and_range(tmp_path: Path) -> None:
    for name in ("a-00", "a-01", "b-00"):
        write_tar(tmp_path / f"{name}.tar", {f"{name}.jpg": PNG})
    (tmp_path / "notes.txt").write_text("no shard")
    for pattern, count in [(".", 3), ("a-*.tar", 2), ("a-{00..01}.tar", 2), ("?-00.tar", 2), ("b-00.tar", 1)]:
        assert len(of(tmp_path / pattern, kind="webdataset")) == count
    for pattern, message in [("c-*.tar", r"no shard is called .*c-\*"), ("a-{00..03}.tar", r"a-02\.tar")]:
        with pytest.raises(ValueError, match=message):
            of(tmp_path / pattern, kind="webdataset")
    for name in ("more", "most"):
        (tmp_path / name).mkdir()
        write_tar(tmp_path / name / "a-00.tar", {"a.jpg": PNG})
    both = of(tmp_path / "mo*" / "a-*.tar", kind="webdataset")
    assert list(both.names) == ["more/a-00.tar/a.jpg", "most/a-00.tar/a.jpg"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no shard in .*empty"):
        of(tmp_path / "empty", kind="webdataset")


def test_what_is_wrong_in_a_shard_is_said_with_shard_and_member(tmp_path: Path) -> None:
    def shard(files: dict[str, bytes], **more: object) -> Source:
        write_tar(tmp_path / "x.tar", files)
        return of(tmp_path / "x.tar", kind="webdataset", **more)  # type: ignore[arg-type]

    ok = shard(
        {"a/1.x.JPG": b"ignored", "a/1.JPG": PNG, "a/1.seg.png": b"", "2.cls": b"7", "a/1.cls": b" 0\n"}
    )
    assert (list(ok.names), ok.class_names) == (["x.tar/a/1.JPG"], ("0",))
    both = shard({"1.json": b'{"caption": "json"}', "1.txt": b"text", "1.png": PNG}, captions=True)
    assert both.read(0).captions == ("text",)
    for files, captions, message in [
        ({"1.txt": b"x"}, False, r"no image in .*x\.tar"),
        ({"1.png": PNG, "1.jpg": PNG}, False, r"x\.tar: 1\.jpg is a second image of its key, beside 1\.png"),
        ({"1.png": PNG, "2.png": PNG, "1.cls": b"0"}, False, r"x\.tar: 2\.png has no \.cls, but others have"),
        ({"1.png": PNG, "1.cls": b"cat"}, False, r"x\.tar: 1\.cls must be a class's number, not b'cat'"),
        ({"1.png": PNG, "1.cls": b"-1"}, False, r"x\.tar has the label -1"),
        ({"1.png": PNG, "2.png": PNG, "1.txt": b"x"}, True, r"x\.tar: 2\.png has no captions"),
    ]:
        with pytest.raises(ValueError, match=message):
            shard(files, captions=captions)
    for text in (b"{", b"[]", b'{"caption": 3}', b'{"caption": [""]}', b"\xff"):
        with pytest.raises(ValueError, match=r"x\.tar: 1\.json"):
            shard({"1.png": PNG, "1.json": text}, captions=True).read(0)


def test_imagenet_has_the_numbers_of_torchvisions_image_folder(tmp_path: Path) -> None:
    from torchvision.datasets import ImageFolder

    (tmp_path / "tar").mkdir()
    pictures = make_pictures(9)
    folder = imagenet(tmp_path, pictures)
    theirs = ImageFolder(folder.path)
    for config in (folder, imagenet_tar(tmp_path / "tar", pictures)):
        source = open_source(config, None, captions=False)
        assert list(source.names) == [str(Path(path).relative_to(folder.path)) for path, _ in theirs.samples]
        assert source.labels is not None
        assert source.labels.tolist() == theirs.targets
        assert list(source.class_names) == theirs.classes


def test_imagenets_classes_are_called_by_their_words(tmp_path: Path) -> None:
    root = tmp_path / "ILSVRC" / "Data" / "CLS-LOC"
    root.mkdir(parents=True)
    words = tmp_path / "LOC_synset_mapping.txt"
    words.write_text(
        "n01440764 tench, Tinca tinca\nn01443537 goldfish\nn02123045 tabby cat\nn00000001 more\n"
    )
    for config in (imagenet(root, PICTURES), imagenet_tar(root, PICTURES)):
        found = open_source(config, 3, captions=False).class_names
        assert found == ("tench, Tinca tinca", "goldfish", "tabby cat")
        assert open_source(config, 1, captions=False).class_names == ()
    words.write_text("n01440764 tench\n")
    with pytest.raises(ValueError, match=r"LOC_synset_mapping\.txt has no words for the synset n01443537"):
        open_source(config, None, captions=False)


def test_what_is_no_imagenet_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path / "x", {f"{CLASSES[0]}/1.JPEG": PNG, "cats/1.JPEG": PNG})
    write_folder(tmp_path / "flat", {"1.JPEG": PNG})
    write_tar(tmp_path / "x.tar", {"n01440764/1.JPEG": PNG})
    inner = write_tar(tmp_path / "inner.tar", {"1.JPEG": PNG}).read_bytes()
    write_tar(tmp_path / "y.tar", {"n01440764.tar": inner[:900], "n01443537.tar": inner})
    for name, message in [
        ("x", "named by synsets .* but 'cats' is none"),
        ("flat", "named by synsets .* but there is none"),
        ("x.tar", "'n01440764/1.JPEG' is none"),
        ("y.tar", r"y\.tar"),
        ("nowhere", "nowhere is neither a folder nor a file"),
    ]:
        with pytest.raises(ValueError, match=message):
            of(tmp_path / name, kind="imagenet")
    assert np.asarray(of(tmp_path / "x", 1, kind="folder").labels).tolist() == [0, 0]
