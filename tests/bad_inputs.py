"""Bad inputs of every kind, made from valid files by a table of named mutations; always the same ones.

A case is a copy of some valid files (the ground), one of them spoilt, and a command that reads it.
"""

# A table reads best with one case a row.
# ruff: noqa: E501

import io
import json
import os
import pickle
import random
import shutil
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import yaml
from finished_sweep import make_sweep
from PIL import Image
from prepared_folders import FolderWriter
from tiny_trials import TINY

from dtr_ray.cache import cache_dir
from dtr_ray.config import SweepConfig, TrialConfig
from dtr_ray.data.identity import data_identity
from dtr_ray.export.folder import export_model
from dtr_ray.search.state import SweepState
from dtr_ray.training.reports import Report
from dtr_ray.training.state import TrainingState, checkpoint_folder

CANARY = "pickle-was-run"
"""A file that the pickles among the mutations make where they are executed."""
NO_RAY = "127.0.0.1:1"
"""RAY_ADDRESS of all cases: an input that is not refused must not start anything."""

Spoil = Callable[[Path, random.Random], None]


@dataclass(frozen=True)
class Case:
    """One bad input: what is spoilt, the command, and what it must say."""

    name: str
    needs: tuple[str, ...]
    """Parts of the ground that the command reads."""
    spoil: Callable[[Path, random.Random], None]
    """Changes the case's own copy; gets its folder."""
    command: tuple[str, ...]
    """Name of an entry point, and its arguments; files are given from the case's folder."""
    says: tuple[str, ...]
    """Texts of which the error must hold one."""
    environment: dict[str, str] = field(default_factory=dict)
    codes: tuple[int, ...] = (2,)
    slow: bool = False


class _RunsCode:
    """A pickle that makes a file when it is loaded by a loader that trusts it."""

    def __reduce__(self) -> tuple[Callable[..., int], tuple[str]]:
        return os.system, (f"touch {CANARY}",)


def _bytes(change: Callable[[bytes, random.Random], bytes]) -> Spoil:
    def spoil(path: Path, rng: random.Random) -> None:
        path.write_bytes(change(path.read_bytes(), rng))

    return spoil


