"""What every source keeps to, whatever the container: the same images, labels, captions and errors."""

import hashlib
import multiprocessing
import pickle
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from source_writers import (
    CLASSES,
    NUMBERED,
    SIZE,
    WITHOUT_CAPTIONS,
    WITHOUT_CLASSES,
    WRITERS,
    Picture,
    cut,
    make_pictures,
)

from dtr_ray.config.prepare import SourceConfig
from dtr_ray.data.decoding import decode
from dtr_ray.sources import Item, Source, open_source

PICTURES = make_pictures()
Write = Callable[[list[Picture]], SourceConfig]


@pytest.fixture(scope="module", params=WRITERS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def config(kind: str, tmp_path_factory: pytest.TempPathFactory) -> SourceConfig:
    """The pictures, as they are."""
    return WRITERS[kind](tmp_path_factory.mktemp(kind), PICTURES)


@pytest.fixture
def write(kind: str, tmp_path: Path) -> Write:
    return lambda pictures: WRITERS[kind](tmp_path, pictures)


def everything(source: Source) -> list[Item]:
    return [source.read(i) for i in range(len(source))]


def test_all_containers_give_the_same_images_and_labels(kind: str, config: SourceConfig) -> None:
    source = open_source(config, None, captions=False)
    items = everything(source)
    assert [item.data for item in items] == [p.data for p in PICTURES]
    labels = [0 if kind in WITHOUT_CLASSES else p.label for p in PICTURES]
    assert [item.label for item in items] == labels
    assert source.labels is not None
    assert source.labels.dtype == np.int64
    assert source.labels.tolist() == labels
    assert {item.captions for item in items} == {()}
    names = {"coco": ()} | dict.fromkeys(NUMBERED, ("0", "1", "2"))
    assert source.class_names == names.get(kind, CLASSES)
    assert len(set(source.names)) == len(source.names) == len(source) == len(PICTURES)


def test_images_decode_to_the_pixels_that_were_written(config: SourceConfig) -> None:
    source = open_source(config, 1, captions=False)
    for i, picture in enumerate(PICTURES):
        assert np.array_equal(decode(source.read(i).data, SIZE, source.names[i]), picture.pixels)


def test_all_containers_give_the_same_captions(kind: str, config: SourceConfig) -> None:
    if kind in WITHOUT_CAPTIONS:
        with pytest.raises(ValueError, match="has no captions"):
            open_source(config, None, captions=True)
        return
    source = open_source(config, None, captions=True)
    assert [item.captions for item in everything(source)] == [p.captions for p in PICTURES]
    assert source.class_names == ()
    assert source.num_classes == 1


def test_one_class_leaves_the_classes_out(config: SourceConfig) -> None:
    source = open_source(config, 1, captions=False)
    assert source.labels is not None
    assert (source.class_names, source.num_classes, set(source.labels.tolist())) == ((), 1, {0})


def test_another_number_of_classes_is_refused_with_both_numbers(kind: str, config: SourceConfig) -> None:
    found = 0 if kind in WITHOUT_CLASSES else 3
    with pytest.raises(ValueError, match=rf"num_classes is 4, but .* has {found} class"):
        open_source(config, 4, captions=False)
    if found:
        assert open_source(config, 3, captions=False).num_classes == 3


def test_a_cut_image_is_named_and_its_neighbours_are_read(kind: str, write: Write) -> None:
    source = open_source(write(cut(PICTURES, 5)), None, captions=False)
    for i, picture in enumerate(PICTURES):
        if i != 5:
            assert source.read(i).data == picture.data
    with pytest.raises(ValueError, match=r"cannot be read as an image") as caught:
        decode(source.read(5).data, SIZE, source.names[5])
    assert source.names[5] in str(caught.value)


def test_threads_read_at_the_same_time(config: SourceConfig) -> None:
    source = open_source(config, None, captions=False)
    order = np.random.default_rng(0).integers(0, len(source), 200).tolist()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(source.read, order))
    assert [item.data for item in found] == [PICTURES[i].data for i in order]


def test_the_digest_follows_the_content(config: SourceConfig, write: Write) -> None:
    assert open_source(config, None, captions=False).digest == open_source(config, 1, captions=False).digest
    other = open_source(write(cut(PICTURES, 2)), None, captions=False).digest
    assert len(other) == 16
    assert other != open_source(config, None, captions=False).digest


def test_a_relative_path_holds_in_processes_elsewhere(
    config: SourceConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(config.path).parent)
    changed = {"path": Path(config.path).name}
    if config.type == "coco":
        changed["annotations"] = Path(config.annotations).name
    source = open_source(config.model_copy(update=changed), None, captions=False)
    monkeypatch.chdir(tmp_path)
    assert pickle.loads(pickle.dumps(source)).read(3).data == PICTURES[3].data


def test_a_missing_place_is_named(config: SourceConfig) -> None:
    missing = config.model_copy(update={"path": "/nowhere/at.all"})
    with pytest.raises(ValueError, match=r"/nowhere/at\.all"):
        open_source(missing, None, captions=False)


def _sum(source: Source) -> str:
    digest = hashlib.sha256()
    for item in everything(source):
        assert isinstance(item.data, bytes)
        digest.update(item.data)
        digest.update(repr((item.label, item.captions)).encode())
    return digest.hexdigest()


def _read_in_child(pickled: bytes, sums: "multiprocessing.Queue[str]") -> None:
    sums.put(_sum(pickle.loads(pickled)))


def test_a_forked_process_reads_beside_its_parent(config: SourceConfig) -> None:
    source = open_source(config, None, captions=False)
    expected = _sum(source)
    context = multiprocessing.get_context("fork")
    sums: multiprocessing.Queue[str] = context.Queue()
    children = [context.Process(target=_read_in_child, args=(pickle.dumps(source), sums)) for _ in range(2)]
    for child in children:
        child.start()
    assert _sum(source) == expected
    assert [sums.get(timeout=30) for _ in children] == [expected] * 2
    for child in children:
        child.join(30)


_READ_ALL = """
import hashlib, pickle, sys
for source in pickle.load(open(sys.argv[1], "rb")):
    digest = hashlib.sha256()
    for i in range(len(source)):
        item = source.read(i)
        digest.update(item.data)
        digest.update(repr((item.label, item.captions)).encode())
    print(digest.hexdigest())
"""


def test_sources_of_all_kinds_are_read_by_a_fresh_process_from_small_pickles(tmp_path: Path) -> None:
    sources = []
    for kind, writer in WRITERS.items():
        (tmp_path / kind).mkdir()
        config = writer(tmp_path / kind, PICTURES)
        source = open_source(config, None, captions=kind not in WITHOUT_CAPTIONS)
        source.read(0)
        assert len(pickle.dumps(source)) < 3_000
        sources.append(source)
    (tmp_path / "sources.pickle").write_bytes(pickle.dumps(sources))
    command = [sys.executable, "-c", _READ_ALL, str(tmp_path / "sources.pickle")]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root, timeout=100)
    assert done.stdout.split() == [_sum(source) for source in sources]
