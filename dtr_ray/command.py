"""What all commands share: exit codes, and errors as one clear message.

Exit codes: 0 done; 2 the user's input was wrong; 130 interrupted, state kept; 1 anything else.
"""

import argparse
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NoReturn

from dtr_ray import log_lines
from dtr_ray.config.errors import ConfigWarning, is_refusal, one_line
from dtr_ray.disk import disk_full_error

INTERRUPTED = 130


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line and exit code 2."""

    def error(self, message: str) -> NoReturn:
        """Prints the message and the way to more help."""
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def add_model(parser: argparse.ArgumentParser) -> None:
    """Lets a command take a trained model: `model_folder` finds what the user gave."""
    what = (
        "a checkpoint, an export, a trial's or sweep's folder (or its s3://...), or MLflow's runs:/ID or "
        "models:/NAME/VERSION"
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help=what)
    where = "MLflow's place; default: MLFLOW_TRACKING_URI, else runs/mlflow.db"
    parser.add_argument("--tracking-uri", metavar="URI", help=where)


def model_folder(options: argparse.Namespace) -> Path:
    """The folder that the arguments of `add_model` name; a model of MLflow or in a store is fetched.

    Raises:
        ValueError: MLflow has no such model, or the store.
    """
    given: str = options.checkpoint
    if given.startswith(("runs:/", "models:/")):
        # MLflow takes seconds to import, and only this needs it.
        from dtr_ray.service.runs import fetch_model

        return fetch_model(given, options.tracking_uri)
    if options.tracking_uri is not None:
        raise ValueError(f"--tracking-uri is for runs:/ID and models:/NAME/VERSION; got the folder {given}")
    return local_folder(given)


def local_folder(given: str, checkpoints: Literal["none", "best", "all"] = "best") -> Path:
    """A folder that the user names; of a sweep's, trial's or model's address a copy on this machine.

    `checkpoints` are those of a sweep that its copy is to have. Raises ValueError where the store does not
    answer or has nothing there.
    """
    from dtr_ray.storage.address import is_url
    from dtr_ray.storage.fetching import fetch_folder

    return fetch_folder(given, checkpoints) if is_url(given) else Path(given)


def add_log_format(parser: argparse.ArgumentParser) -> None:
    """Lets a command speak to machines."""
    what = f"json: a JSON object a line, for log collectors (default: {log_lines.VARIABLE}, else text)"
    parser.add_argument("--log-format", choices=log_lines.FORMATS, help=what)


def run_command(
    command: Callable[[], int],
    resume: str | Callable[[], str] | None = None,
    log_format: str | None = "text",
) -> int:
    """Runs a command and returns its exit code.

    A ValueError that this package raises is the user's to mend and is shown without a traceback; one that
    comes out of a library is a fault, as any other exception, and keeps its traceback. An interrupt (Ctrl-C,
    or SIGTERM) is answered with `resume`, the command that goes on (or what tells it, if that is known only
    later). `log_format` is that of `add_log_format`; a command that has no such option speaks to people.
    """
    try:
        chosen = log_lines.chosen(log_format)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    with log_lines.lines(chosen):
        if chosen == "text":
            logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
        return _run_command(command, resume)


def _run_command(command: Callable[[], int], resume: str | Callable[[], str] | None) -> int:
    # SIGINT too: a shell starts its background jobs with it ignored, and `kill -INT` is to work there.
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, _interrupt)
    warnings.simplefilter("always", ConfigWarning)
    warnings.formatwarning = _one_line
    try:
        return command()
    except ValueError as error:
        if not is_refusal(error):
            raise
        # Names of files and text from files are no commands to a terminal.
        message = "\n".join(map(one_line, str(error).split("\n")))
        print(f"error: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        resume = resume() if callable(resume) else resume
        hint = f"; everything is kept. To go on:\n  {resume}" if resume else ""
        print(f"\ninterrupted{hint}", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        full = disk_full_error(error)
        if full is None:
            raise
        resume = resume() if callable(resume) else resume
        hint = f"; everything is kept. When there is room, go on:\n  {resume}" if resume else ""
        print(f"error: {full}{hint}", file=sys.stderr)
        return 1


def leave(code: int) -> NoReturn:
    """Ends the process; an interrupted one at once, with all processes that it has started.

    The interpreter's own clean-up shuts Ray down under the feet of threads which still use it, and now and
    then ends with code 1 or a segmentation fault instead.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if code == INTERRUPTED:
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, signal.SIG_IGN)
        if "dtr_ray.service.cluster" in sys.modules:
            from dtr_ray.service import cluster

            cluster.kill_own_processes()
        os._exit(code)
    sys.exit(code)


def _one_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """A warning as the user is to see it: where in the code it came from matters for others' alone."""
    place = "" if issubclass(category, ConfigWarning) else f"{filename}:{lineno}: {category.__name__}: "
    return f"warning: {place}{message}\n"


def _interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt
