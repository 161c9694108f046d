"""Every broken file is refused in one line that names file, line, key and rule."""

import time
from pathlib import Path

import pytest
from bad_yaml import CASES, GOOD, BadYaml

from dtr_ray.config.errors import ConfigError
from dtr_ray.config.read import read_sweep


def test_the_file_that_the_cases_break_is_right(tmp_path: Path) -> None:
    path = tmp_path / "good.yaml"
    path.write_text(GOOD)
    assert read_sweep(path).name == "small"


def test_the_cases_have_names_of_their_own() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 60


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_broken_file_gives_one_line_with_place_and_rule(case: BadYaml, tmp_path: Path) -> None:
    path = case.write(tmp_path)
    start = time.process_time()
    with pytest.raises(ConfigError) as caught:
        read_sweep(path)
    message = str(caught.value)
    assert time.process_time() - start < 2
    assert message.startswith(f"{path}:{case.line}: " if case.line else str(path))
    assert len(message.splitlines()) == 1
    for words in case.words:
        assert words in message
