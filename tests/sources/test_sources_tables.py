"""Hugging Face's tables and COCO's captions: columns, splits, and what is wrong with them."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from source_writers import CLASSES, coco, config_of, make_pictures, parquet, saved, saved_splits

from dtr_ray.sources import Source, open_source

PICTURES = make_pictures(7)
PNG = PICTURES[0].data


def of(path: Path, num_classes: int | None = None, captions: bool = False, **columns: str) -> Source:
    return open_source(config_of(type="huggingface", path=path, **columns), num_classes, captions)


def parquet_of(path: Path, values: dict[str, list[Any]]) -> Path:
    path.mkdir(exist_ok=True)
    datasets.Dataset.from_dict(values).to_parquet(path / "0.parquet")
    return path


def test_a_split_that_is_not_there_is_refused_with_those_that_are(tmp_path: Path) -> None:
    for writer, known in ((saved_splits, "it has train, holdout"), (parquet, "it has train, test")):
        (tmp_path / writer.__name__).mkdir()
        config = writer(tmp_path / writer.__name__, PICTURES).model_copy(update={"split": "validation"})
        with pytest.raises(ValueError, match=rf"has no .*split .*'validation'.*{known}"):
            open_source(config, None, captions=False)
    datasets.Dataset.from_dict({"image": [1]}, split="test").save_to_disk(tmp_path / "one")
    with pytest.raises(ValueError, match=r"one has no split 'train'; it is 'test'"):
        of(tmp_path / "one")


def test_parquet_files_without_a_split_in_their_names_are_all_train(tmp_path: Path) -> None:
    path = parquet_of(tmp_path / "x", {"image": [PNG, PNG], "text": ["one", "two"]})
    source = of(path, captions=True, caption_column="text")
    assert [source.read(i).captions for i in (0, 1)] == [("one",), ("two",)]
    assert source.read(1).data == PNG
    assert list(source.names) == ["0.parquet[0]", "0.parquet[1]"]
    with pytest.raises(ValueError, match=r"has no parquet file of a split 'test'; it has none"):
        of(path, split="test")


def test_rows_of_parquet_are_read_in_any_order(tmp_path: Path) -> None:
    source = open_source(parquet(tmp_path, PICTURES), None, captions=True)
    for i in (6, 0, 3, 3, 5, 1, 4, 2, 6):
        assert source.read(i).data == PICTURES[i].data
        assert source.read(i).captions == PICTURES[i].captions


def test_labels_may_be_names_of_classes(tmp_path: Path) -> None:
    path = parquet_of(tmp_path / "x", {"image": [PNG] * 3, "label": ["dog", "cat", "dog"]})
    source = of(path, label_column="label")
    assert source.class_names == ("cat", "dog")
    assert [source.read(i).label for i in range(3)] == [1, 0, 1]
    assert of(path).class_names == ()
    with pytest.raises(ValueError, match=r"without source\.label_column, has 0 classes"):
        of(path, num_classes=2)


def test_columns_that_do_not_fit_are_named(tmp_path: Path) -> None:
    values = {"image": [PNG], "half": [0.5], "none": [None], "text": ["a"], "blank": [" "], "number": [-1]}
    path = parquet_of(tmp_path / "x", values)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"image_column": "img"}, r"x, split train, has no column 'img'; it has image, half, none"),
        ({"label_column": "label"}, r"has no column 'label'"),
        ({"label_column": "half"}, r"must have numbers, or names of classes, in 'half'; there are float"),
        ({"label_column": "none"}, r"there are NoneType"),
        ({"label_column": "number"}, r"x, split train, has the label -1"),
        ({"captions": True}, r"name the column of the captions in source\.caption_column"),
        ({"captions": True, "caption_column": "txt"}, r"has no column 'txt'"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            of(path, **options)
    for column in ("blank", "none", "half"):
        with pytest.raises(ValueError, match=r"x: 0\.parquet\[0\] has no caption"):
            of(path, captions=True, caption_column=column).read(0)
    for column in ("text", "none"):
        with pytest.raises(ValueError, match=r"x: 0\.parquet\[0\] has no file of an image"):
            of(path, image_column=column).read(0)
    with pytest.raises(ValueError, match=r"no image in .*x, split train, which is empty"):
        of(parquet_of(tmp_path / "x", {"image": []}))


def test_images_that_a_table_only_points_at_are_read_from_their_files(tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(PNG)
    paths = [{"bytes": None, "path": name} for name in (str(tmp_path / "1.png"), "../lost.png")]
    source = of(parquet_of(tmp_path / "x", {"image": paths}))
    assert source.read(0).data == PNG
    with pytest.raises(ValueError, match=r"lost\.png cannot be read"):
        source.read(1)


def test_damaged_tables_are_named(tmp_path: Path) -> None:
    config = saved(tmp_path, PICTURES)
    for file in sorted(Path(config.path).glob("*.arrow")):
        whole = file.read_bytes()
        for size in (0, 10, len(whole) // 2):
            file.write_bytes(whole[:size])
            with pytest.raises(ValueError, match=file.name):
                open_source(config, None, captions=False)
        file.unlink()
        with pytest.raises(ValueError, match=file.name):
            open_source(config, None, captions=False)
        file.write_bytes(whole)
    (tmp_path / "saved" / "state.json").write_text("{}")
    with pytest.raises(ValueError, match=r"state\.json cannot be read"):
        open_source(config, None, captions=False)
    path = parquet_of(tmp_path / "x", {"image": [PNG] * 3})
    whole = (path / "0.parquet").read_bytes()
    (path / "0.parquet").write_bytes(whole[:-30])
    with pytest.raises(ValueError, match=r"0\.parquet cannot be read as parquet"):
        of(path)
    (path / "0.parquet").write_bytes(whole[:4] + bytes(len(whole) // 2) + whole[4 + len(whole) // 2 :])
    with pytest.raises(ValueError, match=r"0\.parquet cannot be read"):
        of(path).read(0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty holds neither what save_to_disk writes nor \.parquet files"):
        of(tmp_path / "empty")


def test_a_saved_data_set_is_what_the_library_reads(tmp_path: Path) -> None:
    theirs = datasets.load_from_disk(saved(tmp_path, PICTURES).path)
    assert isinstance(theirs, datasets.Dataset)
    source = open_source(config_of(type="huggingface", path=tmp_path / "saved", image_column="picture",
                                   label_column="kind"), 3, captions=False)  # fmt: skip
    theirs = theirs.cast_column("picture", datasets.Image(decode=False))
    assert [source.read(i).data for i in range(7)] == [row["picture"]["bytes"] for row in theirs]
    assert [source.read(i).label for i in range(7)] == theirs["kind"][:]
    assert source.class_names == CLASSES


def test_what_is_wrong_with_cocos_files_is_said(tmp_path: Path) -> None:
    config = coco(tmp_path, PICTURES)
    path = Path(config.annotations)  # type: ignore[union-attr]
    right = json.loads(path.read_text())

    def wrong(**changes: Any) -> str:
        path.write_text(json.dumps({**right, **changes}))
        with pytest.raises(ValueError, match=r"captions\.json") as caught:
            open_source(config, None, captions=True)
        return str(caught.value)

    name = PICTURES[3].name
    without = [a for a in right["annotations"] if a["image_id"] != 1000 - 3]
    assert f"{name} has no caption" in wrong(annotations=without)
    assert len(open_source(config, None, captions=False)) == len(PICTURES)
    assert "must be COCO's captions" in wrong(annotations=[{"image_id": 1000, "bbox": []}])
    assert "must be COCO's captions" in wrong(annotations=[{"image_id": 1, "caption": "x"}])
    assert "must be COCO's captions" in wrong(images=[{"id": "1000", "file_name": "x"}])
    assert "must be COCO's captions" in wrong(images=3)
    assert "no image in" in wrong(images=[], annotations=[])
    assert "leads out of it" in wrong(images=[{"id": 1000, "file_name": "../x.png"}], annotations=[])
    extra = [*right["images"], {"id": 1, "file_name": "lost.jpg"}]
    assert "1 of 8 images that" in wrong(images=extra)
    path.write_text(json.dumps([1]))
    with pytest.raises(ValueError, match="must be COCO's captions"):
        open_source(config, None, captions=True)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"captions\.json is not JSON"):
        open_source(config, None, captions=True)
    path.unlink()
    with pytest.raises(ValueError, match=r"captions\.json cannot be read"):
        open_source(config, None, captions=True)
