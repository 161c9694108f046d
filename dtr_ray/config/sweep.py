"""SweepConfig: a base trial, the space around it, and how the search spends its budget."""

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from dtr_ray.config.base import Config, Positive, PositiveFloat, Text, override
from dtr_ray.config.errors import RuleError, broken, shown
from dtr_ray.config.space import ParameterConfig, Scalar, Space, expanded, ordered
from dtr_ray.config.sweep_rules import space_key, sweep_problems, trial_name
from dtr_ray.config.trial import TrialConfig


class SearchConfig(Config):
    """Which trials are run."""

    sampler: Literal["tpe", "random", "points"] = "tpe"
    """`points`: the starting points alone, to compare what is known beforehand."""
    num_trials: Positive = 20
    """Trials in all, failed ones counted; with `points`, as many as there are, unless it says fewer."""
    num_startup_trials: Annotated[int, Field(ge=0)] = 8
    """Random trials before TPE's model is used."""
    seed: Annotated[int, Field(ge=0)] = 0
    starting_points: list[dict[str, Scalar | list[Scalar]]] = []
    """Parameters of the first trials, by dotted name; what a point leaves out is sampled. A list stands for
    one point with each of its values; several lists, for all their combinations, the last changing first."""

    @model_validator(mode="before")
    @classmethod
    def _count(cls, values: Any) -> Any:
        """With `points` there are as many trials as points."""
        if not isinstance(values, dict) or values.get("sampler") != "points" or "num_trials" in values:
            return values
        try:
            count = sum(len(list(expanded(point))) for point in values.get("starting_points", []))
            return values | {"num_trials": count} if count else values
        except (AttributeError, TypeError):
            # They are not points at all, which their own type tells better.
            return values

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.sampler == "points" and not self.starting_points:
            raise broken("starting_points", "are missing: sampler points runs nothing else", "sampler")
        if self.sampler == "points" and self.num_trials > len(self.points):
            rule = f"{self.num_trials} is more than the {len(self.points)} starting points"
            raise broken("num_trials", rule, "sampler", "starting_points")
        return self

    @property
    def points(self) -> list[dict[str, Scalar]]:
        """The starting points, each list written out."""
        return [point for given in self.starting_points for point in expanded(given)]


class NoStopping(Config):
    """Every trial runs to its end."""

    name: Literal["none"] = "none"


class ASHAStopping(Config):
    """Asynchronous successive halving: at each rung only the best 1 / reduction_factor go on."""

    name: Literal["asha"] = "asha"
    grace_steps: Positive
    """Training step of the first rung; no trial is stopped before. Too early a rung ranks noise."""
    reduction_factor: Annotated[float, Field(gt=1)] = 3.0
    tolerance: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Relative uncertainty of the metric: a trial within it of the rung's cut-off goes on."""
    sigma: Annotated[float, Field(ge=0)] = 0.0
    """A trial within so many of its figure's standard errors of the cut-off goes on too."""


class MedianStopping(Config):
    """Stops a trial whose best value is worse than the median of the others' at the same step."""

    name: Literal["median"] = "median"
    grace_steps: Positive
    min_trials: Positive = 3
    tolerance: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Relative uncertainty of the metric: a trial within it of the median goes on."""
    sigma: Annotated[float, Field(ge=0)] = 0.0
    """A trial within so many of its figure's standard errors of the median goes on too."""


StoppingConfig = Annotated[NoStopping | ASHAStopping | MedianStopping, Field(discriminator="name")]


