"""The worker of a preparation: a process of Ray that makes shards, and how many of them there are."""

import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dtr_ray.config.prepare import PrepareConfig
from dtr_ray.data.manifest import SkippedImage
from dtr_ray.preparation.estimate import Probe, probe
from dtr_ray.preparation.job import Job
from dtr_ray.preparation.models import Models
from dtr_ray.preparation.shard import make_shard
from dtr_ray.service import cluster

_MAX_DECODERS = 16


@dataclass(frozen=True)
class Workers:
    """How many processes do the work, and on what."""

    count: int
    device: str
    num_decoders: int
    """Threads of each that read images."""

    @classmethod
    def fitting(cls, config: PrepareConfig, machines: list[cluster.Node]) -> "Workers":
        """One a GPU, or one a CPU core where there is none; at most `num_workers`."""
        gpus = int(sum(machine.gpus for machine in machines))
        cpus = int(sum(machine.cpus for machine in machines)) or 1
        room = gpus or cpus
        decoders = max(1, min(cpus // gpus, _MAX_DECODERS)) if gpus else 1
        return cls(min(config.num_workers or room, room), "cuda" if gpus else "cpu", decoders)

    def __str__(self) -> str:
        kind = "GPU" if self.device == "cuda" else "CPU core"
        return f"{self.count}, one a {kind}"


@dataclass(frozen=True)
class ShardResult:
    """What the driver has to know of a shard that is done."""

    num_images: int
    skipped: list[SkippedImage]


class Worker:
    """A process of Ray that makes shards, one at a time, and tells meanwhile how far it is.

    It is handed the job with each call, so that one that Ray has started again has it too.
    """

    def __init__(self, workers: Workers, folder: str) -> None:
        if Path(folder).is_dir():
            # Relative paths mean what they mean to the caller.
            os.chdir(folder)
        self._job: Job | None = None
        self._workers = workers
        self._models: Models | None = None
        self._done = 0

    def digests(self, job: Job) -> dict[str, str]:
        """Of the models, which are loaded."""
        return self._load(job)[1].digests()

    def probe(self, job: Job) -> Probe:
        """Measures a few images here."""
        return probe(*self._load(job), self._workers.num_decoders)

    def make(self, job: Job, number: int) -> ShardResult:
        """Makes a shard."""

        def tell(done: int) -> None:
            self._done = done

        self._done = 0
        report = make_shard(*self._load(job), number, self._workers.num_decoders, tell)
        return ShardResult(len(report.labels), report.skipped)

    def encode(self, job: Job, captions: list[str]) -> Any:
        """Tokens of captions, float16 (n, L, D)."""
        _, models = self._load(job)
        assert models.text_encoder is not None
        with torch.no_grad():
            return models.text_encoder.encode(captions).cpu().numpy()

    def done(self) -> int:
        """How many images of the present shard are done."""
        return self._done

    def _load(self, job: Job) -> tuple[Job, Models]:
        # The first one is kept, with the files that it has opened.
        if self._job is None or self._models is None:
            _check_place(job)
            if self._workers.device == "cpu":
                torch.set_num_threads(1)
            self._job, self._models = job, Models.load(job.config, self._workers.device)
        return self._job, self._models


def _check_place(job: Job) -> None:
    """Raises ValueError where this machine does not see what it is to read and write."""
    host = socket.gethostname()
    if not job.state_file.is_file():
        rule = "output must be a folder that every machine of the cluster sees"
        raise ValueError(f"{job.folder} is not there on {host}: {rule}")
    source = Path(job.config.source.path).expanduser()
    if not any(mark in source.name for mark in "*?[{") and not source.exists():
        rule = "source.path must be what every machine of the cluster sees"
        raise ValueError(f"{source} is not there on {host}: {rule}")
