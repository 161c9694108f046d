"""Small preparations of real digits, written as PNG, with corrupt ones among them; with and without Ray."""

import os
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image
from tiny_sweeps import ROOT, SweepCommand

from dtr_ray.cache import cache_dir
from dtr_ray.config import PrepareConfig
from dtr_ray.data.digits import mnist_digits
from dtr_ray.data.manifest import Manifest
from dtr_ray.preparation.finish import finish, gather
from dtr_ray.preparation.job import Job
from dtr_ray.preparation.models import Models, keep_digests
from dtr_ray.preparation.shard import make_shard
from dtr_ray.preparation.tokens import Tokens
from dtr_ray.sources import open_source


def write_digits(folder: Path, count: int, num_corrupt: int = 0, captions: bool = False) -> list[str]:
    """Writes MNIST digits, of all classes, as PNG into a subfolder a class; returns the corrupt ones' names.

    Corrupt ones come on top: cut off, empty, or no images at all.
    """
    pixels, labels = mnist_digits(28, cache_dir())
    # One of each class after another: a few are of all classes.
    chosen = np.stack([np.flatnonzero(labels.numpy() == digit) for digit in range(10)], 1).reshape(-1)
    chosen = chosen[: count + num_corrupt]
    corrupt = []
    for position, (image, label) in enumerate(zip(pixels[chosen], labels[chosen].tolist(), strict=True)):
        path = folder / str(label) / f"{chosen[position]:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0]).save(path)
        if captions:
            path.with_suffix(".txt").write_text(f"a handwritten {label}\nthe digit {label}\n")
        if position >= count:
            whole = path.read_bytes()
            path.write_bytes((whole[: len(whole) // 2], b"", b"no image")[position % 3])
            corrupt.append(path.relative_to(folder).as_posix())
    return sorted(corrupt)


def prepare_config(source: Path, output: Path, **changes: Any) -> PrepareConfig:
    """Digits of 16 x 16 pixels, in shards of 64, without references."""
    values = {
        "name": "tiny",
        "source": {"type": "folder", "path": str(source)},
        "resolution": 16,
        "features": [],
        "shard_images": 64,
        "output": str(output),
    }
    return PrepareConfig.from_dict({**values, **changes})


def job_of(config: PrepareConfig) -> Job:
    captions = config.text_encoder is not None
    source = open_source(config.source, 1 if captions else config.num_classes, captions)
    return Job(config, source, Path(config.output) / config.name)


def prepare_here(config: PrepareConfig) -> Manifest:
    """The whole preparation in this process, without Ray."""
    job = job_of(config)
    job.begin()
    models = Models.load(config, "cpu")
    keep_digests(job, models.digests())
    for number in range(job.num_shards):
        make_shard(job, models, number)
    found = gather(job)
    if found.texts:
        tokens = Tokens(job, found.texts)
        assert models.text_encoder is not None
        for number in range(tokens.num_done, tokens.num_chunks):
            tokens.write(number, models.text_encoder.encode(tokens.chunk(number)).numpy())
        tokens.close()
    return finish(job, found)


class PrepareCommand(SweepCommand):
    """`python -m dtr_ray.prepare` in its own session; all its descendants are known."""

    def __init__(self, config: PrepareConfig, *options: str, own_ray: bool = True) -> None:
        output = Path(config.output)
        output.mkdir(parents=True, exist_ok=True)
        file = write_yaml(config, output)
        self._mark = f"DTR_RAY_TEST_MARK={uuid.uuid4().hex}"
        name, _, value = self._mark.partition("=")
        env = dict(os.environ)
        if own_ray:
            env["RAY_ADDRESS"] = "local"
        path = os.pathsep.join([str(ROOT), *filter(None, [env.get("PYTHONPATH")])])
        self._out = (output / f"{value}.out").open("w+")
        self.started = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "dtr_ray.prepare", str(file), *options],
            env={**env, name: value, "PYTHONPATH": path},
            cwd=output,
            stdin=subprocess.DEVNULL,
            stdout=self._out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def write_yaml(config: PrepareConfig, folder: Path) -> Path:
    """Writes a configuration's file into a folder."""
    file = folder / f"{config.name}.yaml"
    file.write_text(yaml.safe_dump(config.to_dict()), encoding="utf-8")
    return file