def _flip(content: bytes, rng: random.Random) -> bytes:
    """One bit, not in a zip's padding at the very end."""
    position = rng.randrange(len(content) // 4, 3 * len(content) // 4)
    return content[:position] + bytes([content[position] ^ (1 << rng.randrange(8))]) + content[position + 1 :]


def _constant(content: bytes) -> Spoil:
    return _bytes(lambda before, rng: content)


def _folder(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.mkdir()


def _dangling(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def _missing(path: Path, rng: random.Random) -> None:
    path.unlink()


BYTES: dict[str, Spoil] = {
    "is empty": _constant(b""),
    "has one byte": _bytes(lambda before, rng: before[:1]),
    "is cut in half": _bytes(lambda before, rng: before[: len(before) // 2]),
    "lacks its last bytes": _bytes(lambda before, rng: before[:-7]),
    "has a bit flipped": _bytes(_flip),
    "is zeros": _bytes(lambda before, rng: bytes(len(before))),
    "is noise": _bytes(lambda before, rng: rng.randbytes(min(len(before), 4096))),
    "is text": _constant(b"hello, world\n"),
    "is a web page": _constant(b"<!DOCTYPE html><html><body>404 Not Found</body></html>\n"),
    "is a pickle": _constant(pickle.dumps(_RunsCode(), protocol=2)),
    "is another's json": _constant(b'{"hello": [1, 2, {"world": null}]}'),
    "is a json list": _constant(b"[1, 2, 3]"),
    "is json null": _constant(b"null"),
    "is json too deep": _constant(b"[" * 100_000),
    "is not utf-8": _constant(b'{"name": "\xff\xfe\xfa"}'),
    "is a folder": _folder,
    "is a dangling link": _dangling,
    "is missing": _missing,
}
_JSON = [name for name in BYTES if name not in ("has a bit flipped", "has one byte")]
_BINARY = [name for name in BYTES if not name.startswith(("is json", "is a json", "is not utf-8"))]


def build_ground(root: Path) -> Path:
    """Valid files of every kind; takes seconds."""
    root.mkdir(parents=True)
    before = Path.cwd()
    os.chdir(root)
    try:
        _write_ground()
    finally:
        os.chdir(before)
    return root


def _write_ground() -> None:
    _yaml("trial.yaml", {**TINY, "routing": {"name": "dtr", "alpha": 2.0}})
    sweep = SweepConfig.from_dict({"name": "tiny", "trial": TINY, "storage": {"output": "sweeps"},
                                   "space": {"routing.alpha": {"type": "uniform", "low": 1.0, "high": 8.0}},
                                   "search": {"num_trials": 2}})  # fmt: skip
    _yaml("sweep.yaml", sweep.to_dict())
    folder = make_sweep(Path("sweeps"), **sweep.to_dict())
    best = json.loads((folder / "best.json").read_text(encoding="utf-8"))
    (folder / "journal.jsonl").unlink(missing_ok=True)
    state = SweepState(sweep, folder, data_identity(sweep.trial.data, cache_dir()))
    trial = state.next_trial()
    assert not isinstance(trial, str)
    state.report(trial.trial_id, Report(6, {best["metric"]: best["value"]}, "checkpoints/00000006", "", {}))
    state.finish(trial.trial_id, "completed")
    state.close()
    (folder / "trials.csv").write_text("trial_id,status\nt0000,completed\n", encoding="utf-8")
    shutil.copytree(folder / "trials" / "t0000", "run")
    # A second checkpoint, to go back to.
    config = TrialConfig.load(Path("run/trial.json"))
    earlier = TrainingState.build(config, "cpu")  # type: ignore[arg-type]
    earlier.step = 3
    earlier.save(checkpoint_folder(Path("run"), 3), config)
    export_model(Path("run"), Path("model"))
    _write_images()
    pixels = np.random.default_rng(0).integers(0, 256, (24, 3, 8, 8), dtype=np.uint8)
    prepared = FolderWriter(Path("prepared/tiny"), [16, 8], 8, 2).pixels(pixels).reference(pixels)
    prepared.write()
    _yaml("prepared.yaml", {**TINY, "data": prepared.data()})
    _yaml("prepared-data.yaml", _data("folder", "images", output="prepared"))
    size = 6
    np.savez("affinity.npz", affinity=np.eye(size), timesteps=np.arange(0, 600, 100), num_timesteps=1000)
    intervals = {"name": "affinity", "from": "affinity.npz"}
    _yaml(
        "affinity.yaml", {**TINY, "weighting": {"name": "ant_uw", "num_clusters": 2, "intervals": intervals}}
    )


def _write_images() -> None:
    """A folder of images in two classes, and archives of them."""
    rng = np.random.default_rng(0)
    for number in range(12):
        path = Path("images") / "ab"[number % 2] / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(path)
    names = sorted(p.as_posix() for p in Path("images").rglob("*.png"))
    with zipfile.ZipFile("images.zip", "w") as archive:
        for name in names:
            archive.write(name, name.removeprefix("images/"))
    for suffix in ("tar", "tar.gz"):
        with tarfile.open(f"images.{suffix}", f"w:{suffix[4:]}") as tar:
            for name in names:
                tar.add(name, name.removeprefix("images/"))
    for kind in ("zip", "tar", "tar.gz"):
        _yaml(f"{kind}.yaml", _data("archive", f"images.{kind}"))
    _yaml("data.yaml", _data("folder", "images"))
    section = {"name": "folder", "path": "images", "resolution": 8, "num_classes": 2}
    _yaml("images.yaml", {**TINY, "data": section})


def _data(kind: str, path: str, output: str = "out") -> dict[str, object]:
    source = {"type": kind, "path": path}
    return {
        "name": "tiny",
        "source": source,
        "resolution": 8,
        "features": [],
        "shard_images": 16,
        "max_corrupt": 2,
        "output": output,
    }


def _yaml(path: str, values: object) -> None:
    Path(path).write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")


def _file_cases(
    file: str,
    mutations: list[str],
    needs: tuple[str, ...],
    command: tuple[str, ...],
    quick: tuple[str, ...] = (),
    **more: object,
) -> Iterator[Case]:
    """A case for each mutation of one file."""
    for mutation in mutations:
        spoil = BYTES[mutation]
        says = more.get("says", (Path(file).name,))
        yield Case(
            f"{command[0]}: {file} {mutation}",
            needs,
            lambda root, rng, spoil=spoil: spoil(root / file, rng),
            command,
            says,  # type: ignore[arg-type]
            slow=mutation not in quick,
            codes=more.get("codes", (2,)),  # type: ignore[arg-type]
        )


def _text(
    name: str,
    file: str,
    change: Callable[[str], str],
    command: tuple[str, ...],
    needs: tuple[str, ...],
    *says: str,
    slow: bool = False,
    codes: tuple[int, ...] = (2,),
) -> Case:
    """A case that changes a file as text."""

    def spoil(root: Path, rng: random.Random) -> None:
        path = root / file
        before = path.read_text(encoding="utf-8")
        after = change(before)
        assert after != before, name
        path.write_text(after, encoding="utf-8")

    return Case(f"{command[0]}: {name}", needs, spoil, command, says, slow=slow, codes=codes)


def _json(
    name: str,
    file: str,
    change: Callable[[dict], object],
    command: tuple[str, ...],
    needs: tuple[str, ...],
    *says: str,
    slow: bool = False,
) -> Case:
    """A case that changes a file as JSON: `change` returns the new content, or None where it changed it."""

    def on_text(before: str) -> str:
        values = json.loads(before)
        changed = change(values)
        return json.dumps(values if changed is None else changed)

    return _text(name, file, on_text, command, needs, *(says or (Path(file).name,)), slow=slow)


def _env(
    name: str,
    environment: dict[str, str],
    command: tuple[str, ...],
    needs: tuple[str, ...],
    *says: str,
    **more: object,
) -> Case:
    return Case(f"{command[0]}: {name}", needs, lambda root, rng: None, command, says, environment, **more)  # type: ignore[arg-type]


DRY = ("sweep", "sweep.yaml", "--dry-run")
RESUME = ("sweep", "sweep.yaml", "--resume")
TRAIN = ("train", "trial.yaml", "--output", "out")
GO_ON = ("train", "trial.yaml", "--output", "run", "--resume")
TRAIN_BEST = ("train_best", "sweeps/tiny", "--output", "out")
EVALUATE = ("evaluate", "run/checkpoints/00000006")
SAMPLE = ("sample", "run/checkpoints/00000006", "--num", "2", "--output", "out/grid.png")
SAMPLE_EXPORT = ("sample", "model", "--num", "2", "--output", "out/grid.png")
PREPARE = ("prepare", "data.yaml", "--dry-run")
VERIFY = ("prepare", "prepared-data.yaml", "--verify")
TRAIN_PREPARED = ("train", "prepared.yaml", "--output", "out")
COMPARE = ("analyze", "compare", "sweeps/tiny")
AFFINITY = ("train", "affinity.yaml", "--output", "out")
TRAIN_IMAGES = ("train", "images.yaml", "--output", "out")


def cases() -> list[Case]:
    """All of them."""
    found = [
        *_yaml_cases(),
        *_checkpoint_cases(),
        *_export_cases(),
        *_sweep_cases(),
        *_prepared_cases(),
        *_image_cases(),
        *_archive_cases(),
        *_environment_cases(),
        *_address_cases(),
        *_option_cases(),
    ]
    names = [case.name for case in found]
    assert len(set(names)) == len(names)
    return found


_YAML_TEXTS: dict[str, str] = {
    "is an alias bomb": "a: &a [x,x,x,x,x,x,x,x,x]\n"
    + "".join(
        f"{b}: &{b} [*{a},*{a},*{a},*{a},*{a},*{a},*{a},*{a},*{a}]\n"
        for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    ),
    "runs code by a tag": f"!!python/object/apply:os.system ['touch {CANARY}']\n",
    "makes an object by a tag": "name: !!python/name:os.system ''\n",
    "holds two documents": "name: a\n---\nname: b\n",
    "is a list": "- a\n- b\n",
    "has a key twice": "name: a\nname: b\n",
    "has an unknown key": "nam: a\n",
    "is indented with tabs": "trial:\n\tdata: 1\n",
}


def _yaml_cases() -> Iterator[Case]:
    quick = ("is empty", "is noise", "is a pickle", "is a folder")
    kinds = [
        "is empty",
        "is zeros",
        "is noise",
        "is text",
        "is a web page",
        "is a pickle",
        "is a json list",
        "is json null",
        "is json too deep",
        "is not utf-8",
        "is a folder",
        "is a dangling link",
        "is missing",
    ]
    for file, command, needs in (
        ("sweep.yaml", DRY, ("sweep.yaml",)),
        ("trial.yaml", TRAIN, ("trial.yaml",)),
        ("data.yaml", PREPARE, ("data.yaml", "images")),
    ):
        yield from _file_cases(file, kinds, needs, command, quick)
        for name, text in _YAML_TEXTS.items():
            yield _text(f"{file} {name}", file, lambda before, text=text: text, command, needs, file)
    yield from _value_cases()


def _value_cases() -> Iterator[Case]:
    """Values that lead out of their folder, or cannot be."""
    for value in ("../../evil", "/tmp/evil", "a/b", "..", "a\\0b", "x" * 300, ".hidden", "-rf", "a b"):
        shown = value.replace("\\0", "\0")
        for file, command, needs in (
            ("sweep.yaml", DRY, ("sweep.yaml",)),
            ("data.yaml", PREPARE, ("data.yaml", "images")),
        ):
            yield _text(
                f"{file} has the name {value[:12]!r}",
                file,
                lambda before, v=shown: before.replace("name: tiny", f"name: {json.dumps(v)}", 1),
                command,
                needs,
                "name",
            )
    wrong = {
        "trial.yaml": (TRAIN, {
            "resolution: 8": ["resolution: -8", "resolution: 1e99", "resolution: .nan", "resolution: '8'", "resolution: [8]", "resolution: null"],
            "num_steps: 6": ["num_steps: 0", "num_steps: 6.5", "num_steps: {a: 1}", "num_steps: 999999999999999999999999"],
            "name: digits": ["name: digitz", "name: 5", "name: folder", "name: prepared"],
            "lr: 0.003": ["lr: .inf", "lr: -1", "lr: true"],
            "sampler: ddim": ["sampler: ''", "sampler: ddim2"],
        }),
        "data.yaml": (PREPARE, {
            "type: folder": ["type: foldr", "type: archive", "type: webdataset", "type: imagenet", "type: huggingface"],
            "path: images": ["path: nowhere", "path: ''", "path: data.yaml", "path: \"a\\0b\"", "path: " + "x" * 5000],
            "resolution: 8": ["resolution: 0", "resolution: 8.5"],
            "features: []": ["features: [resnet]", "features: 5"],
        }),
    }  # fmt: skip
    for file, (command, changes) in wrong.items():
        for before, values in changes.items():
            for value in values:
                yield _text(
                    f"{file} says {value[:40]}",
                    file,
                    lambda text, b=before, v=value: text.replace(b, v, 1),
                    command,
                    (file, "images"),
                    before.partition(":")[0],
                    value.partition(":")[2].strip(" '\"")[:30] or "path",
                    *(["images"] if "type" in before else []),
                    *(["the folder"] if "\\0" in value else []),
                    slow=value not in values[:2],
                )


def _checkpoint_cases() -> Iterator[Case]:
    quick = ("is cut in half", "has a bit flipped", "is a pickle", "is missing")
    folder = "run/checkpoints/00000006"
    for file in ("ema.safetensors", "training.pt", "trial.json"):
        some = (
            _BINARY
            if file == "ema.safetensors"
            else [
                "is empty",
                "is cut in half",
                "has a bit flipped",
                "is a pickle",
                "is missing",
                "is a folder",
            ]
        )
        some = [m for m in some if not (file == "training.pt" and m in ("is missing", "is a folder"))]
        command = EVALUATE if file == "training.pt" else SAMPLE
        yield from _file_cases(f"{folder}/{file}", some, ("run",), command, quick)
    yield from _file_cases(
        f"{folder}/manifest.json",
        [m for m in _JSON if m != "is missing"],
        ("run",),
        SAMPLE,
        ("is empty", "is a json list", "is json null", "is json too deep"),
    )
    for file in ("ema.safetensors", "training.pt", "trial.json"):
        for mutation in _BINARY if file == "ema.safetensors" else _BINARY[:4] + ["is a pickle", "is missing"]:
            yield _signed(f"{folder}/{file}", mutation, SAMPLE, quick=mutation == "is a pickle")
    for name, change in {
        "of wrong shapes": _wrong_shapes,
        "of another model": _other_keys,
        "with a header of 2^60 bytes": _huge_header,
    }.items():
        for signed in (True, False):
            yield Case(
                f"sample: weights {name}{', with its checksum' if signed else ''}", ("run",),
                lambda root, rng, change=change, signed=signed: _spoil_weights(root / folder, change, signed),
                SAMPLE, ("ema.safetensors",), slow=not signed,
            )  # fmt: skip
    back = ("going back to the one before it", "is damaged")
    for file in ("ema.safetensors", "model.safetensors", "training.pt", "trial.json", "manifest.json"):
        yield from _file_cases(
            f"{folder}/{file}",
            ["is cut in half", "has a bit flipped", "is a pickle", "is missing"],
            ("run", "trial.yaml"),
            GO_ON,
            says=back,
            codes=(0,),
        )
    for mutation in ("is a json list", "is json null", "is json too deep", "is another's json"):
        yield from _file_cases(
            f"{folder}/manifest.json",
            [mutation],
            ("run", "trial.yaml"),
            GO_ON,
            ("is json null",) if mutation == "is json null" else (),
            says=back,
            codes=(0,),
        )
    for name, line in {
        "a list": "[1]",
        "another's": '{"hello": 1}',
        "too deep": "[" * 100_000,
        "no json": "hello",
        "of text": '{"step": 3, "metrics": {"m": "low"}, "checkpoint": "", "grid": ""}',
        "of an odd step": '{"step": "3", "metrics": {}, "checkpoint": "", "grid": ""}',
    }.items():
        yield _text(
            f"reports.jsonl with a line that is {name}",
            "run/reports.jsonl",
            lambda before, line=line: f"{line}\n{before}",
            GO_ON,
            ("run", "trial.yaml"),
            "reports.jsonl:1",
            slow=name != "a list",
        )
    for mutation in (
        "is noise",
        "is a json list",
        "is another's json",
        "is json too deep",
        "is a folder",
        "is not utf-8",
        "is a pickle",
    ):
        # What does not end a line was torn by a crash and counts as never written.
        torn = mutation in ("is a json list", "is another's json", "is json too deep")
        if mutation != "is noise" and not torn:
            yield from _file_cases(
                "run/reports.jsonl", [mutation], ("run", "trial.yaml"), GO_ON, says=("reports.jsonl",)
            )
        yield from _file_cases(
            "run/trial.json",
            [mutation],
            ("run", "trial.yaml"),
            GO_ON,
            ("is a json list",),
            says=("trial.json",),
        )


def _signed(file: str, mutation: str, command: tuple[str, ...], quick: bool, needs: str = "run") -> Case:
    """A spoilt file of a checkpoint whose manifest says that it is right: what a stranger would send."""

    def spoil(root: Path, rng: random.Random) -> None:
        BYTES[mutation](root / file, rng)
        (root / command[1] / "manifest.json").unlink()

    codes = (
        (0, 2)
        if mutation == "has a bit flipped"
        or file.endswith(("training.pt", "scheduler_config.json", "transformer/config.json"))
        else (2,)
    )
    says = (Path(file).name, "model/transformer", *(["samples of"] if codes != (2,) else []))
    return Case(
        f"{command[0]}: {file} {mutation}, without checksums",
        (needs,),
        spoil,
        command,
        says,
        codes=codes,
        slow=not quick,
    )


def _spoil_weights(folder: Path, change: Callable[[bytes], bytes], signed: bool) -> None:
    import hashlib

    path, manifest = folder / "ema.safetensors", folder / "manifest.json"
    path.write_bytes(change(path.read_bytes()))
    if signed:
        sums = json.loads(manifest.read_text())
        sums[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
        manifest.write_text(json.dumps(sums))


def _wrong_shapes(content: bytes) -> bytes:
    from safetensors.torch import load, save

    return save(
        {
            name: value.flatten()[:-1].contiguous() if value.ndim else value
            for name, value in load(content).items()
        }
    )


def _other_keys(content: bytes) -> bytes:
    from safetensors.torch import load, save

    return save({f"other.{name}": value for name, value in load(content).items()})


def _huge_header(content: bytes) -> bytes:
    return struct.pack("<Q", 2**60) + content[8:]


def _export_cases() -> Iterator[Case]:
    for file in (
        "model_index.json",
        "transformer/config.json",
        "scheduler/scheduler_config.json",
        "trial.json",
    ):
        kinds = [
            "is empty",
            "is cut in half",
            "is a pickle",
            "is another's json",
            "is a json list",
            "is json null",
            "is json too deep",
            "is not utf-8",
            "is a folder",
        ]
        yield from _file_cases(
            f"model/{file}",
            kinds,
            ("model",),
            SAMPLE_EXPORT,
            ("is a json list",),
            says=(Path(file).name, "model"),
        )
        for mutation in (
            "is cut in half",
            "is a pickle",
            "is another's json",
            "is a json list",
            "is json null",
            "is json too deep",
        ):
            if file != "model_index.json":
                yield _signed(f"model/{file}", mutation, SAMPLE_EXPORT, quick=False, needs="model")
    for mutation in ("is empty", "is cut in half", "is a pickle", "is zeros", "is a folder", "is missing"):
        yield _signed(
            "model/transformer/diffusion_pytorch_model.safetensors",
            mutation,
            SAMPLE_EXPORT,
            quick=mutation == "is a pickle",
            needs="model",
        )
    yield from _file_cases(
        "model/transformer/diffusion_pytorch_model.safetensors",
        _BINARY,
        ("model",),
        SAMPLE_EXPORT,
        ("has a bit flipped", "is a pickle"),
        says=("diffusion_pytorch_model", "model"),
    )


def _sweep_cases() -> Iterator[Case]:
    needs = ("sweeps", "sweep.yaml")
    for file in ("best.json", "sweep.json"):
        yield from _file_cases(
            f"sweeps/tiny/{file}",
            [m for m in _JSON if m != "is missing"],
            needs,
            TRAIN_BEST,
            ("is empty", "is a json list", "is json too deep", "is another's json"),
            says=(file, "has no best trial yet", "has no sweep.json"),
        )
    best = "sweeps/tiny/best.json"
    yield _json("best.json without a config", best, lambda v: v.pop("config") and None, TRAIN_BEST, needs)
    yield _json(
        "best.json with a config that is none",
        best,
        lambda v: v.update(config={"model": 5}),
        TRAIN_BEST,
        needs,
    )
    yield _json(
        "best.json with a value that is text", best, lambda v: v.update(value="low"), TRAIN_BEST, needs
    )
    yield _json(
        "best.json with a checkpoint that is a number",
        best,
        lambda v: v.update(checkpoint=5),
        TRAIN_BEST,
        needs,
    )
    yield _json(
        "best.json whose checkpoint is elsewhere",
        best,
        lambda v: v.update(checkpoint="../../run/checkpoints/00000006"),
        ("evaluate", "sweeps/tiny"),
        (*needs, "run"),
        "best.json",
    )
    yield _json(
        "best.json whose checkpoint is absolute",
        best,
        lambda v: v.update(checkpoint="/etc"),
        ("evaluate", "sweeps/tiny"),
        needs,
        "best.json",
    )
    for mutation in (
        "is empty",
        "is a json list",
        "is json too deep",
        "is another's json",
        "is not utf-8",
        "is a folder",
    ):
        yield from _file_cases(
            best,
            [mutation],
            needs,
            ("evaluate", "sweeps/tiny"),
            ("is a json list",),
            says=("best.json", "holds no trained model"),
        )
    for mutation in (
        "is cut in half",
        "is a json list",
        "is another's json",
        "is json too deep",
        "is not utf-8",
        "is noise",
        "is a folder",
    ):
        yield from _file_cases("sweeps/tiny/sweep.json", [mutation], needs, RESUME, ("is a json list",))
        yield from _file_cases("sweeps/tiny/sweep.json", [mutation], needs, COMPARE, ("is a json list",))
    lines = {
        "with a line that is no json": lambda t: t.replace("\n", "\nnot json\n", 1),
        "with a line that is a list": lambda t: t.replace("\n", "\n[1]\n", 1),
        "with an event without a kind": lambda t: t.replace("\n", '\n{"time": 5}\n', 1),
        "with a report of an unknown trial": lambda t: (
            t
            + '{"event": "report", "time": 1, "id": "t9", "step": 1, "metrics": {}, "checkpoint": "", "wall_s": 0, "stop": null}\n'
        ),
        "with a trial without params": lambda t: (
            t + '{"event": "trial", "time": 1, "id": "t0001", "number": 1}\n'
        ),
        "with noise in the middle": lambda t: t[:50] + "\ufffd\x01" + t[52:],
        "nested too deep": lambda t: "[" * 100_000 + "\n" + t,
    }
    for name, change in lines.items():
        for command in (RESUME, COMPARE):
            yield _text(
                f"journal.jsonl {name}",
                "sweeps/tiny/journal.jsonl",
                change,
                command,
                needs,
                "journal.jsonl",
                slow=name != "with a line that is no json",
            )
    for mutation in ("is zeros", "is not utf-8", "is a folder"):
        for command in (RESUME, COMPARE):
            yield from _file_cases(
                "sweeps/tiny/journal.jsonl",
                [mutation],
                needs,
                command,
                says=("journal.jsonl", "no trial", "Ray cluster"),
            )
    for mutation in ("is empty", "is noise", "is a pickle"):
        # Written anew from the journal: the sweep gets as far as Ray, which is not there.
        yield from _file_cases("sweeps/tiny/trials.csv", [mutation], needs, RESUME, says=("Ray cluster",))


def _prepared_cases() -> Iterator[Case]:
    needs, manifest = (
        ("prepared", "prepared.yaml", "prepared-data.yaml", "images"),
        "prepared/tiny/manifest.json",
    )
    for command in (VERIFY, TRAIN_PREPARED):
        yield from _file_cases(
            manifest,
            [m for m in _JSON if m != "is missing"]
            if command == VERIFY
            else ["is empty", "is a json list", "is json too deep"],
            needs,
            command,
            ("is empty", "is a json list", "is json too deep"),
        )
    for file in ("labels.npy", "pixels/00001.npy", "references/efficientnet_lite0.npz"):
        yield from _file_cases(
            f"prepared/tiny/{file}",
            ["is empty", "has a bit flipped", "is cut in half", "is a pickle", "is missing", "is a folder"],
            needs,
            VERIFY,
            ("has a bit flipped", "is a pickle"),
            codes=(1,),
        )
        yield from _file_cases(
            f"prepared/tiny/{file}",
            ["is empty", "is cut in half", "is missing", "is a folder"],
            needs,
            TRAIN_PREPARED,
            ("is cut in half",),
        )
        for mutation in ("is zeros", "is noise", "is a pickle"):
            yield _sized(f"prepared/tiny/{file}", mutation, TRAIN_PREPARED, needs)
    leads = {"../../trial.yaml": "above", "/etc/hostname": "absolute"}
    for path, how in leads.items():
        yield _json(
            f"a manifest's file {how}",
            manifest,
            lambda v, p=path: v["files"].update({p: {"sha256": "0", "num_bytes": 1}}),
            VERIFY,
            needs,
            "manifest.json",
        )
        yield _json(
            f"a manifest's shard {how}",
            manifest,
            lambda v, p=path: v["shards"][0].update(pixels=p),
            TRAIN_PREPARED,
            needs,
            "manifest.json",
        )
        yield _json(
            f"a manifest's reference {how}",
            manifest,
            lambda v, p=path: v["references"]["efficientnet_lite0"].update(statistics=p),
            TRAIN_PREPARED,
            needs,
            "manifest.json",
        )
    yield _json(
        "a manifest of more images than its shards have",
        manifest,
        lambda v: v.update(num_images=10**9),
        TRAIN_PREPARED,
        needs,
        "manifest.json",
        "labels.npy",
    )
    yield _json(
        "a manifest of negative shards",
        manifest,
        lambda v: v["shards"][0].update(num_images=-16),
        TRAIN_PREPARED,
        needs,
        "manifest.json",
    )
    yield _json(
        "a manifest of shards without files",
        manifest,
        lambda v: v.update(shards=[]),
        TRAIN_PREPARED,
        needs,
        "manifest.json",
        "labels.npy",
    )
    yield _json(
        "a manifest of another format",
        manifest,
        lambda v: v.update(format=99),
        VERIFY,
        needs,
        "manifest.json",
    )


def _sized(file: str, mutation: str, command: tuple[str, ...], needs: tuple[str, ...]) -> Case:
    """A spoilt file of a prepared folder, as large as it was: only its content is wrong."""

    def spoil(root: Path, rng: random.Random) -> None:
        path = root / file
        size = path.stat().st_size
        BYTES[mutation](path, rng)
        path.write_bytes(path.read_bytes()[:size].ljust(size, b"\0"))

    return Case(
        f"{command[0]}: {file} {mutation} of its size",
        needs,
        spoil,
        command,
        (Path(file).name,),
        slow=mutation != "is a pickle",
    )


def _bomb_png(content: bytes) -> bytes:
    """A PNG that says it has 60,000 x 60,000 pixels."""
    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + head + struct.pack(">I", zlib.crc32(b"IHDR" + head))
    return content[:8] + chunk + content[33:]


IMAGES: dict[str, Callable[[bytes], bytes]] = {
    "is empty": lambda c: b"",
    "is cut in half": lambda c: c[: len(c) // 2],
    "is noise": lambda c: random.Random(0).randbytes(400),
    "is text": lambda c: b"no image",
    "is a pickle": lambda c: pickle.dumps(_RunsCode(), protocol=2),
    "is a bomb of 3.6 gigapixels": _bomb_png,
    "has no pixels": lambda c: c[:33] + c[-12:],
    "has a broken checksum": lambda c: c[:60] + bytes([c[60] ^ 255]) + c[61:],
    "is an SVG": lambda c: (
        b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
    ),
    "is an EPS": lambda c: (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(touch " + CANARY.encode() + b") run\n"
    ),
}


def _image_cases() -> Iterator[Case]:
    for name, change in IMAGES.items():

        def spoil(root: Path, rng: random.Random, change: Callable[[bytes], bytes] = change) -> None:
            for path in sorted((root / "images").rglob("*.png")):
                path.write_bytes(change(path.read_bytes()))

        yield Case(
            f"prepare: every image {name}",
            ("images", "data.yaml"),
            spoil,
            PREPARE,
            (".png",),
            slow=name != "is a bomb of 3.6 gigapixels",
        )
        yield Case(
            f"train: every image {name}",
            ("images", "images.yaml"),
            spoil,
            TRAIN_IMAGES,
            (".png",),
            slow=name != "is a bomb of 3.6 gigapixels",
        )
    yield Case(
        "train: no image at all",
        ("images", "images.yaml"),
        lambda root, rng: shutil.rmtree(root / "images/a"),
        TRAIN_IMAGES,
        ("images",),
    )
    for mutation in _BINARY:
        yield from _file_cases(
            "affinity.npz",
            [mutation],
            ("affinity.npz", "affinity.yaml"),
            AFFINITY,
            ("is a pickle",),
            codes=(0, 2) if "bit" in mutation else (2,),
            says=("affinity.npz", "results"),
        )


def _zip(path: Path, members: dict[str, bytes], links: dict[str, str]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)
        for name, aim in links.items():
            info = zipfile.ZipInfo(name)
            info.external_attr = (stat.S_IFLNK | 0o777) << 16
            archive.writestr(info, aim)


def _tar(path: Path, members: dict[str, bytes], links: dict[str, str]) -> None:
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for name, aim in links.items():
            for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
                info = tarfile.TarInfo(name)
                info.type, info.linkname = kind, aim
                archive.addfile(info)


ARCHIVES: dict[str, tuple[dict[str, bytes], dict[str, str]]] = {
    "with ..": ({"../../evil.png": b"x"}, {}),
    "with .. inside": ({"a/../../../evil.png": b"x"}, {}),
    "with an absolute member": ({"/tmp/evil.png": b"x"}, {}),
    "with a Windows drive": ({"C:\\evil.png": b"x"}, {}),
    "with ..\\": ({"..\\..\\evil.png": b"x"}, {}),
    "with a link": ({}, {"a/evil.png": "/etc/passwd"}),
    "with a link upwards": ({}, {"a/evil.png": "../../../etc/passwd"}),
    "without images": ({"readme.txt": b"hello"}, {}),
    "with a name twice": ({"a/1.png": b"x", "./a/1.png": b"y"}, {}),
    "with labels that are none": ({"a/1.png": b"x", "dataset.json": b'{"labels": [["a/1.png", "two"]]}'}, {}),
    "with labels too deep": ({"a/1.png": b"x", "dataset.json": b"[" * 100_000}, {}),
    "of a bomb": ({f"a/{n}.png": bytes(50_000_000) for n in range(2)}, {}),
}


def _archive_cases() -> Iterator[Case]:
    for kind, write in (("zip", _zip), ("tar", _tar)):
        command, needs = ("prepare", f"{kind}.yaml", "--dry-run"), (f"images.{kind}", f"{kind}.yaml")
        for name, (members, links) in ARCHIVES.items():

            def spoil(
                root: Path,
                rng: random.Random,
                write: object = write,
                kind: str = kind,
                members: object = members,
                links: object = links,
            ) -> None:
                write(root / f"images.{kind}", members, links)  # type: ignore[operator]

            yield Case(
                f"prepare: a {kind} {name}",
                needs,
                spoil,
                command,
                (f"images.{kind}", "dataset.json"),
                slow=name in ("of a bomb", "without images", "with a name twice"),
            )
    for kind in ("zip", "tar", "tar.gz"):
        command, needs = ("prepare", f"{kind}.yaml", "--dry-run"), (f"images.{kind}", f"{kind}.yaml")
        kinds = [
            m
            for m in _BINARY
            if m not in ("has a bit flipped", "has one byte", "is a dangling link")
            and (kind, m) != ("tar", "lacks its last bytes")
        ]
        yield from _file_cases(f"images.{kind}", kinds, needs, command, ("is cut in half", "is a pickle"))


def _environment_cases() -> Iterator[Case]:
    needs = ("run", "trial.yaml", "sweep.yaml", "sweeps")
    for value in (
        "nonsense://x y",
        "http://127.0.0.1:1",
        "http://[::bad",
        "sqlite:////proc/no/where.db",
        "file:///nowhere",
        "postgresql://user:hunter2-secret@127.0.0.1:1/db",
        "databricks",
        "\x01\x02",
    ):
        yield _env(
            f"MLFLOW_TRACKING_URI={value!r}",
            {"MLFLOW_TRACKING_URI": value},
            ("evaluate", "runs:/" + "0" * 32),
            needs,
            "MLFLOW_TRACKING_URI",
            "MLflow",
            slow=True,
        )
        yield _env(
            f"MLFLOW_TRACKING_URI={value!r} for an experiment",
            {"MLFLOW_TRACKING_URI": value},
            ("train_best", "--experiment", "tiny"),
            needs,
            "MLFLOW_TRACKING_URI",
            "MLflow",
            slow=value != "nonsense://x y",
        )
    for value in ("trial.yaml", "trial.yaml/below", "/proc/nowhere", "/dev/null", "x" * 5000):
        yield _env(
            f"DTR_RAY_CACHE={value[:20]!r}",
            {"DTR_RAY_CACHE": value},
            TRAIN,
            needs,
            "DTR_RAY_CACHE",
            slow=value != "trial.yaml",
        )
    for value in (
        "nonsense",
        "127.0.0.1:1",
        "127.0.0.1:99999",
        "ray://nowhere.invalid:10001",
        "http://x",
        "host:port",
        ":6379",
        "\x01",
    ):
        yield _env(
            f"RAY_ADDRESS={value!r}",
            {"RAY_ADDRESS": value},
            RESUME,
            needs,
            "RAY_ADDRESS",
            slow=value == "ray://nowhere.invalid:10001",
        )
    inception = ("--set", "evaluation.features=inception", "--set", "evaluation.num_samples=16")
    for name in ("DTR_RAY_MIRROR", "HF_ENDPOINT"):
        for value in (
            "nonsense",
            "http://127.0.0.1:1",
            "file:///etc/passwd",
            "ftp://x y",
            "http://[bad",
            "http://127.0.0.1:99999",
        ):
            if name == "DTR_RAY_MIRROR":
                command = (
                    *RESUME[:2],
                    "--output",
                    "out",
                    *[w.replace("evaluation", "trial.evaluation") for w in inception],
                )
            else:
                command = (
                    "sweep",
                    "sweep.yaml",
                    "--output",
                    "out",
                    "--set",
                    "trial.data.vae=someone/vae",
                    "--set",
                    "trial.data.resolution=64",
                    "--set",
                    "trial.model.patch_size=2",
                    "--set",
                    "trial.sampling.clip_denoised=false",
                )
            offline = {
                "HF_HUB_OFFLINE": "0",
                "DTR_RAY_OFFLINE": "0",
                "DTR_RAY_CACHE": "out/cache",
                "HF_HOME": "out/hf",
            }
            yield _env(
                f"{name}={value!r}",
                {name: value, **offline},
                command,
                needs,
                name,
                value,
                slow=value != "nonsense",
            )
    for value in ("yaml", "JSON ", "\x01"):
        yield _env(f"DTR_RAY_LOG={value!r}", {"DTR_RAY_LOG": value}, DRY, needs, "DTR_RAY_LOG")


def _address_cases() -> Iterator[Case]:
    addresses = (
        "nonsense",
        "http://",
        "http://127.0.0.1:99999",
        "http://[::bad",
        "http://user:hunter2-secret@127.0.0.1:1",
        "ray://nowhere.invalid:10001",
        "127.0.0.1:1",
        "local",
        "\x01",
    )
    for value in addresses:
        words = ("sweep", "--list", "--address", value)
        says = ("ADDRESS", "--address", "does not answer")
        yield _env(f"--address {value!r}", {}, words, (), *says, slow=value != "nonsense")
        given = {"RAY_API_SERVER_ADDRESS": value}
        yield _env(f"RAY_API_SERVER_ADDRESS={value!r}", given, words[:2], (), *says, slow=True)


def _option_cases() -> Iterator[Case]:
    needs = ("run", "trial.yaml", "sweep.yaml", "sweeps", "images", "data.yaml")
    words = [
        "",
        "=",
        "a",
        "routing=",
        "routing.alpha",
        "routing.alpha=[",
        "routing.alpha=!!python/name:os.system",
        "..=1",
        "a.b.c.d=1",
        "training=5",
    ]
    for word in words:
        yield _env(
            f"--set {word!r}",
            {},
            (*TRAIN, "--set", word),
            needs,
            "--set",
            slow=word not in ("=", "routing.alpha=["),
        )
    for output in ("trial.yaml", "trial.yaml/below", "/proc/nowhere/x", "/dev/null/x", "x" * 300):
        yield _env(
            f"--output {output[:20]!r}",
            {},
            ("train", "trial.yaml", "--output", output),
            needs,
            output[:200].partition("\0")[0],
            slow=output != "trial.yaml",
        )
    for output in ("trial.yaml/g.png", "/proc/nowhere/g.png", "out.txt"):
        yield _env(
            f"--output {output!r}",
            {},
            (*SAMPLE[:2], "--num", "2", "--output", output),
            needs,
            output.rpartition("/")[0] or output,
            slow=output != "trial.yaml/g.png",
        )
    for checkpoint in (
        "",
        "trial.yaml",
        "nowhere",
        "/proc",
        "runs:/",
        "models:/",
        "models:/a/b/c",
        "runs:/../../x",
    ):
        yield _env(
            f"{checkpoint!r}",
            {},
            ("evaluate", checkpoint),
            needs,
            checkpoint.partition("\0")[0] or "folder",
            "MLflow",
            slow=checkpoint != "trial.yaml",
        )
    for output in ("trial.yaml", "/proc/nowhere"):
        yield _env(
            f"--output {output!r}",
            {},
            ("prepare", "data.yaml", "--output", output),
            needs,
            output.partition("\0")[0],
            "output",
            slow=True,
        )
