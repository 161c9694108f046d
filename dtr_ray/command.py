"""What all commands share: exit codes, and errors as one clear message.

Exit codes: 0 done; 2 the user's input was wrong; 130 interrupted, state kept; 1 anything else.
"""

import argparse
import logging
import signal
import sys
from collections.abc import Callable
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line and exit code 2."""

    def error(self, message: str) -> NoReturn:
        """Prints the message and the way to more help."""
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def run_command(command: Callable[[], int], resume: str | None = None) -> int:
    """Runs a command and returns its exit code.

    A ValueError is the user's to mend and is shown without a traceback. An interrupt (Ctrl-C, or SIGTERM)
    is answered with `resume`, the command that goes on.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        return command()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\ninterrupted; everything is kept. To go on:\n  {resume}" if resume else "\ninterrupted", file=sys.stderr)
        return 130


def _interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt
