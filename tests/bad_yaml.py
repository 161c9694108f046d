"""Broken search space files, and what the message about each must say; for `read_sweep` and the command line."""

# A table reads best with one case a row.
# ruff: noqa: E501

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

GOOD = """\
name: small
trial:
  data:
    name: mnist
    resolution: 16
  model:
    name: DiT
    hidden_size: 32
    depth: 2
    num_heads: 2
    patch_size: 4
  routing:
    name: dtr
    alpha: 4
    beta: 0.8
  weighting:
    name: min_snr
    gamma: 5
  training:
    num_steps: 100
    batch_size: 8
    lr: 1e-3
    ema_warmup: true
  sampling:
    sampler: ddim
    num_steps: 10
  evaluation:
    every_steps: 50
    num_samples: 16
    features: efficientnet_lite0
space:
  routing.alpha: {type: uniform, low: 1, high: 8}
  routing.beta: {type: quniform, low: 0.5, high: 1, step: 0.1}
  weighting.name: {type: choice, values: [vanilla, min_snr, p2]}
  weighting.gamma: {type: int, low: 1, high: 9, step: 2, when: {weighting.name: min_snr}}
  weighting.gamma@p2: {type: loguniform, low: 0.5, high: 2, when: {weighting.name: p2}}
search:
  sampler: tpe
  num_trials: 4
  starting_points:
    - routing.alpha: 4
      weighting.name: vanilla
early_stopping:
  name: asha
  grace_steps: 50
resources:
  workers_per_trial: 1
best:
  training.num_steps: 200
"""


@dataclass(frozen=True)
class BadYaml:
    """A broken file: its content, or a function that makes it in a folder and returns the path to read."""

    name: str
    content: str | bytes | Callable[[Path], Path]
    line: int | None
    """The line that the message names; None where the whole file is wrong."""
    words: tuple[str, ...]
    """What the message says, the dotted key among it."""

    def write(self, folder: Path) -> Path:
        """Makes the broken file in `folder` and returns the path to read."""
        if callable(self.content):
            return self.content(folder)
        path = folder / "broken.yaml"
        path.write_bytes(self.content if isinstance(self.content, bytes) else self.content.encode())
        return path


def _edit(name: str, old: str, new: str, *words: str, line: int | None = None) -> BadYaml:
    """The good file with one place changed; the message names the first changed line, or `line` lines on."""
    assert GOOD.count(old) == 1, (old, GOOD.count(old))
    same = next(
        (i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new))
    )
    start = GOOD.index(old) + same
    return BadYaml(name, GOOD.replace(old, new), GOOD[:start].count("\n") + 1 + (line or 0), words)


def _edits(name: str, line: int, edits: dict[str, str], *words: str) -> BadYaml:
    """The good file with several places changed."""
    content = GOOD
    for old, new in edits.items():
        assert content.count(old) == 1, (old, content.count(old))
        content = content.replace(old, new)
    return BadYaml(name, content, line, words)


def _space(name: str, entry: str, *words: str) -> BadYaml:
    """The good file with one more searched parameter, at line 32."""
    return BadYaml(name, GOOD.replace("space:\n", f"space:\n  {entry}\n"), 32, words)


def _folder(folder: Path) -> Path:
    (folder / "folder.yaml").mkdir()
    return folder / "folder.yaml"


def _missing(folder: Path) -> Path:
    (folder / "quickstart.yaml").write_text(GOOD)
    return folder / "quickstrat.yaml"


def _file_as_data(folder: Path) -> Path:
    (folder / "images.zip").write_bytes(b"PK")
    data = f"data:\n    name: folder\n    path: {folder / 'images.zip'}"
    path = folder / "broken.yaml"
    path.write_text(GOOD.replace("data:\n    name: mnist", data))
    return path


def _fifo(folder: Path) -> Path:
    os.mkfifo(folder / "pipe.yaml")
    return folder / "pipe.yaml"


_BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n"
    for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
_POINT = "    - routing.alpha: 4\n      weighting.name: vanilla\n"
_SPACE = GOOD[GOOD.index("space:\n") : GOOD.index("search:\n")]
_DATA = "data:\n    name: mnist\n    resolution: 16"

