"""`python -m dtr_ray.sweep SPACE.yaml`: runs a sweep, here or on a cluster, and says what to type next."""

import argparse
import json
import os
import shlex
import sys
import warnings
from pathlib import Path

from dtr_ray import log_lines
from dtr_ray.command import Parser, add_log_format, leave, run_command
from dtr_ray.config import SweepConfig

_PROGRAM = "python -m dtr_ray.sweep"
_ABOUT = ("attach", "stop", "list")
_RESUME = "DTR_RAY_RESUME"
"""Of a job: the command that goes on with its sweep, as its user would type it."""


def main(arguments: list[str] | None = None) -> int:
    """Reads the search space, and plans, runs, submits or resumes the sweep."""
    parser = _parser()
    options = parser.parse_args(arguments)
    _check(options, parser)
    # A job's driver is told how its user goes on.
    resume = os.environ.get(_RESUME) or f"{_PROGRAM} {_typed(arguments)} --resume"
    hint = None if _is_remote(options) else resume
    return run_command(lambda: _run(options, resume), hint, options.log_format)


def _parser() -> Parser:
    parser = Parser(prog=_PROGRAM, description="Search alpha, beta and the loss weighting of DTR.")
    add = parser.add_argument
    what = "the search space, e.g. search_spaces/quickstart.yaml"
    add("space", type=Path, nargs="?", metavar="SPACE.yaml", help=what)
    add("--dry-run", action="store_true", help="print the resolved plan and start nothing")
    add("--resume", action="store_true", help="go on with a sweep that was stopped or killed")
    what = "override: trial.training.num_steps=800"
    add("--set", action="append", default=[], metavar="KEY=VALUE", help=what)
    add("--trials", type=int, metavar="N", help="number of trials (search.num_trials)")
    add("--output", metavar="DIR", help="folder or s3://... for results (storage.output)")
    add_log_format(parser)
    group = parser.add_argument_group("on a cluster", "as a Ray job, which goes on without this machine")
    add = group.add_argument
    add("--submit", action="store_true", help="send the sweep to the cluster and follow it")
    what = (
        "ray://HOST:10001, http://HOST:8265 or HOST:6379, and --submit; default: RAY_ADDRESS, else a tunnel"
    )
    add("--address", metavar="ADDRESS", help=what)
    add("--detach", action="store_true", help="submit, and do not follow")
    what = "follow a submitted sweep (default: the only one that runs)"
    add("--attach", nargs="?", const="", metavar="NAME", help=what)
    add("--stop", metavar="NAME", help="end a submitted sweep; it can be resumed")
    add("--list", action="store_true", help="show the submitted sweeps")
    return parser


def _check(options: argparse.Namespace, parser: Parser) -> None:
    """Ends with code 2 where the options do not go together."""
    about = [f"--{name}" for name in _ABOUT if getattr(options, name) not in (None, False)]
    if len(about) > 1:
        parser.error(f"give one of {' and '.join(about)}")
    if about and (options.space is not None or options.submit or options.detach or options.resume):
        parser.error(f"{about[0]} is about a sweep that was submitted: give its name alone")
    if not about and options.space is None:
        parser.error("the following arguments are required: SPACE.yaml")


def _is_remote(options: argparse.Namespace) -> bool:
    return bool(options.submit or options.detach or options.address is not None or options.space is None)


def _typed(arguments: list[str] | None) -> str:
    words = sys.argv[1:] if arguments is None else arguments
    return shlex.join(word for word in words if word not in ("--resume", "--detach"))


def _run(options: argparse.Namespace, resume: str) -> int:
    if options.space is None:
        return _look_after(options)
    config = _read(options)
    if _is_remote(options):
        return _submit(config, options, resume)
    return _run_here(config, options)


def _read(options: argparse.Namespace) -> SweepConfig:
    """The sweep's configuration; of one that is submitted, paths are looked at where it runs."""
    from dtr_ray.config.errors import ConfigWarning
    from dtr_ray.config.ignored import config_warnings
    from dtr_ray.config.read import read_sweep

    sets = list(options.set)
    if options.trials is not None:
        sets.append(f"search.num_trials={options.trials}")
    if options.output is not None:
        sets.append(f"storage.output={json.dumps(options.output)}")
    config = read_sweep(options.space, sets, check_paths=not _is_remote(options))
    log_lines.always(sweep=config.name)
    for text in config_warnings(config):
        warnings.warn(text, ConfigWarning, stacklevel=1)
    return config


def _run_here(config: SweepConfig, options: argparse.Namespace) -> int:
    from dtr_ray.search.checks import check_trials
    from dtr_ray.service.plan import print_plan
    from dtr_ray.service.storing import open_storage, place_of, sweep_folder

    folder = sweep_folder(config)
    check_trials(config)
    if options.dry_run:
        print_plan(config, folder)
        return 0

    from dtr_ray.data import check_data
    from dtr_ray.evaluation.references import check_references
    from dtr_ray.service.summary import print_summary
    from dtr_ray.service.sweep import check_folder, holds_sweep, run_sweep

    storage = open_storage(config)
    check_folder(config, folder, resume=options.resume)
    check_data(config.trial.data)
    check_references(config.trial.data, config.trial.evaluation.features)
    if options.resume and not holds_sweep(folder):
        place = place_of(config, folder)
        print(f"there is nothing to resume in {place} yet: the sweep starts from its first trial", flush=True)
    outcome = run_sweep(config, folder, resume=options.resume, storage=storage)
    print_summary(outcome)
    return 0 if outcome.error is None else 1


def _submit(config: SweepConfig, options: argparse.Namespace, resume: str) -> int:
    """Sends the sweep to a cluster, which is checked here as far as can be."""
    from dtr_ray.service.submission_files import check_shippable

    check_shippable(config)
    if options.dry_run:
        from dtr_ray.service.plan import print_plan
        from dtr_ray.service.storing import sweep_folder

        print_plan(config, sweep_folder(config))
        return 0

    from dtr_ray.service.submission import Ways, submit

    words = ["--resume"] if options.resume else []
    words += ["--log-format", log_lines.chosen(options.log_format)]
    return submit(config, words, {_RESUME: resume}, Ways(_PROGRAM, options.address), detach=options.detach)


def _look_after(options: argparse.Namespace) -> int:
    """Follows, stops or lists sweeps that were submitted."""
    from dtr_ray.service import submission

    ways = submission.Ways(_PROGRAM, options.address)
    if options.list:
        return submission.print_list(ways)
    if options.stop is not None:
        return submission.stop(options.stop, ways)
    return submission.attach(options.attach, ways)


if __name__ == "__main__":
    leave(main())
