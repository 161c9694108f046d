"""What Prometheus would read at the exporters of the session's Ray."""

import re
import threading
import urllib.request
from collections import defaultdict
from types import TracebackType
from typing import Self

import ray

Series = tuple[str, frozenset[tuple[str, str]]]
_LINE = re.compile(r"(\w+)\{(.*)\} (\S+)")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
OURS = ("sweep", "trial", "status", "metric")


def scrape() -> dict[Series, float]:
    """Our series on all machines: name, and those of the labels that are ours."""
    found: dict[Series, float] = {}
    for node in ray.nodes():
        url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        with urllib.request.urlopen(url, timeout=10) as answer:
            text = answer.read().decode()
        for name, labels, value in _LINE.findall(text):
            if name.startswith("ray_dtr_ray_"):
                own = frozenset(pair for pair in _LABEL.findall(labels) if pair[0] in OURS)
                found[name, own] = float(value)
    return found


class Scraper:
    """Scrapes every second meanwhile, as Prometheus does."""

    def __init__(self) -> None:
        self.seen: dict[Series, list[float]] = defaultdict(list)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def values(self, name: str, **labels: str) -> list[float]:
        """All values that series with these labels have had."""
        wanted = set(labels.items())
        found = [v for (n, own), v in self.seen.items() if n == f"ray_{name}" and wanted <= own]
        return [value for values in found for value in values]

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            last = self._done.wait(1.0)
            for series, value in scrape().items():
                self.seen[series].append(value)
            if last:
                return
