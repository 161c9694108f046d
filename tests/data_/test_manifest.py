"""The manifest of a prepared folder: read as written, compared with a trial's data, its files checked."""

import os
from pathlib import Path

import numpy as np
import pytest
from prepared_folders import FolderWriter

from dtr_ray.data.manifest import WORK, Manifest, caption_names


@pytest.fixture
def writer(tmp_path: Path) -> FolderWriter:
    """Nine images of three classes in two shards."""
    writer = FolderWriter(tmp_path / "faces", [5, 4], num_classes=3)
    writer.pixels(np.zeros((9, 3, 32, 32), np.uint8)).write()
    return writer


def test_a_manifest_is_read_as_it_was_written(writer: FolderWriter, tmp_path: Path) -> None:
    manifest = Manifest.read(writer.folder)
    copy = tmp_path / "copy"
    copy.mkdir()
    manifest.write(copy)
    assert Manifest.read(copy) == manifest
    assert [path.name for path in copy.iterdir()] == ["manifest.json"]
    assert (manifest.starts, manifest.has_pixels, manifest.class_counts) == ([0, 5, 9], True, [3, 3, 3])


def test_a_data_section_that_says_the_same_is_accepted(writer: FolderWriter) -> None:
    Manifest.read(writer.folder).check(writer.config())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"resolution": 64}, "data.resolution is 64, prepared was 32"),
        ({"num_classes": 10}, "data.num_classes is 10, prepared was 3"),
        ({"vae": "some/vae"}, "data.vae is 'some/vae', prepared was null"),
        ({"num_classes": None, "text_encoder": "some/clip"}, "data.text_encoder is 'some/clip'"),
    ],
)
def test_a_data_section_that_says_otherwise_is_told_by_key(
    writer: FolderWriter, changes: dict[str, object], words: str
) -> None:
    with pytest.raises(ValueError, match=r"does not go with the configuration: ") as caught:
        Manifest.read(writer.folder).check(writer.config(**changes))
    assert words in str(caught.value)


def test_all_differences_are_told_at_once(writer: FolderWriter) -> None:
    with pytest.raises(ValueError, match=r"data\.resolution is 8.*; data\.num_classes is 2"):
        Manifest.read(writer.folder).check(writer.config(resolution=8, num_classes=2))


def test_files_that_are_changed_cut_or_gone_are_named(writer: FolderWriter) -> None:
    manifest, folder = Manifest.read(writer.folder), writer.folder
    assert (manifest.broken_files(folder), manifest.missing_files(folder)) == ([], [])
    path = folder / "pixels/00000.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.truncate(folder / "pixels/00001.npy", 200)
    (folder / "labels.npy").unlink()
    broken = manifest.broken_files(folder)
    assert [fault.split(":")[0] for fault in sorted(broken)] == [
        "labels.npy",
        "pixels/00000.npy",
        "pixels/00001.npy",
    ]
    assert "its content has changed" in next(fault for fault in broken if "00000" in fault)
    # One look at the sizes alone does not see the first.
    assert len(manifest.missing_files(folder)) == 2


def test_what_is_no_prepared_folder_is_told_apart(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a folder"):
        Manifest.read(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"is not a prepared folder \(it has no manifest\.json\)"):
        Manifest.read(tmp_path)
    (tmp_path / WORK).mkdir()
    with pytest.raises(ValueError, match=r"is not complete: python -m dtr_ray\.prepare"):
        Manifest.read(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", '{"format": 2}', "\x00"])
def test_another_file_of_that_name_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match="is not a manifest that this version reads"):
        Manifest.read(tmp_path)


def test_captions_are_named_once_the_empty_one_first() -> None:
    assert caption_names([["b", "a"], ["", "b"], ["Ä"]]) == ["", "a", "b", "Ä"]
