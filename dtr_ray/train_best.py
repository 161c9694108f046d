"""`python -m dtr_ray.train_best [SWEEP_DIR]`: the best trial's configuration, for the full schedule."""

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtr_ray import log_lines
from dtr_ray.command import Parser, add_log_format, leave, local_folder, run_command

if TYPE_CHECKING:
    from dtr_ray.config import TrialConfig
    from dtr_ray.config.sweep import ResourcesConfig
    from dtr_ray.service.best import BestTrial

ROOT = Path("runs")


def main(arguments: list[str] | None = None) -> int:
    """Finds the best trial, trains, evaluates, exports and registers."""
    parser = Parser(prog="python -m dtr_ray.train_best", description="Train the best trial to the end.")
    source = parser.add_mutually_exclusive_group()
    newest = "its folder, or its s3://...; default: the newest in runs/"
    source.add_argument("sweep", nargs="?", metavar="SWEEP_DIR", help=newest)
    source.add_argument("--experiment", metavar="NAME", help="find the best trial in MLflow instead")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a value")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="default: SWEEP_DIR/best; of an s3://.../NAME runs/NAME/best",
    )
    parser.add_argument("--resume", action="store_true", help="go on where it was stopped or killed")
    parser.add_argument("--from-checkpoint", action="store_true", help="go on from the trial's checkpoint")
    parser.add_argument("--workers", type=int, metavar="N", help="default: the trial's, or all CPUs")
    add_log_format(parser)
    options = parser.parse_args(arguments)
    words = [word for word in (sys.argv[1:] if arguments is None else arguments) if word != "--resume"]

    def resume() -> str:
        # The newest sweep may be another one by then.
        found = [str(options.found)] if hasattr(options, "found") else []
        return shlex.join([*parser.prog.split(), *found, *words, "--resume"])

    return run_command(lambda: _run(options), resume, options.log_format)


def _run(options: argparse.Namespace) -> int:
    best = _find(options)
    log_lines.always(sweep=best.sweep.name)
    from dtr_ray.config.read import change_trial
    from dtr_ray.data import check_data
    from dtr_ray.diffusion.intervals import check_intervals
    from dtr_ray.evaluation.references import check_references
    from dtr_ray.service.final_run import RESULT_FILE, FinalRun, check_workers, final_config, run_final
    from dtr_ray.training.checksums import find_damage
    from dtr_ray.training.folder import check_folder

    source = f"trial {best.trial_id} of {best.folder}"
    config = change_trial(final_config(best), options.set, source)
    check_data(config.data)
    check_references(config.data, config.evaluation.features)
    check_intervals(config.weighting, config.diffusion)
    check_workers(options.workers, config.training.batch_size)
    folder = options.output or _output(options, best)
    if options.from_checkpoint and best.checkpoint is None:
        raise ValueError(f"--from-checkpoint: the checkpoint of {source} is not there any more")
    start_from = best.checkpoint if options.from_checkpoint else None
    damage = None if start_from is None or options.resume else find_damage(start_from)
    if damage is not None:
        raise ValueError(
            f"--from-checkpoint: the checkpoint {start_from} is damaged ({damage}): leave that out"
        )
    check_folder(folder / "trials" / "best", config, resume=options.resume)
    done = _finished(folder / RESULT_FILE, config) if options.resume else None
    if done is not None:
        _print(done, folder)
        return 0
    found, steps = f"{best.metric} {best.value:.4g}", f"{config.training.num_steps:,} steps"
    print(f"training {source} ({found}) for {steps} in {folder}")
    resources = _connect(best, config, options.workers)
    run = FinalRun(best, config, folder, resources, start_from)
    _print(run_final(run, resume=options.resume), folder)
    return 0


def _output(options: argparse.Namespace, best: "BestTrial") -> Path:
    """Beside the trials; of a sweep in a store, whose folder here is a copy, where it would be else."""
    from dtr_ray.storage.address import is_url

    copied = options.sweep is not None and is_url(options.sweep)
    return (ROOT / best.sweep.name if copied else best.folder) / "best"


def _connect(best: "BestTrial", config: "TrialConfig", num_workers: int | None) -> "ResourcesConfig":
    """Joins or starts the cluster, has the weights on its machines, and returns what the run takes of it."""
    from dtr_ray.service import cluster
    from dtr_ray.service.fetching import fetch_here, fetch_on_nodes, trial_weights
    from dtr_ray.service.final_run import final_resources

    weights = fetch_here(trial_weights(config))
    cluster.connect(dashboard=True)
    resources = final_resources(best, config.training.batch_size, num_workers)
    print(f"on {cluster.describe(resources)}", flush=True)
    fetch_on_nodes(weights)
    return resources


def _finished(path: Path, config: "TrialConfig") -> dict[str, Any] | None:
    """The result of a run of this configuration that has nothing left to do."""
    if not path.exists():
        return None
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return result if result["config"] == config.to_dict() and result["mlflow"]["registered"] else None


def _find(options: argparse.Namespace) -> "BestTrial":
    from dtr_ray.service.best import best_in_experiment, best_in_folder, newest_sweep

    if options.experiment is not None:
        return best_in_experiment(options.experiment, ROOT)
    if options.sweep is None:
        options.found = newest_sweep(ROOT)
        return best_in_folder(options.found)
    return best_in_folder(local_folder(options.sweep))


def _print(result: dict[str, Any], folder: Path) -> None:
    from dtr_ray.config.protocol import UNKNOWN, describe
    from dtr_ray.service.tracking import ui_command

    mlflow, lineage = result["mlflow"], result["lineage"]
    model = folder / result["export"]
    error = "" if result.get("standard_error") is None else f" ± {result['standard_error']:.2g}"
    print(f"\n{result['metric']}: {result['value']:.6g}{error} after {result['step']:,} steps")
    print(f"measured  {describe(result.get('protocol', {}))}")
    found = f"{lineage['trial_metric']} {lineage['trial_value']:.6g} at step {lineage['trial_step']:,}"
    otherwise = "; ".join(lineage.get("measured_otherwise", [UNKNOWN]))
    print(f"search    {found}" + (f", of another protocol ({otherwise}): no comparison" if otherwise else ""))
    print(f"model     {model} (samples.png, trial.json, README.md)")
    if mlflow["registered"]:
        print(f"registry  {mlflow['registered']['name']}, version {mlflow['registered']['version']}")
    else:
        print(f"registry  not registered: {mlflow['reason']}; --resume tries again")
    print(f"compare   {ui_command(mlflow['tracking_uri'])}")
    print(f"sample    python -m dtr_ray.sample {shlex.quote(str(model))} --output samples.png")


if __name__ == "__main__":
    leave(main())