class ResourcesConfig(Config):
    """What one trial takes from the cluster."""

    workers_per_trial: Positive = 1
    min_workers_per_trial: Positive | None = None
    """A trial goes on with so few of its workers where the cluster has lost machines; the batch stays what it
    is. Default: it waits until there is room for all of them."""
    cpus_per_worker: Positive = 1
    gpus_per_worker: Annotated[float, Field(ge=0)] = 0.0
    """A whole number, or a fraction below 1 to share a GPU between one-worker trials."""
    placement: Literal["auto", "tune", "train"] = "auto"
    """`tune`: in the trial's own process (one worker); `train`: Ray Train; `auto`: as the workers need."""
    max_concurrent: Positive | None = None
    """Trials side by side at most; default: as many as fit the cluster."""
    autoscaling: bool = False
    """The cluster adds machines when they are asked for, up to `max_concurrent` trials' worth; what it has
    at the start says nothing then."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        workers, gpus = self.workers_per_trial, self.gpus_per_worker
        if self.placement == "tune" and workers > 1:
            rule = f"tune runs one worker, not {workers}: several need train (or auto)"
            raise broken("placement", rule, "workers_per_trial")
        if gpus % 1 and gpus > 1:
            rule = f"must be a whole number, or below 1 to share a GPU; got {shown(gpus)}"
            raise broken("gpus_per_worker", rule)
        if gpus % 1 and workers > 1:
            rule = f"{shown(gpus)} shares a GPU, which only trials of one worker can; this has {workers}"
            raise broken("gpus_per_worker", rule, "workers_per_trial")
        if self.least_workers > workers:
            rule = f"{self.least_workers} is more than workers_per_trial {workers}"
            raise broken("min_workers_per_trial", rule, "workers_per_trial")
        return self

    @property
    def least_workers(self) -> int:
        """Workers that a trial can go on with."""
        return self.min_workers_per_trial or self.workers_per_trial

    @property
    def uses_train(self) -> bool:
        """Whether trials are placed through Ray Train."""
        return self.placement == "train" or (self.placement == "auto" and self.workers_per_trial > 1)


class BudgetConfig(Config):
    """When the search ends, whatever number of trials is left; running trials are stopped."""

    max_hours: PositiveFloat | None = None
    max_device_hours: PositiveFloat | None = None
    """Hours times devices (GPUs, or CPU workers where there is no GPU), over all trials."""


class FailuresConfig(Config):
    """What the sweep does about failed trials."""

    max_failed_trials: Annotated[int, Field(ge=0)] = 3
    """More failed trials than this end the sweep."""
    retries: Annotated[int, Field(ge=0)] = 2
    """Times that a trial whose process died goes on from its checkpoint; its own errors are not retried."""
    stall_timeout_s: PositiveFloat = 1800.0
    """The sweep ends with a message when no trial makes a step for so long."""
    hang_factor: Annotated[float, Field(gt=1)] = 10.0
    """A trial that gives no sign of life for so many times the longest time that it, or another on its host,
    took in the same phase has its processes ended and is retried; `stall_timeout_s` where none is known."""
    hang_timeout_s: PositiveFloat = 300.0
    """No trial is held to hang before so long."""


class TrackingConfig(Config):
    """Where MLflow records go."""

    uri: Text | None = None
    """Tracking URI; default: MLFLOW_TRACKING_URI, else SQLite in the output folder."""
    experiment: Text | None = None
    """Experiment's name; default: the sweep's."""
    register_as: Text | None = None
    """Name in the model registry for train_best; default: the sweep's name."""


class StorageConfig(Config):
    """Where results go."""

    output: Text = "runs"
    """Folder that holds the sweep's folder, on a cluster one that every node sees; or the address of a store
    (`s3://BUCKET/FOLDER`, `gs://...`, `file:///...`): then nodes need no folder in common."""
    study: Text | None = None
    """Optuna storage URL (`postgresql://USER@HOST/DATABASE`); default: SQLite in the sweep's folder."""
    study_name: Text | None = None
    """Name of a study that several sweeps share: they learn from one another's trials, and repeat none.
    Default: one of its own, under the sweep's name."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.study_name is not None and self.study is None:
            rule = f"{shown(self.study_name)} is to be shared, which a file in the sweep's own folder is not"
            raise broken("study_name", f"{rule}: set storage.study", "study")
        return self


def _ordered(space: Space) -> Space:
    ordered(space)
    return space


class SweepConfig(Config):
    """A sweep, whole, as a search space file holds it."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
    """Name of the sweep: its folder, its study, its MLflow experiment."""
    trial: TrialConfig
    """The base trial; searched parameters replace its values."""
    space: Annotated[
        dict[Annotated[str, AfterValidator(space_key)], ParameterConfig],
        Field(min_length=1, max_length=100),
        AfterValidator(_ordered),
    ]
    """Searched parameters by their dotted name in the trial (`routing.alpha`); a second range of one takes an
    alias (`weighting.gamma@p2`)."""
    metric: str | None = None
    """What the sweep minimises; default: the evaluation's Fréchet distance."""
    search: SearchConfig = SearchConfig()
    early_stopping: StoppingConfig = NoStopping()
    resources: ResourcesConfig = ResourcesConfig()
    budget: BudgetConfig = BudgetConfig()
    failures: FailuresConfig = FailuresConfig()
    tracking: TrackingConfig = TrackingConfig()
    storage: StorageConfig = StorageConfig()
    best: dict[Annotated[str, AfterValidator(trial_name)], Any] = {}
    """Changes, by dotted name, for `train_best`'s full schedule (`training.num_steps`, ...)."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        problems = list(sweep_problems(self))
        if problems:
            raise RuleError(*problems)
        return self

    @property
    def objective(self) -> str:
        """Name of the metric that is minimised."""
        return self.trial.evaluation.metric

    def trial_config(self, params: dict[str, Any]) -> TrialConfig:
        """The trial with searched parameters put in, validated."""
        return TrialConfig.from_dict(override(self.trial.to_dict(), params))
