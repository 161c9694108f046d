"""`python -m dtr_ray.prepare DATA.yaml`: makes a data set into shards that all trials share, once."""

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from dtr_ray.command import Parser, leave, run_command

if TYPE_CHECKING:
    from dtr_ray.config.prepare import PrepareConfig
    from dtr_ray.data.manifest import Manifest
    from dtr_ray.preparation.estimate import Probe
    from dtr_ray.preparation.job import Job
    from dtr_ray.service.preparing import ShowPlan
    from dtr_ray.service.shard_worker import Workers
    from dtr_ray.sources import Source


def main(arguments: list[str] | None = None) -> int:
    """Prepares what the file describes, or goes on with it."""
    parser = Parser(
        prog="python -m dtr_ray.prepare",
        description="Decode, crop and encode a data set once, for all trials; goes on where it was stopped.",
    )
    add = parser.add_argument
    add("data", type=Path, metavar="DATA.yaml", help="the data set, e.g. search_spaces/data/ffhq256.yaml")
    add("--dry-run", action="store_true", help="measure a few images, print the plan and write nothing")
    add("--verify", action="store_true", help="compare every file of the prepared folder with its checksum")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="override: resolution=64")
    add("--output", metavar="DIR", help="folder in which the data set's folder is made (output)")
    options = parser.parse_args(arguments)
    typed = shlex.join(sys.argv[1:] if arguments is None else arguments)
    return run_command(lambda: _run(options), resume=f"{parser.prog} {typed}")


def _run(options: argparse.Namespace) -> int:
    import json

    from dtr_ray.config.read import read_prepare
    from dtr_ray.preparation.job import finished

    sets = list(options.set)
    if options.output is not None:
        sets.append(f"output={json.dumps(options.output)}")
    # Nothing but the prepared folder itself is needed where it is complete.
    config = read_prepare(options.data, sets, check_paths=False)
    folder = Path(config.output).expanduser() / config.name
    if options.verify:
        return _verify(folder)
    manifest = finished(folder)
    if manifest is not None:
        return _is_prepared(config, folder, manifest)
    return _prepare(read_prepare(options.data, sets), folder, dry_run=options.dry_run)


def _is_prepared(config: "PrepareConfig", folder: Path, manifest: "Manifest") -> int:
    """Says so, unless the configuration or the source has changed; loads neither torch nor Ray."""
    from dtr_ray.preparation.job import Job, changes, refusal
    from dtr_ray.preparation.summary import content_text

    wrong = list(changes(manifest.config, config))
    if wrong:
        raise refusal(folder, wrong, "prepared")
    note = ""
    try:
        source = _open_source(config)
    except ValueError as error:
        note = f" (not compared with its source: {error})"
    else:
        Job(config, source, folder).check_finished(manifest)
    print(f"prepared already: {folder} holds {content_text(manifest)}; nothing to do{note}")
    _print_data(manifest, folder)
    return 0


def _prepare(config: "PrepareConfig", folder: Path, *, dry_run: bool) -> int:
    from dtr_ray.preparation.job import Job

    job = Job(config, _open_source(config), folder)
    job.check_unfinished()

    from dtr_ray.preparation.estimate import estimate
    from dtr_ray.preparation.files import DiskFullError
    from dtr_ray.preparation.plan import plan_text
    from dtr_ray.service import cluster
    from dtr_ray.service.preparing import run_preparation
    from dtr_ray.service.shard_worker import Workers

    def show(probed: "Probe", done_images: int, workers: Workers) -> None:
        found = estimate(job, probed, done_images, workers.count)
        print(plan_text(job, probed, found, str(workers)), flush=True)
        found.check(folder)

    if dry_run:
        _measure(job, Workers.fitting(config, cluster.local_nodes()), show)
        return 0
    try:
        manifest = run_preparation(job, show)
    except DiskFullError as error:
        print(f"error: the disk is full: {error}. What is done is kept: make room, and type the same command",
              file=sys.stderr)  # fmt: skip
        return 1
    _print_result(manifest, folder)
    return 0


def _measure(job: "Job", workers: "Workers", show: "ShowPlan") -> None:
    """The plan, from images that are measured in this process."""
    import torch

    from dtr_ray.preparation.estimate import probe
    from dtr_ray.preparation.models import Models

    if workers.device == "cpu":
        torch.set_num_threads(1)
    models = Models.load(job.config, workers.device)
    show(probe(job, models, workers.num_decoders), job.count_done(), workers)
    print("nothing was written: without --dry-run the work starts")


def _verify(folder: Path) -> int:
    from dtr_ray.data.manifest import Manifest

    manifest = Manifest.read(folder)
    broken = manifest.broken_files(folder)
    if not broken:
        print(f"{folder}: {len(manifest.files):,} files, all checksums hold")
        return 0
    lines = "".join(f"\n  {fault}" for fault in broken)
    print(
        f"error: {folder}: {len(broken):,} of {len(manifest.files):,} files are broken:{lines}",
        file=sys.stderr,
    )
    return 1


def _open_source(config: "PrepareConfig") -> "Source":
    from dtr_ray.sources import open_source

    captions = config.text_encoder is not None
    return open_source(config.source, 1 if captions else config.num_classes, captions)


def _print_result(manifest: "Manifest", folder: Path) -> None:
    from dtr_ray.preparation.summary import content_text, skipped_lines

    print(f"\nprepared {folder}: {content_text(manifest)}")
    for line in skipped_lines(manifest):
        print(line)
    if manifest.num_enlarged:
        print(f"{manifest.num_enlarged:,} images were smaller than the resolution and have been enlarged")
    _print_data(manifest, folder)


def _print_data(manifest: "Manifest", folder: Path) -> None:
    from dtr_ray.preparation.summary import data_section

    print(f"for a trial:\n{data_section(manifest, folder)}")


if __name__ == "__main__":
    leave(main())
