"""`python -m dtr_ray.analyze affinity CHECKPOINT`, `compare SWEEP_DIR`, `proxy SWEEP_DIR` and `flops MODEL`.

`affinity` measures how far the gradients of timesteps agree, for `weighting.intervals` of name affinity;
`compare` sets the methods of a sweep against each other over their seeds.
`proxy` measures how far a cheaper evaluation puts a sweep's checkpoints in the order of the full one.
`flops` counts the parameters of a model and the operations of a forward.
"""

import argparse
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from dtr_ray.command import Parser, leave, local_folder, run_command

if TYPE_CHECKING:
    from dtr_ray.config.space import Scalar
    from dtr_ray.diffusion.affinity import Affinity

_CLUSTERS = (5, 8)


def main(arguments: list[str] | None = None) -> int:
    """Runs one analysis."""
    parser = Parser(prog="python -m dtr_ray.analyze", description="Analyse trained models and sweeps.")
    commands = parser.add_subparsers(
        required=True, metavar="affinity | compare | proxy | flops", parser_class=Parser
    )
    affinity = commands.add_parser("affinity", help="how far the gradients of timesteps agree")
    add = affinity.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="its checkpoint, export, or trial's folder (or s3://...)")
    add("--output", type=Path, metavar="FILE.npz", help="default: affinity.npz in CHECKPOINT")
    add("--timesteps", metavar="N", help="how many, evenly spread, or `all`; default: 100")
    add("--batches", type=int, default=4, metavar="N", help="to average over; default: 4")
    add("--batch-size", type=int, default=32, metavar="N", help="images of a batch; default: 32")
    add("--seed", type=int, default=0, metavar="S", help="of images and noise; default: 0")
    add("--sketch", type=int, default=2**15, metavar="D", help="numbers kept of a gradient; default: 32768")
    add("--workers", type=int, metavar="N", help="on Ray; 0 is this process; default: all the cluster has")
    affinity.set_defaults(run=_affinity)
    compare = commands.add_parser("compare", help="the methods of a sweep, over seeds")
    add = compare.add_argument
    folders = "sweeps' folders (or their s3://...), finished or running"
    add("sweeps", nargs="+", metavar="SWEEP_DIR", help=folders)
    add("--mixed", action="store_true", help="figures of several protocols: a table of each")
    add("--metric", metavar="M", help="default: what the sweep minimises")
    add("--at", choices=["best", "last"], default="best", help="value of each trial; default: best")
    add("--baseline", action="append", default=[], metavar="KEY=VALUE", help="the row to compare with")
    compare.set_defaults(run=_compare)
    proxy = commands.add_parser("proxy", help="how far evaluation.proxy ranks as the full evaluation")
    add = proxy.add_argument
    add("sweep", metavar="SWEEP_DIR", help="the sweep's folder (or its s3://...), finished or running")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="evaluation.proxy.num_samples=1000")
    proxy.set_defaults(run=_proxy)
    flops = commands.add_parser("flops", help="parameters and GFLOPs of a model")
    add = flops.add_argument
    add("model", metavar="MODEL", help="a name such as DiT-B/2, a trial's or sweep's YAML or folder")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="override a value of a YAML")
    flops.set_defaults(run=_flops)
    options = parser.parse_args(arguments)
    words = shlex.join([*parser.prog.split(), *(sys.argv[1:] if arguments is None else arguments)])
    return run_command(lambda: int(options.run(options)), resume=words if options.run is _proxy else None)


def _affinity(options: argparse.Namespace) -> int:
    if options.workers is not None and options.workers < 0:
        raise ValueError(f"--workers is {options.workers}: it must be at least 0")
    from dtr_ray.analysis.affinity import Settings, find_measured, measure_affinity, run_in_process
    from dtr_ray.diffusion.intervals import measured_intervals
    from dtr_ray.export.trained import find_model

    checkpoint = local_folder(options.checkpoint)
    output = options.output or checkpoint / "affinity.npz"
    if output.suffix != ".npz":
        raise ValueError(f"--output is {output}: the name of an affinity file ends in .npz")
    count = _num_measured(options.timesteps, find_model(checkpoint))
    settings = Settings(count, options.batches, options.batch_size, options.seed, options.sketch)
    found = find_measured(output, checkpoint, settings)
    if found is not None:
        print(f"measured before, with the same model and settings: {output}")
    else:
        run_parts = run_in_process
        if options.workers != 0:
            from dtr_ray.service.parts import run_parts as run_on_ray

            run_parts = partial(run_on_ray, num_workers=options.workers)
        from dtr_ray.analysis.plots import draw_affinity

        with _progress(f"{count} timesteps, {settings.num_batches} batches") as tell:
            found = measure_affinity(checkpoint, settings, run_parts, tell)
        found.save(output)
        intervals = measured_intervals(found, min(_CLUSTERS[-1], len(found.timesteps)))
        draw_affinity(found, intervals, output.with_suffix(".png"))
    _print_affinity(found, output)
    return 0


