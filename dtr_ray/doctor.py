"""`python -m dtr_ray.doctor [SPACE.yaml]`: is all there that a sweep needs? A line each: ok, or the mend."""

import argparse
import json
import os
import sys
from pathlib import Path

from dtr_ray.command import Parser, run_command

_TIMEOUT_S = 60.0


def main(arguments: list[str] | None = None) -> int:
    """Checks, prints a line each, and returns 0, 1 where a check failed, or 2 where the input was wrong."""
    parser = Parser(prog="python -m dtr_ray.doctor", description="Check all that a sweep stands on.")
    add = parser.add_argument
    add("space", nargs="?", type=Path, metavar="SPACE.yaml", help="the search space that is to run")
    address = "the Ray cluster; default: RAY_ADDRESS, else this machine's; `local`: this machine without Ray"
    add("--address", metavar="ADDRESS", help=address)
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="override a value of the file")
    add("--output", metavar="DIR", help="folder or s3://... for results (storage.output)")
    add("--timeout", type=float, default=_TIMEOUT_S, metavar="S", help="seconds that a check may take")
    options = parser.parse_args(arguments)
    return run_command(lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    from dtr_ray.config.read import read_sweep
    from dtr_ray.config.sweep import StorageConfig

    if not options.timeout > 0:
        raise ValueError(f"--timeout must be above 0 seconds, got {options.timeout:g}")
    config = None
    if options.space is not None:
        sets = list(options.set)
        if options.output is not None:
            sets.append(f"storage.output={json.dumps(options.output)}")
        config = read_sweep(options.space, sets, check_paths=False)
    elif options.set:
        raise ValueError(f"--set {options.set[0]} changes a file's value, and no file is named")
    output = (StorageConfig() if config is None else config.storage).output

    from dtr_ray.service.cluster_answers import Case
    from dtr_ray.service.doctor import CHECKS, examine
    from dtr_ray.storage.address import check_address, is_url

    if config is None and options.output is not None:
        output = options.output
    case = Case(config, _folder(output), options.address, options.timeout)
    if is_url(output):
        check_address(output)
        case.store = output
    counts = {"ok": 0, "warning": 0, "fail": 0}
    width = max(map(len, CHECKS))
    for named in examine(case):
        finding = named.finding
        counts[finding.level] += 1
        mend = f"; to mend: {finding.mend}" if finding.mend else ""
        print(f"{finding.level:<8} {named.check:<{width}}  {finding.text}{mend}", flush=True)
    print(f"\n{counts['fail']} failed, {counts['warning']} warnings, {counts['ok']} ok")
    return 1 if counts["fail"] else 0


def _folder(output: str) -> Path:
    """The folder of sweeps, absolute; of those in a store this machine's own."""
    from dtr_ray.storage.address import is_url, scratch_folder

    return scratch_folder(output, "driver") if is_url(output) else Path(output).expanduser().resolve()


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # What hangs stays behind in threads, Ray's own among them: none of them is waited for.
    os._exit(code)
