"""One sweep on the shared Ray, run once for all tests that look at what a sweep leaves behind."""

import io

import pytest
from rich.console import Console
from scraping import Scraper
from tiny_sweeps import Finished, folder_of, tiny_sweep

from dtr_ray.service.sweep import run_sweep


@pytest.fixture(scope="session")
def scraper(ray_cluster: str) -> Scraper:
    """What Ray's exporter has shown of the finished sweep while it ran."""
    return Scraper()


@pytest.fixture(scope="session")
def finished_sweep(ray_cluster: str, scraper: Scraper, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Two trials at a time, each in its own process."""
    config = tiny_sweep(tmp_path_factory.mktemp("finished"))
    folder, lines = folder_of(config), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, scraper:
        patch.setattr("sys.stdout", lines)
        outcome = run_sweep(config, folder)
    return Finished(config, folder, outcome, lines.getvalue())


@pytest.fixture
def wide() -> Console:
    """A console of 100 columns that believes to be a terminal; its text is in `wide.file`."""
    return Console(file=io.StringIO(), force_terminal=True, width=100, color_system=None)
