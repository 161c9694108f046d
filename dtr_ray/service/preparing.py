"""Runs a preparation on Ray's workers, each with its models, and goes on with one that was killed."""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from filelock import FileLock, Timeout

from dtr_ray.config.files import make_folder
from dtr_ray.data.manifest import Manifest, SkippedImage
from dtr_ray.preparation.estimate import Probe
from dtr_ray.preparation.finish import Gathered, finish, gather
from dtr_ray.preparation.job import Job, TooManyCorruptError, finished
from dtr_ray.preparation.models import keep_digests
from dtr_ray.preparation.tokens import Tokens
from dtr_ray.service import cluster
from dtr_ray.service.fetching import fetch_here, fetch_on_nodes, preparation_weights
from dtr_ray.service.parts import RETRIES, answer
from dtr_ray.service.shard_progress import ShardProgress
from dtr_ray.service.shard_worker import ShardResult, Worker, Workers

_LOOK_S = 0.5
# Chunks of captions under way for each worker, so that none waits.
_CHUNKS_AHEAD = 2


ShowPlan = Callable[[Probe, int, Workers], None]


def run_preparation(job: Job, show_plan: ShowPlan) -> Manifest:
    """Prepares a folder, or what is left of it.

    Args:
        job: what is to be made.
        show_plan: is called, before the work, with what a few images took, how many images' shards are done
            already, and the workers; may raise. Not called where no images are left.

    Raises:
        ValueError: the folder was begun as something else or is in use; a model cannot be had; an image
            lacks its caption; more images than `max_corrupt` cannot be read.
        DiskFullError: there is no room left.
        RuntimeError: workers were lost too often.
    """
    make_folder(job.work)
    with _sole_driver(job):
        manifest = finished(job.folder)
        if manifest is not None:
            job.check_finished(manifest)
            return manifest
        job.begin()
        team = _Team(job)
        try:
            pending = team.look()
            if pending or not job.digests_file.exists():
                team.start(len(pending), show_plan)
                team.make_shards(pending)
            found = gather(job)
            if found.texts:
                team.encode_captions(found)
        finally:
            team.leave()
        return finish(job, found)


class _Team:
    """The workers of a job, and what they have done."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._workers: list[Any] = []
        self._shared: Any = None
        self._done_images = 0
        self._skipped: dict[int, list[SkippedImage]] = {}

    def look(self) -> list[int]:
        """The shards that are not done; counts what is."""
        pending = []
        for number in range(self._job.num_shards):
            report = self._job.read_report(number)
            if report is None:
                pending.append(number)
            else:
                self._count(number, report.skipped)
        self._check_skipped()
        return pending

    def start(self, num_parts: int, show_plan: ShowPlan | None = None) -> None:
        """Starts the workers; the first one alone, until it has measured some images for the plan."""
        if self._workers:
            return
        weights = fetch_here(preparation_weights(self._job.config))
        cluster.connect(dashboard=False)
        fetch_on_nodes(weights)
        kind = Workers.fitting(self._job.config, cluster.nodes())
        # Once for all: the list of a large source has 100 MB.
        self._shared = ray.put(self._job)
        use_gpu = kind.device == "cuda"
        actor: Any = ray.remote(Worker).options(
            num_cpus=0 if use_gpu else 1,
            num_gpus=1 if use_gpu else 0,
            max_restarts=RETRIES,
            max_task_retries=RETRIES,
            # One that works, one that tells how far it is.
            max_concurrency=2,
            scheduling_strategy="SPREAD",
        )
        first = actor.remote(kind, str(Path.cwd()))
        self._workers.append(first)
        keep_digests(self._job, answer(first.digests.remote(self._shared)))
        if show_plan is not None:
            show_plan(answer(first.probe.remote(self._shared)), self._done_images, kind)
        # Captions come after the shards, for all workers.
        count = kind.count if self._job.config.text_encoder else min(kind.count, num_parts)
        self._workers += [actor.remote(kind, str(Path.cwd())) for _ in range(1, count)]

    def make_shards(self, pending: list[int]) -> None:
        """Has the shards made."""
        left, idle = deque(pending), deque(self._workers[: len(pending)])
        running: dict[Any, tuple[Any, int]] = {}
        with ShardProgress("images", len(self._job.source), self._done_images) as progress:
            watch = _Watch()
            while left or running:
                while left and idle:
                    worker, number = idle.popleft(), left.popleft()
                    running[worker.make.remote(self._shared, number)] = worker, number
                ready, _ = ray.wait(list(running), timeout=_LOOK_S)
                for reference in ready:
                    worker, number = running.pop(reference)
                    idle.append(worker)
                    watch.forget(worker)
                    self._finished_shard(number, reference)
                partly = watch.look([worker for worker, _ in running.values()])
                skipped = sum(map(len, self._skipped.values()))
                progress.update(self._done_images + partly, f"{skipped} corrupt" if skipped else "")

    def _finished_shard(self, number: int, reference: Any) -> None:
        try:
            result: ShardResult = answer(reference)
        except TooManyCorruptError as error:
            self._skipped[number] = error.skipped
            self._check_skipped()
            raise
        self._count(number, result.skipped)
        self._check_skipped()

    def _count(self, number: int, skipped: list[SkippedImage]) -> None:
        self._skipped[number] = skipped
        self._done_images += len(self._job.images(number))

    def _check_skipped(self) -> None:
        limit = self._job.config.max_corrupt
        skipped = [image for _, images in sorted(self._skipped.items()) for image in images]
        if len(skipped) > limit:
            raise TooManyCorruptError(skipped, limit)

    def encode_captions(self, found: Gathered) -> None:
        """Has the captions encoded, and writes their tokens in order."""
        tokens = Tokens(self._job, found.texts)
        if tokens.num_done < tokens.num_chunks:
            self.start(tokens.num_chunks - tokens.num_done)
        ahead: deque[Any] = deque()
        following = tokens.num_done
        with ShardProgress("captions", len(tokens.names), tokens.num_rows) as progress:
            while tokens.num_done < tokens.num_chunks:
                while following < tokens.num_chunks and len(ahead) < _CHUNKS_AHEAD * len(self._workers):
                    worker = self._workers[following % len(self._workers)]
                    ahead.append(worker.encode.remote(self._shared, tokens.chunk(following)))
                    following += 1
                tokens.write(tokens.num_done, answer(ahead.popleft()))
                progress.update(tokens.num_rows)
        tokens.close()

    def leave(self) -> None:
        """Lets the workers go."""
        for worker in self._workers:
            ray.kill(worker)
        self._workers.clear()


class _Watch:
    """Asks workers how far they are, without ever waiting for an answer."""

    def __init__(self) -> None:
        self._asked: dict[Any, Any] = {}
        self._done: dict[Any, int] = {}

    def look(self, workers: list[Any]) -> int:
        """How many images their present shards have together, as far as is known."""
        for worker in workers:
            if worker not in self._asked:
                self._asked[worker] = worker.done.remote()
        answers = {reference: worker for worker, reference in self._asked.items()}
        ready = ray.wait(list(answers), num_returns=len(answers), timeout=0)[0] if answers else []
        for reference in ready:
            worker = answers[reference]
            del self._asked[worker]
            self._done[worker] = answer(reference)
        return sum(self._done.get(worker, 0) for worker in workers)

    def forget(self, worker: Any) -> None:
        """Its shard is done."""
        self._asked.pop(worker, None)
        self._done.pop(worker, None)


@contextmanager
def _sole_driver(job: Job) -> Iterator[None]:
    lock = FileLock(job.work / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"another process prepares {job.folder}") from None
    try:
        yield
    finally:
        lock.release()
