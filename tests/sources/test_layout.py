"""Names to classes: any folder as torchvision has it, and no name that leads out of an archive."""

import pickle
import posixpath
from pathlib import PurePosixPath

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dtr_ray.sources.layout import is_image, lay_out, number_classes, safe_names
from dtr_ray.sources.listing import Names

quick = settings(derandomize=True, deadline=None, max_examples=60)

PART = st.text(st.characters(blacklist_characters="/\0", blacklist_categories=["Cs"]), min_size=1, max_size=6)
SAFE = PART.filter(lambda part: part not in (".", ".."))
PATHS = st.lists(st.lists(SAFE, min_size=2, max_size=4).map("/".join), min_size=1, max_size=20, unique=True)


@quick
@given(st.lists(st.text(st.characters(), max_size=12), max_size=30))
def test_names_are_a_list_of_texts(texts: list[str]) -> None:
    names = pickle.loads(pickle.dumps(Names(texts)))
    assert list(names) == texts
    assert len(names) == len(texts)
    assert names[1:5] == texts[1:5]
    assert names[::-2] == texts[::-2]
    if texts:
        assert names[-1] == texts[-1]
    with pytest.raises(IndexError):
        names[len(texts)]


@quick
@given(PATHS)
def test_each_first_folder_is_a_class_and_paths_are_in_pathlibs_order(names: list[str]) -> None:
    layout = lay_out(names, None, "x")
    ordered = [names[i] for i in layout.order]
    assert sorted(layout.order.tolist()) == list(range(len(names)))
    assert ordered == sorted(names, key=PurePosixPath)
    assert list(layout.class_names) == sorted({name.split("/")[0] for name in names})
    assert [layout.class_names[label] for label in layout.labels] == [name.split("/")[0] for name in ordered]
    again = lay_out(names[::-1], len(layout.class_names), "x")
    assert [names[::-1][i] for i in again.order] == ordered


@quick
@given(PATHS)
def test_one_class_keeps_all_images_without_labels(names: list[str]) -> None:
    layout = lay_out(names, 1, "x")
    assert (len(layout.order), layout.class_names, set(layout.labels.tolist())) == (len(names), (), {0})


def test_images_beside_class_folders_need_a_decision() -> None:
    names = ["b/1.png", "loose.png", "a/1.png"]
    with pytest.raises(ValueError, match=r"x has images beside the class folders, such as loose\.png"):
        lay_out(names, None, "x")
    assert lay_out(names, 2, "x").order.tolist() == [2, 0]
    assert lay_out(names, 1, "x").order.tolist() == [2, 0, 1]
    with pytest.raises(ValueError, match="no image in x"):
        lay_out([], None, "x")


@quick
@given(st.lists(st.integers(-3, 6), min_size=1, max_size=10), st.none() | st.integers(1, 8))
def test_numbered_classes_are_all_numbers_up_to_the_highest(
    values: list[int], num_classes: int | None
) -> None:
    highest = max(values)
    if num_classes == 1:
        found, names = number_classes(values, 1, "x")
        assert (set(found.tolist()), names) == ({0}, ())
    elif min(values) < 0 or num_classes not in (None, highest + 1):
        with pytest.raises(ValueError, match=r"x has"):
            number_classes(values, num_classes, "x")
    else:
        found, names = number_classes(values, num_classes, "x")
        assert found.tolist() == values
        assert names == tuple(str(i) for i in range(highest + 1))


def test_a_label_without_a_name_is_refused() -> None:
    assert number_classes([0, 1], 3, "x", ["a", "b", "c"])[1] == ("a", "b", "c")
    with pytest.raises(ValueError, match=r"x has the label 3: labels are 0 to 2"):
        number_classes([0, 3], None, "x", ["a", "b", "c"])
    with pytest.raises(ValueError, match=rf"x has the label {2**70}"):
        number_classes([2**70], None, "x")


@quick
@given(
    st.lists(st.lists(PART | st.sampled_from([".", "..", "C:", ""]), max_size=4).map("/".join), max_size=5)
)
def test_names_are_below_the_top_or_refused(names: list[str]) -> None:
    leads_out = any(
        name[:1] == "/" or name[1:3] in (":/", ":\\") or ".." in name.replace("\\", "/").split("/")
        for name in names
    )
    plain = [name and posixpath.normpath(name) for name in names]
    if leads_out or len(set(plain)) < len(plain):
        with pytest.raises(ValueError, match=r"^x\.tar: .*(refused|twice)"):
            safe_names(names, "x.tar")
        return
    safe = safe_names(names, "x.tar")
    assert safe == plain
    assert not any(name.split("/")[0] in ("", "..") for name in safe if name)


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("a.png", True),
        ("a/b.JPeG", True),
        ("a.b/c", False),
        (".a.png", False),
        ("a/.b/c.png", False),
        ("__MACOSX/._a.png", False),
        ("a.png.txt", False),
        (".png", False),
        ("", False),
    ],
)
def test_images_are_known_by_their_suffix_unless_hidden(name: str, answer: bool) -> None:
    assert is_image(name) is answer