def _num_measured(text: str | None, folder: Path) -> int:
    """How many timesteps `--timesteps` asks for, of the model in a folder."""
    from dtr_ray.export.trained import read_config

    num_timesteps = read_config(folder).diffusion.num_timesteps
    if text is None or text == "all":
        return num_timesteps if text else min(100, num_timesteps)
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"--timesteps is {text!r}: it must be a whole number, or `all`") from None


@contextmanager
def _progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar that moves when it is told of (parts done, all parts); lines where there is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = Console()
    if not console.is_terminal:
        print(f"measuring {title}", flush=True)
        told = 0

        def tell(done: int, total: int) -> None:
            nonlocal told
            if done * 10 // total > told:
                told = done * 10 // total
                print(f"{done / total:.0%} of {title}", flush=True)

        yield tell
        return
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _print_affinity(affinity: "Affinity", output: Path) -> None:
    import yaml

    from dtr_ray.diffusion.intervals import measured_intervals

    for clusters in _CLUSTERS:
        if clusters <= len(affinity.timesteps):
            cut = ", ".join(f"[{a}, {b})" for a, b in measured_intervals(affinity, clusters))
            print(f"K={clusters}       {cut}")
    count = f"{len(affinity.timesteps)} of {affinity.num_timesteps} timesteps"
    print(f"affinity  {output} ({count}; picture: {output.with_suffix('.png').name})")
    choice = {"name": "affinity", "from": str(output)}
    line = yaml.safe_dump(choice, default_flow_style=True, sort_keys=False, width=10_000).strip()
    print("in a YAML, under weighting, with name ant_uw, ant_pcgrad or ant_nash:")
    print(f"  intervals: {line}")


def _compare(options: argparse.Namespace) -> int:
    from rich.console import Console

    from dtr_ray.search.comparison import compare_sweeps
    from dtr_ray.search.comparison_table import comparison_table, write_comparison

    baseline = _conditions(options.baseline)
    folders = [local_folder(sweep, "none") for sweep in options.sweeps]
    tables = compare_sweeps(folders, options.metric, baseline, options.at, mixed=options.mixed)
    console = Console()
    for table in tables:
        console.print(comparison_table(table))
    for path in write_comparison(tables, folders[0]):
        console.print(_kept(options.sweeps[0], path), highlight=False, markup=False, soft_wrap=True)
    return 0


def _proxy(options: argparse.Namespace) -> int:
    from rich.console import Console

    from dtr_ray.analysis.proxies import CSV_FILE, study_proxy, write_study
    from dtr_ray.analysis.proxy_table import study_lines, study_table

    folder = local_folder(options.sweep, "all")
    with _progress("checkpoints by the proxy and in full") as tell:
        study = study_proxy(folder, options.set, tell)
    write_study(study, folder / CSV_FILE)
    console = Console()
    console.print(study_table(study))
    for line in (*study_lines(study), _kept(options.sweep, folder / CSV_FILE)):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    return 0


def _kept(sweep: str, path: Path) -> str:
    """Where a table that was written into a sweep's folder is: with a sweep in a store it goes there, too."""
    from dtr_ray.storage.address import is_url, joined
    from dtr_ray.storage.fetching import put_beside

    if not is_url(sweep):
        return str(path)
    put_beside(sweep, path)
    return joined(sweep, path.name)


def _conditions(texts: list[str]) -> "dict[str, Scalar] | None":
    """`KEY=VALUE` texts by key; the values as YAML reads them."""
    from dtr_ray.config.tree import parse_value

    found = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ValueError(f"--baseline {text}: it must be KEY=VALUE, such as routing.name=none")
        found[key] = parse_value(value, f"--baseline {text}")
    return found or None


def _flops(options: argparse.Namespace) -> int:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from dtr_ray.analysis.flops import costs_of

    rows = costs_of(options.model, options.set)
    table = Table(box=box.SIMPLE)
    for heading in ("model", "routing"):
        table.add_column(heading, no_wrap=True)
    for heading in ("parameters", "GFLOPs"):
        table.add_column(heading, no_wrap=True, justify="right")
    for name, routing, cost in rows:
        table.add_row(name, routing, f"{cost.parameters / 1e6:,.2f}M", f"{cost.gflops:,.2f}")
    console = Console()
    console.print(table)
    note = "a multiply-add counts once, as in the papers; torch's counter and others count it twice"
    console.print(note, highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    leave(main())
