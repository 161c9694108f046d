"""EvaluationConfig: the figure that a sweep decides by, what is measured beside it, and cheap stand-ins."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from dtr_ray.config.base import Config, Positive, Text
from dtr_ray.config.errors import broken

ExtraMetric = Literal["kid", "inception_score", "precision_recall"]
Features = Literal["inception", "efficientnet_lite0"]
Sampler = Literal["ddpm", "ddim", "dpm_solver++"]
NUM_FEATURES: dict[Features, int] = {"inception": 2048, "efficientnet_lite0": 1280}
"""Features of an image; with no more samples than that the distance's bias is not understood."""


class ProxyConfig(Config):
    """A cheaper distance that early evaluations report instead; compared with its own kind alone."""

    until_step: Positive
    """Evaluations at this training step and before use the proxy."""
    num_samples: Annotated[int, Field(ge=2)] | None = None
    """Default: as the full evaluation."""
    sampler: Sampler | None = None
    """Default: as `sampling`."""
    num_steps: Positive | None = None
    """Steps of the sampler; default: as `sampling`."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.num_samples is None and self.sampler is None and self.num_steps is None:
            rule = "changes nothing: give num_samples, sampler or num_steps"
            raise broken("until_step", rule)
        return self


class EvaluationConfig(Config):
    """The Fréchet distance that the sweep decides by."""

    every_steps: Positive = 10_000
    num_samples: Annotated[int, Field(ge=2)] = 10_000
    batch_size: Positive = 250
    """Images that wait for their features at most, beside a GPU; samples are always drawn in blocks of 50."""
    features: Features = "inception"
    """`inception`: clean-fid's, metric fid_*; `efficientnet_lite0`: offline, fd_efficientnet_lite0_*."""
    feature_weights: Text | None = None
    """A local file with clean-fid's Inception weights (from the current folder); default: downloaded."""
    extra_metrics: list[ExtraMetric] = []
    """Measured on the same samples beside the distance that decides: kid_*, is_*, precision_*, recall_*."""
    standard_error: bool = True
    """Report the distance's standard error, the noise of drawing finitely many samples (not 2), beside it."""
    extrapolate: bool = False
    """Report the distance extrapolated to infinitely many samples (Chong and Forsyth, 2020) beside it; takes
    more samples than there are features."""
    proxy: ProxyConfig | None = None
    """A cheaper distance for early evaluations."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Fixes noise and labels of the samples, the same in every trial."""
    grid_images: Annotated[int, Field(ge=1, le=400)] = 40

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name, least in (("inception_score", 10), ("precision_recall", 4)):
            if name in self.extra_metrics and self.num_samples < least:
                rule = f"{self.num_samples} is too few for {name}, which takes at least {least}"
                raise broken("num_samples", rule, "extra_metrics")
        if self.extrapolate and not self.can_extrapolate:
            rule = (
                f"takes more samples than the {NUM_FEATURES[self.features]} features; got {self.num_samples}"
            )
            raise broken("extrapolate", rule, "num_samples")
        return self

    @property
    def can_extrapolate(self) -> bool:
        """Whether there are samples enough to extrapolate the distance from."""
        return self.num_samples > NUM_FEATURES[self.features]

    @property
    def metric(self) -> str:
        """The metric's name: `fid_10k` with Inception, `fd_<features>_<samples>` otherwise."""
        return self._name("fid", "fd", self.num_samples)

    @property
    def standard_error_name(self) -> str:
        """The name of the metric's standard error: `fid_10k_stderr`, ..."""
        return f"{self.metric}_stderr"

    @property
    def infinity_name(self) -> str:
        """The name of the extrapolated distance: `fid_infinity`, or `fd_<features>_infinity`."""
        return "fid_infinity" if self.features == "inception" else f"fd_{self.features}_infinity"

    @property
    def proxy_metric(self) -> str | None:
        """The name of the proxy's distance: `proxy_fid_2k`, ...; None without a proxy."""
        if self.proxy is None:
            return None
        return f"proxy_{self._name('fid', 'fd', self.proxy.num_samples or self.num_samples)}"

    def is_proxy(self, step: int) -> bool:
        """Whether an evaluation at this training step is one of the proxy."""
        return self.proxy is not None and step <= self.proxy.until_step

    def metric_at(self, step: int) -> str:
        """The name of the distance that an evaluation at this training step reports."""
        proxy = self.proxy_metric
        return proxy if proxy is not None and self.is_proxy(step) else self.metric

    @property
    def extra_names(self) -> dict[ExtraMetric, tuple[str, ...]]:
        """The names under which each of the extra metrics is reported, by the same rule as `metric`.

        `kid_10k` (other features: `kd_<features>_10k`), `is_10k`, `precision_10k` and `recall_10k`
        (`is_<features>_10k`, ...).
        """
        pairs: dict[ExtraMetric, tuple[tuple[str, str], ...]] = {
            "kid": (("kid", "kd"),),
            "inception_score": (("is", "is"),),
            "precision_recall": (("precision", "precision"), ("recall", "recall")),
        }
        return {
            metric: tuple(self._name(*names, self.num_samples) for names in pairs[metric])
            for metric in pairs
            if metric in self.extra_metrics
        }

    def _name(self, inception: str, other: str, count: int) -> str:
        samples = f"{count // 1000}k" if count % 1000 == 0 else str(count)
        return (
            f"{inception}_{samples}" if self.features == "inception" else f"{other}_{self.features}_{samples}"
        )
