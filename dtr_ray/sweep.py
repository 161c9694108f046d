"""`python -m dtr_ray.sweep SPACE.yaml`: runs a sweep, shows it, and says what to type next."""

import argparse
import json
import shlex
import sys
import warnings
from pathlib import Path

from dtr_ray import log_lines
from dtr_ray.command import Parser, add_log_format, leave, run_command


def main(arguments: list[str] | None = None) -> int:
    """Reads the search space, and plans, runs or resumes the sweep."""
    parser = Parser(
        prog="python -m dtr_ray.sweep", description="Search alpha, beta and the loss weighting of DTR."
    )
    add = parser.add_argument
    add("space", type=Path, metavar="SPACE.yaml", help="the search space, e.g. search_spaces/quickstart.yaml")
    add("--dry-run", action="store_true", help="print the resolved plan and start nothing")
    add("--resume", action="store_true", help="go on with a sweep that was stopped or killed")
    add(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override: trial.training.num_steps=800",
    )
    add("--trials", type=int, metavar="N", help="number of trials (search.num_trials)")
    add("--output", metavar="DIR", help="folder for results (storage.output)")
    add_log_format(parser)
    options = parser.parse_args(arguments)
    resume = f"{parser.prog} {_typed(arguments)} --resume"
    return run_command(lambda: _run(options), resume, options.log_format)


def _typed(arguments: list[str] | None) -> str:
    words = sys.argv[1:] if arguments is None else arguments
    return shlex.join(word for word in words if word != "--resume")


def _run(options: argparse.Namespace) -> int:
    from dtr_ray.config.errors import ConfigWarning
    from dtr_ray.config.ignored import config_warnings
    from dtr_ray.config.read import read_sweep

    sets = list(options.set)
    if options.trials is not None:
        sets.append(f"search.num_trials={options.trials}")
    if options.output is not None:
        sets.append(f"storage.output={json.dumps(options.output)}")
    config = read_sweep(options.space, sets)
    log_lines.always(sweep=config.name)
    for text in config_warnings(config):
        warnings.warn(text, ConfigWarning, stacklevel=1)
    folder = Path(config.storage.output) / config.name

    from dtr_ray.search.checks import check_trials
    from dtr_ray.service.plan import print_plan

    check_trials(config)
    if options.dry_run:
        print_plan(config, folder)
        return 0

    from dtr_ray.data import check_data
    from dtr_ray.evaluation.references import check_references
    from dtr_ray.service.summary import print_summary
    from dtr_ray.service.sweep import check_folder, holds_sweep, run_sweep

    check_folder(config, folder, resume=options.resume)
    check_data(config.trial.data)
    check_references(config.trial.data, config.trial.evaluation.features)
    if options.resume and not holds_sweep(folder):
        print(
            f"there is nothing to resume in {folder} yet: the sweep starts from its first trial", flush=True
        )
    outcome = run_sweep(config, folder, resume=options.resume)
    print_summary(outcome)
    return 0 if outcome.error is None else 1


if __name__ == "__main__":
    leave(main())
