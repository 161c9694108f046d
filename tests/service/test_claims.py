"""Claims on a real cluster: sweeps see one another, and one whose driver dies is forgotten."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_sweeps import ROOT, tiny_sweep, wait_until

from dtr_ray.service import claims, cluster
from dtr_ray.service.claims import Sharing, waits_for_others

# A driver that claims the whole cluster for a sweep, and waits.
_OTHER = """
import sys, time
from pathlib import Path
sys.path[:0] = [{tests!r}]
from tiny_sweeps import tiny_sweep
from dtr_ray.service import cluster
from dtr_ray.service.claims import Sharing
cluster.connect(dashboard=False)
with Sharing(tiny_sweep(Path("/tmp"), name="other"), 2, print) as sharing:
    assert sharing.may_start(0, 5) and sharing.may_start(1, 5)
    print("there", flush=True)
    time.sleep(1000)
"""


@pytest.fixture(autouse=True)
def _joined(ray_cluster: str) -> None:
    cluster.connect(dashboard=False)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "_SETTLE_S", 0.05)
    monkeypatch.setattr(claims, "_LOOK_S", 0.0)


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.mark.usefixtures("quick")
def test_a_second_sweep_gets_its_half_as_trials_end_and_gives_it_back(said: list[str]):
    one, two = (tiny_sweep(Path("/tmp"), name=name) for name in ("one", "two"))
    with Sharing(one, 2, said.append) as first:
        assert first.may_start(0, 10)
        assert first.may_start(1, 9)
        with Sharing(two, 2, said.append) as second:
            time.sleep(0.1)
            assert not second.may_start(0, 10)
            assert waits_for_others(two, begun=True)
            assert not waits_for_others(one, begun=True)
            first.tell(1, 8)
            assert not first.may_start(1, 8)
            assert second.may_start(0, 10)
            assert not second.may_start(1, 9)
            assert not waits_for_others(two, begun=True)
            first.tell(0, 8)
            assert not second.may_start(1, 9)
            assert first.may_start(0, 8)
        assert first.may_start(1, 7)
    assert said[:3] == [
        "shares the cluster with one: 1 of 2 trials at a time",
        "shares the cluster with two: 1 of 2 trials at a time",
        "has the cluster to itself again",
    ]
    assert claims._others("") == []


@pytest.fixture
def other() -> Iterator[subprocess.Popen[str]]:
    code = _OTHER.format(tests=str(ROOT / "tests"))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "there\n"
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_a_sweep_whose_driver_is_killed_leaves_its_share(other: subprocess.Popen[str], said: list[str]):
    with Sharing(tiny_sweep(Path("/tmp"), name="one"), 2, said.append) as sharing:
        time.sleep(0.1)
        assert not sharing.may_start(0, 10)
        other.kill()
        started = time.monotonic()
        wait_until(lambda: sharing.may_start(0, 10), 30.0)
        assert sharing.may_start(1, 9)
        print(f"free again {time.monotonic() - started:.1f} s after the kill")
