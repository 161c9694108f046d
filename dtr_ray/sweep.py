"""`python -m dtr_ray.sweep SPACE.yaml`: runs a sweep, shows it, and says what to type next."""

import argparse
import sys
from pathlib import Path

from dtr_ray.command import Parser, run_command


def main(arguments: list[str] | None = None) -> int:
    """Reads the search space, and plans, runs or resumes the sweep."""
    parser = Parser(prog="python -m dtr_ray.sweep", description="Search alpha, beta and the loss weighting of DTR.")
    parser.add_argument("space", type=Path, metavar="SPACE.yaml", help="the search space, e.g. search_spaces/quickstart.yaml")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved plan and start nothing")
    parser.add_argument("--resume", action="store_true", help="go on with a sweep that was stopped or killed")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a value: routing.alpha=4")
    parser.add_argument("--trials", type=int, metavar="N", help="number of trials (search.num_trials)")
    parser.add_argument("--output", metavar="DIR", help="folder for results (storage.output)")
    options = parser.parse_args(arguments)
    return run_command(lambda: _run(options), resume=f"{parser.prog} {_typed(arguments)} --resume")


def _typed(arguments: list[str] | None) -> str:
    import shlex

    words = sys.argv[1:] if arguments is None else arguments
    return shlex.join(word for word in words if word != "--resume")


def _run(options: argparse.Namespace) -> int:
    from dtr_ray.config.read import read_sweep

    sets = list(options.set)
    if options.trials is not None:
        sets.append(f"search.num_trials={options.trials}")
    if options.output is not None:
        sets.append(f"storage.output={options.output}")
    config = read_sweep(options.space, sets)
    folder = Path(config.storage.output) / config.name

    from dtr_ray.service.plan import print_plan

    if options.dry_run:
        print_plan(config, folder)
        return 0

    from dtr_ray.service.sweep import check_folder, run_sweep
    from dtr_ray.service.summary import print_summary

    check_folder(config, folder, resume=options.resume)
    outcome = run_sweep(config, folder, resume=options.resume)
    print_summary(outcome)
    return 0 if outcome.error is None else 1


if __name__ == "__main__":
    sys.exit(main())