# fmt: off
CASES = [
    BadYaml("missing file", _missing, None, ("quickstrat.yaml", "no such file", "quickstart.yaml")),
    BadYaml("missing folder", lambda f: f / "no" / "a.yaml", None, ("no such file", "folder")),
    BadYaml("directory", _folder, None, ("is a folder",)),
    BadYaml("pipe", _fifo, None, ("not a regular file",)),
    BadYaml("path too long", lambda f: f / ("x" * 300), None, ("too long",)),
    BadYaml("empty file", "", None, ("empty",)),
    BadYaml("comments alone", "# nothing\n\n# here\n", None, ("empty",)),
    BadYaml("binary", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", 3, ("binary",)),
    BadYaml("random bytes", bytes(range(128, 256)) * 8, 1, ("not UTF-8", "0x80")),
    BadYaml("latin-1", "name: small\n# café\n".encode("latin-1"), 2, ("not UTF-8", "0xe9")),
    BadYaml("UTF-16", GOOD.encode("utf-16"), 1, ("not UTF-8",)),
    BadYaml("control character", "name: a\ntrial: \x07\n", 2, ("U+0007",)),
    BadYaml("over a megabyte", "# " + "x" * 2**20, None, ("larger than",)),
    BadYaml("too many values", "name: small\nspace: [" + "1," * 30000 + "]", 2, ("more than 20000 values",)),
    # YAML
    BadYaml("tab as indent", "name: small\ntrial:\n\tdata: {}\n", 3, ("column 1", "tab")),
    BadYaml("tab after a key", "name: small\ntrial:\tsmall\n", 2, ("column 7", "tab")),
    BadYaml("open bracket", GOOD + "storage: [runs\n", 51, ("column", "expected ',' or ']'", "line 50")),
    BadYaml("open quote", "name: 'small\ntrial: {}\n", 3, ("column", "quoted scalar", "line 1")),
    BadYaml("colon missing", "name: small\ntrial\n  data: {}\n", 3, ("column",)),
    BadYaml("wrong indent", "name: small\ntrial:\n    data: {}\n  model: {}\n", 4, ("column 3",)),
    BadYaml("two documents", "name: small\n---\nname: other\n", 2, ("second document",)),
    BadYaml("unknown alias", "name: *nothing\n", 1, ("undefined alias", "nothing")),
    BadYaml("alias bomb", _BOMB, None, ("aliases",)),
    BadYaml("alias of itself", "name: small\nspace: &a\n  more: *a\n", 2, ("refers to a value that holds it",)),
    BadYaml("deep nesting in brackets", "name: " + "[" * 500, 1, ("nested deeper than 20",)),
    BadYaml("deep nesting by indent", "".join(f"{' ' * i}k:\n" for i in range(60)), 20, ("nested deeper",)),
    BadYaml("python tag", "name: small\ntrial: !!python/object/apply:os.system ['true']\n", 2, ("trial", "tag", "python")),
    BadYaml("unknown tag", "name: !secret x\n", 1, ("name", "!secret")),
    BadYaml("tag that does not fit", "name: !!int x\n", 1, ("name", "!!int")),
    BadYaml("list at the top", "- name: small\n- trial\n", 1, ("expected keys", "top")),
    BadYaml("text at the top", "small\n", 1, ("expected keys", "small")),
    _edit("duplicate key", "    alpha: 4\n", "    alpha: 4\n    alpha: 5\n", "trial.routing.alpha", "twice", "line 14"),
    _edit("duplicate section", "space:\n", "trial: {}\nspace:\n", "trial", "twice", "line 2"),
    _edit("number as key", "    alpha: 4\n", "    4: 4\n", "trial.routing", "4", "must be text"),
    _edit("boolean as key", "    alpha: 4\n", "    true: 4\n", "trial.routing", "true", "must be text"),
    _edit("empty key", "    alpha: 4\n", "    ~: 4\n", "trial.routing", "~", "must be text"),
    _edit("list as key", "    alpha: 4\n", "    ? [a, b]\n    : 4\n", "trial.routing", "must be text, got a list"),
    _edit("merge key", "    alpha: 4\n", "    <<: {alpha: 4}\n", "trial.routing.<<", "merge keys"),
    # Values that are no values
    _edit("NaN", "lr: 1e-3", "lr: .nan", "trial.training.lr", ".nan", "not a finite"),
    _edit("infinity", "lr: 1e-3", "lr: .inf", "trial.training.lr", ".inf", "not a finite"),
    _edit("too large a float", "lr: 1e-3", "lr: 1e999", "trial.training.lr", "1e999", "not a finite"),
    _edit("too large an integer", "num_steps: 100", "num_steps: 1" + "0" * 5000, "trial.training.num_steps", "64 bits"),
    _edit("number for a name", "name: small", "name: 1", "name", "expected text", "1", "quotes"),
    _edit("quoted number", "    alpha: 4\n", "    alpha: '4'\n", "trial.routing.alpha", "expected a number", "'4'", "quotes"),
    _edit("text for a number", "beta: 0.8", "beta: most", "trial.routing.beta", "expected a number", "'most'"),
    _edit("float for an integer", "batch_size: 8", "batch_size: 8.5", "trial.training.batch_size", "whole number", "8.5"),
    _edit("exponent for an integer", "num_steps: 100", "num_steps: 1e2", "trial.training.num_steps", "write 100"),
    _edit("underscore in a number", "num_steps: 100", "num_steps: 1_00", "trial.training.num_steps", "write 100"),
    _edit("yes for true", "ema_warmup: true", "ema_warmup: yes", "trial.training.ema_warmup", "write true"),
    _edit("one for true", "ema_warmup: true", "ema_warmup: 1", "trial.training.ema_warmup", "true or false"),
    _edit("true for a number", "lr: 1e-3", "lr: true", "trial.training.lr", "expected a number", "true"),
    _edit("nothing for a number", "lr: 1e-3", "lr:", "trial.training.lr", "expected a number", "nothing"),
    _edit("list for a number", "lr: 1e-3", "lr: [1e-3]", "trial.training.lr", "expected a number", "[0.001]"),
    _edit("list for a section", _DATA, "data: [mnist]", "trial.data", "section", "mnist"),
    _edit("text for a section", _DATA, "data: mnist", "trial.data", "section", "'mnist'"),
    _edit("empty section", _DATA, "data:", "trial.data", "section", "nothing"),
    _edit("section for a number", "lr: 1e-3", "lr: {value: 1e-3}", "trial.training.lr", "expected a number"),
    _edit("list for the space's section", "search:\n  sampler: tpe", "search:\n  sampler: [tpe]", "search.sampler", "tpe"),
    _edit("number for a point", _POINT, "    - 4\n", "search.starting_points[0]", "section with keys", "4"),
    # Unknown and missing keys
    _edit("unknown key", "    lr: 1e-3", "    num_step: 9", "trial.training.num_step:", "did you mean num_steps?"),
    _edit("unknown key at the top", "search:\n", "serach:\n", "serach", "unknown key", "did you mean search?"),
    _edit("key of another section", "    lr: 1e-3", "    every_steps: 9", "trial.training.every_steps", "evaluation.every_steps"),
    _edit("section at the wrong level", "space:\n", "data: {name: mnist}\nspace:\n", "data", "did you mean trial.data?"),
    _edit("key with a capital", "    lr: 1e-3", "    LR: 1e-3", "trial.training.LR", "did you mean lr?"),
    _edit("key of another variant", "    name: dtr\n", "    name: random\n", "trial.routing.alpha", "dtr", line=1),
    _edit("key under none", "  name: asha\n", "  name: none\n", "early_stopping.grace_steps", "asha and median", line=1),
    _edit("name missing", "    name: dtr\n", "", "trial.routing", "has no name", "dtr, random", line=-1),
    _edit("grace missing", "  grace_steps: 50\n", "", "early_stopping.grace_steps", "is missing", line=-2),
    _edit("name of the sweep missing", "name: small\n", "", "name", "is missing"),
    BadYaml("space missing", GOOD[: GOOD.index("space:")] + GOOD[GOOD.index("search:") :], 1, ("space", "is missing")),
    _edit("unknown routing", "name: dtr", "name: dtrr", "trial.routing.name", "'dtrr'", "did you mean dtr?"),
    _edit("unknown weighting", "name: min_snr\n", "name: minsnr\n", "trial.weighting.name", "did you mean min_snr?"),
    _edit("unknown data", "name: mnist", "name: mnst", "trial.data.name", "'mnst'", "did you mean mnist?"),
    _edit("unknown model", "name: DiT\n", "name: DiT-B/3\n", "trial.model.name", "'DiT-B/3'", "did you mean DiT-B/"),
    _edit("unknown sampler", "sampler: tpe", "sampler: tpee", "search.sampler", "did you mean tpe?"),
    _edit("unknown stopping", "name: asha", "name: ahsa", "early_stopping.name", "did you mean asha?"),
    _edit("number as a choice", "sampler: ddim", "sampler: 5", "trial.sampling.sampler", "5 is not one of", "ddpm"),
    _edit("name with a slash", "name: small", "name: ../small", "name", "letters", "'../small'"),
    # Ranges
    _edit("beta of 0", "beta: 0.8", "beta: 0", "trial.routing.beta", "above 0", "got 0"),
    _edit("beta above 1", "beta: 0.8", "beta: 1.2", "trial.routing.beta", "at most 1", "got 1.2"),
    _edit("beta that leaves no channel", "beta: 0.8", "beta: 0.01", "trial.routing.beta", "0.01 of 32 channels"),
    _edit("negative alpha", "    alpha: 4\n", "    alpha: -1\n", "trial.routing.alpha", "above 0", "got -1"),
    _edit("no steps", "num_steps: 100", "num_steps: 0", "trial.training.num_steps", "above 0"),
    _edit("one sample", "num_samples: 16", "num_samples: 1", "trial.evaluation.num_samples", "at least 2"),
    _edit("EMA of 1", "ema_warmup: true", "ema_decay: 1", "trial.training.ema_decay", "below 1", "got 1"),
    _edit("no trials", "num_trials: 4", "num_trials: 0", "search.num_trials", "above 0", "got 0"),
    # Values that do not fit each other
    _edit("patch that does not divide", "patch_size: 4", "patch_size: 3", "trial.model.patch_size", "3 does not divide"),
    _edit("heads that do not divide", "num_heads: 2", "num_heads: 3", "trial.model", "32 is not a multiple", line=-2),
    _edit("explicit sizes missing", "    depth: 2\n", "", "trial.model.name", "needs depth", line=-2),
    _edit("evaluation after the end", "every_steps: 50", "every_steps: 101", "trial.evaluation.every_steps", "never"),
    _edit("more sampling steps than T", "num_steps: 10\n", "num_steps: 2000\n", "trial.sampling.num_steps", "1000"),
    _edit("path for built-in data", "resolution: 16", "path: x", "trial.data.path", "folder or prepared", "mnist"),
    _edit("classes of digits", "resolution: 16", "num_classes: 7", "trial.data.num_classes", "10, or 1", "got 7"),
    _edits("guidance without classes", 26, {"resolution: 16": "num_classes: 1", "num_steps: 10\n": "guidance_scale: 2\n"},
           "trial.sampling.guidance_scale", "2 is guidance", "needs classes", "num_classes 1"),
    _edit("grace after the end", "grace_steps: 50", "grace_steps: 500", "early_stopping.grace_steps", "500", "100"),
    _edit("workers that do not divide", "per_trial: 1", "per_trial: 3", "resources.workers_per_trial", "batch_size 8"),
    _edit("metric not reported", "search:\n", "metric: fid_10k\nsearch:\n", "metric", "fd_efficientnet_lite0_16"),
    _edit("a GPU and a half", "workers_per_trial: 1", "gpus_per_worker: 1.5", "resources.gpus_per_worker", "got 1.5"),
    _edit("folder without a path", "name: mnist", "name: folder", "trial.data.path", "is missing"),
    _edit("missing data", _DATA, "data:\n    name: folder\n    path: no/images", "'no/images' does not exist", line=1),
    BadYaml("a file as data", _file_as_data, 5, ("trial.data.path", "images.zip", "is not a folder")),
    _edit("empty path", _DATA, "data:\n    name: folder\n    path: ''", "trial.data.path", "empty text", line=1),
    # Methods that do not go together
    _edit("routing of a Switch-DiT", "    name: DiT\n", "    name: Switch-DiT\n", "trial.routing.name", "dtr does not go with Switch-DiT", "name: none", line=6),
    _edit("experts of a plain DiT", "    name: DiT\n", "    name: DiT\n    num_experts: 2\n", "trial.model.num_experts", "is for Switch-DiT and Multi-DiT"),
    _edit("more chosen experts than there are", "    name: DiT\n", "    name: Switch-DiT\n    top_k: 4\n", "trial.model.top_k", "4 is more than the 3", line=1),
    _edit("heads of a U-Net", "    name: DiT\n", "    name: ADM-T\n", "trial.model", "is for DiT", line=2),
    _edit("captions for a U-Net", "    resolution: 16\n  model:\n    name: DiT\n    hidden_size: 32\n    depth: 2\n    num_heads: 2\n    patch_size: 4\n",
          "    resolution: 16\n    text_encoder: ./clip\n  model:\n    name: ADM-T\n", "trial.data.text_encoder", "captions go with a DiT"),
    _edit("classes beside captions", "resolution: 16", "resolution: 16\n    text_encoder: ./clip\n    num_classes: 10", "trial.data.num_classes", "captions", line=2),
    _edit("unknown intervals", "    name: min_snr\n    gamma: 5\n", "    name: ant_uw\n    intervals: {name: snrr}\n", "trial.weighting.intervals.name", "did you mean snr?", line=1),
    _edit("affinity without a file", "    name: min_snr\n    gamma: 5\n", "    name: ant_uw\n    intervals: {name: affinity}\n", "trial.weighting.intervals.from", "is missing", line=1),
    _edit("intervals of a weighting", "    gamma: 5\n", "    intervals: {name: snr}\n", "trial.weighting.intervals", "only under ant_uw and ant_pcgrad and ant_nash"),
    _edit("more clusters than channels", "    name: dtr\n    alpha: 4\n    beta: 0.8\n", "    name: explicit_clustered\n    num_clusters: 20\n", "trial.routing.num_clusters", "20 intervals cannot divide the 16 channels", line=1),
    _edit("more parts than images", "batch_size: 8", "batch_size: 8\n    accumulation_steps: 9", "trial.training.accumulation_steps", "9 is more than", line=1),
    # Points
    _edit("points without any", "sampler: tpe\n  num_trials: 4\n  starting_points:\n    - routing.alpha: 4\n      weighting.name: vanilla\n", "sampler: points\n", "search.starting_points", "are missing"),
    _edit("a point that leaves out a parameter", "sampler: tpe\n  num_trials: 4", "sampler: points", "search.starting_points[0]", "leaves out routing.beta", line=2),
    _edit("more trials than points", "sampler: tpe\n  num_trials: 4\n  starting_points:\n    - routing.alpha: 4\n", "sampler: points\n  num_trials: 4\n  starting_points:\n    - routing.alpha: 4\n      routing.beta: 1\n", "search.num_trials", "4 is more than the 1", line=1),
    _edit("a list in a point", "    - routing.alpha: 4\n", "    - routing.alpha: [4, 9]\n", "search.starting_points[0].routing.alpha", "9 is outside its range"),
    # The space
    BadYaml("empty space", GOOD[: GOOD.index("  routing.alpha:")].replace("space:", "space: {}"), 31, ("space", "empty")),
    _edit("nothing as the space", _SPACE, "space:\n", "space", "section", "nothing", line=-1),
    _space("unknown parameter", "routing.alhpa: {type: uniform, low: 1, high: 2}", "space.routing.alhpa", "routing.alpha?"),
    _space("parameter of no section", "alpha: {type: uniform, low: 1, high: 2}", "space.alpha", "did you mean routing.alpha"),
    _space("nested space", "sampling: {guidance_scale: {type: uniform, low: 1, high: 2}}", "sampling.guidance_scale"),
    _space("type missing", "training.lr: {low: 1, high: 2}", "space.training.lr", "has no type", "loguniform"),
    _space("unknown type", "training.lr: {type: unifrom, low: 1, high: 2}", "space.training.lr", "mean uniform?"),
    _space("low above high", "training.lr: {type: uniform, low: 2, high: 1}", "space.training.lr.low", "2 is not below high 1"),
    _space("low equal to high", "training.batch_size: {type: int, low: 2, high: 2}", "batch_size.low", "2 is not below"),
    _space("low of 0 in a logarithm", "training.lr: {type: loguniform, low: 0, high: 1}", "training.lr.low", "above 0"),
    _space("step that does not divide", "training.lr: {type: quniform, low: 0, high: 1, step: 0.3}", "training.lr.step", "0.3"),
    _space("integer step", "training.batch_size: {type: int, low: 1, high: 8, step: 2}", "batch_size.step", "2 does not"),
    _space("step of 0", "training.lr: {type: quniform, low: 1, high: 2, step: 0}", "space.training.lr.step", "above 0"),
    _space("logarithm with a step", "training.seed: {type: int, low: 1, high: 9, step: 2, log: true}", "seed.log", "step 2"),
    _space("high missing", "training.lr: {type: uniform, low: 1}", "space.training.lr.high", "is missing"),
    _space("empty choice", "data.name: {type: choice, values: []}", "space.data.name.values", "at least one entry"),
    _space("repeated choice", "training.lr: {type: choice, values: [1, 1.0]}", "training.lr.values", "repeat", "[1, 1]"),
    _space("choice of lists", "training.lr: {type: choice, values: [[1]]}", "training.lr.values[0]", "expected a number"),
    _space("unknown choice", "routing.name: {type: choice, values: [dtr, dtrr]}", "space.routing.name: 'dtrr' is not one of", "mean dtr?"),
    _space("range beyond the trial's", "training.ema_decay: {type: uniform, low: 0, high: 1}", "ema_decay", "below 1"),
    _space("range of floats for integers", "training.seed: {type: uniform, low: 0, high: 9}", "training.seed", "whole number", "type: int"),
    _space("unreachable parameter", "weighting.k: {type: uniform, low: 1, high: 2}", "weighting.k", "only under p2: give it a `when`"),
    _space("other metrics", "evaluation.num_samples: {type: int, low: 16, high: 32}", "evaluation.num_samples", "_32"),
    _edits("batches that workers cannot divide", 32,
           {"space:\n": "space:\n  training.batch_size: {type: int, low: 7, high: 8}\n", "per_trial: 1": "per_trial: 2"},
           "space.training.batch_size", "2 workers do not divide", "7"),
    _space("evaluation searched away", "training.num_steps: {type: int, low: 20, high: 100}", "space.training.num_steps",
           "with training.num_steps = 20", "every_steps: 50 is more than"),
    _edit("`when` on an unknown name", "{weighting.name: min_snr}}", "{weighting.nam: min_snr}}", "mean weighting.name?"),
    _edit("`when` on a value never taken", "{weighting.name: p2}}", "{weighting.name: p3}}", "weighting.gamma@p2", "never 'p3'", "p2"),
    _edit("`when` on nothing", "when: {weighting.name: p2}}", "when: {weighting.name: []}}", "gamma@p2", "one entry"),
    _space("`when` on itself", "training.seed: {type: choice, values: [1, 2], when: {training.seed: 1}}", "seed", "circle"),
    _edits("`when` in a circle", 32, {"high: 8}": "high: 8, when: {routing.beta: 1}}",
           "step: 0.1}": "step: 0.1, when: {routing.alpha: 1}}"}, "space.routing.alpha.when", "circle", "routing.beta"),
    _edit("two ranges at once", "when: {weighting.name: p2}", "when: {weighting.name: [p2, min_snr]}", "can exist beside"),
    _edit("alias of no word", "gamma@p2", "gamma@p 2", "weighting.gamma@p 2", "alias"),
    # Points and the best trial's changes
    _edit("point outside", "    - routing.alpha: 4", "    - routing.alpha: 9", "points[0].routing.alpha", "9 is outside", "1 to 8"),
    _edit("point off the grid", "    - routing.alpha: 4", "    - routing.beta: 0.55", "points[0].routing.beta", "steps of 0.1"),
    _edit("point on a name not searched", "    - routing.alpha: 4", "    - training.lr: 1", "training.lr", "is not searched"),
    _edit("point with a typo", "    - routing.alpha: 4", "    - routing.alhpa: 4", "points[0]", "did you mean routing.alpha?"),
    _edit("point where it is not", "    - routing.alpha: 4", "    - weighting.gamma: 1", "does not exist in this point"),
    _edit("choice not in the point's list", "      weighting.name: vanilla", "      weighting.name: ant_uw", "points[0]",
          "'ant_uw' is outside"),
    _edit("unknown change for the best", "  training.num_steps: 200", "  training.num_step: 200", "best.training.num_step",
          "did you mean training.num_steps?"),
    _edit("wrong change for the best", "  training.num_steps: 200", "  training.num_steps: many", "best.training.num_steps",
          "whole number", "'many'"),
]
