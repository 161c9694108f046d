"""docs/data.md: each example is a DATA.yaml that is read, and each kind of source has one."""

import re
from pathlib import Path
from typing import get_args

import pytest

from dtr_ray.config.prepare import SourceConfig
from dtr_ray.config.read import read_prepare
from dtr_ray.sources import open_source

TEXT = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
EXAMPLES = [text for text in re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL) if "source:" in text]


@pytest.mark.parametrize("text", EXAMPLES)
def test_each_example_is_read(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("DATA.yaml").write_text(text)
    config = read_prepare("DATA.yaml")
    where = Path(config.source.path).name.split("{")[0]
    with pytest.raises(ValueError, match=re.escape(where)):
        open_source(config.source, config.num_classes, captions=config.text_encoder is not None)


def test_each_kind_of_source_has_an_example_and_a_line_in_the_table() -> None:
    union = get_args(SourceConfig)[0]
    kinds = {get_args(kind.model_fields["type"].annotation)[0] for kind in get_args(union)}
    assert kinds == set(re.findall(r"type: (\w+)", "".join(EXAMPLES)))
    assert kinds == set(re.findall(r"^\| `(\w+)` \|", TEXT, re.MULTILINE))
    assert kinds == set(re.findall(r"^### `(\w+)`$", TEXT, re.MULTILINE))
