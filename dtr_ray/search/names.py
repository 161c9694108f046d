"""Short names of searched parameters, and figures in words, for tables and lines."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from dtr_ray.config.space import target


def short_names(space: Iterable[str]) -> dict[str, str]:
    """A heading for each searched value by its dotted name: `alpha`, `weighting` for its name, `gamma`.

    The dotted name where two would be the same.
    """
    names = list(dict.fromkeys(target(key) for key in space))
    shorts = [name.removesuffix(".name").rpartition(".")[2] for name in names]
    count = Counter(shorts)
    return {name: short if count[short] == 1 else name for name, short in zip(names, shorts, strict=True)}


def short_value(value: Any) -> str:
    """A value in few characters."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def describe_params(params: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """Parameters in one line: `alpha 4, beta 0.8, weighting min_snr`."""
    return ", ".join(f"{names[name]} {short_value(value)}" for name, value in params.items())


def figure(values: Mapping[str, float], metric: str) -> str:
    """A metric's value in a report, with its standard error where that is known: `12.34 ± 0.56`."""
    return with_error(values[metric], values.get(f"{metric}_stderr"))


def with_error(value: float, error: float | None) -> str:
    """`12.34 ± 0.56`, or the value alone."""
    return f"{value:.4g}" if error is None else f"{value:.4g} ± {error:.2g}"
