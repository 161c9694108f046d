"""Machines for the tests that launch clusters, and the cluster files."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest
from cluster.machines import Lan, lan, missing

StartLan = Callable[[Sequence[str]], Lan]


@pytest.fixture
def start_lan(tmp_path: Path) -> Iterator[StartLan]:
    """Boots machines, which end with the test; skips where the host cannot make them, with what it lacks."""
    lacks = missing()
    if lacks:
        pytest.skip(f"no machines without {', '.join(lacks)} (run as root on Linux)")
    with ExitStack() as stack:
        yield lambda names: stack.enter_context(lan(tmp_path, names))
