"""SweepConfig: a base trial, the space around it, and how the search spends its budget."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from dtr_ray.config.base import Config, override
from dtr_ray.config.space import Choice, Scalar, Space, corner_assignments, ordered
from dtr_ray.config.trial import Positive, PositiveFloat, TrialConfig


class SearchConfig(Config):
    """Which trials are run."""

    sampler: Literal["tpe", "random"] = "tpe"
    num_trials: Positive = 20
    """Trials in all, failed ones counted."""
    num_startup_trials: Annotated[int, Field(ge=0)] = 8
    """Random trials before TPE's model is used."""
    seed: Annotated[int, Field(ge=0)] = 0
    starting_points: list[dict[str, Scalar]] = []
    """Parameters of the first trials, by dotted name; what a point leaves out is sampled."""


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


class MedianStopping(Config):
    """Stops a trial whose best value is worse than the median of the others' at the same step."""

    name: Literal["median"] = "median"
    grace_steps: Positive
    min_trials: Positive = 3
    tolerance: Annotated[float, Field(ge=0, lt=1)] = 0.0


StoppingConfig = Annotated[NoStopping | ASHAStopping | MedianStopping, Field(discriminator="name")]


class ResourcesConfig(Config):
    """What one trial takes from the cluster."""

    workers_per_trial: Positive = 1
    cpus_per_worker: Positive = 1
    gpus_per_worker: Annotated[float, Field(ge=0)] = 0.0
    """A whole number, or a fraction below 1 to share a GPU between one-worker trials."""
    placement: Literal["auto", "tune", "train"] = "auto"
    """`tune`: in the trial's own process (one worker); `train`: Ray Train; `auto`: by the number of workers."""
    max_concurrent: Positive | None = None
    """Trials side by side at most; default: as many as fit the cluster."""
    autoscaling: bool = False
    """The cluster adds machines when they are asked for, up to `max_concurrent` trials' worth; what it has
    at the start says nothing then."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.placement == "tune" and self.workers_per_trial > 1:
            raise ValueError("placement: tune runs one worker; several workers need placement: train (or auto)")
        if self.gpus_per_worker % 1 and (self.gpus_per_worker > 1 or self.workers_per_trial > 1):
            raise ValueError("gpus_per_worker is a whole number, or below 1 for trials of one worker")
        if self.autoscaling and self.max_concurrent is None:
            raise ValueError("autoscaling needs max_concurrent: how many trials the grown cluster has room for")
        return self

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
    """Times that a trial goes on from its checkpoint after its process died; errors of its own are not retried."""
    stall_timeout_s: PositiveFloat = 1800.0
    """The sweep ends with a message when no trial makes a step for so long."""


class TrackingConfig(Config):
    """Where MLflow records go."""

    uri: str | None = None
    """Tracking URI; default: MLFLOW_TRACKING_URI, else SQLite in the output folder."""
    experiment: str | None = None
    """Experiment's name; default: the sweep's."""
    register_as: str | None = None
    """Name in the model registry for train_best; default: the sweep's name."""


class StorageConfig(Config):
    """Where results go."""

    output: str = "runs"
    """Folder that holds the sweep's folder; on a cluster, one that every node sees."""
    study: str | None = None
    """Optuna storage URL; default: SQLite in the sweep's folder."""


class SweepConfig(Config):
    """A sweep, whole, as a search space file holds it."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Name of the sweep: its folder, its study, its MLflow experiment."""
    trial: TrialConfig
    """The base trial; searched parameters replace its values."""
    space: Annotated[Space, Field(min_length=1)]
    """Searched parameters by their dotted name in the trial (`routing.alpha`)."""
    metric: str | None = None
    """What the sweep minimises; default: the evaluation's Fréchet distance."""
    search: SearchConfig = SearchConfig()
    early_stopping: StoppingConfig = NoStopping()
    resources: ResourcesConfig = ResourcesConfig()
    budget: BudgetConfig = BudgetConfig()
    failures: FailuresConfig = FailuresConfig()
    tracking: TrackingConfig = TrackingConfig()
    storage: StorageConfig = StorageConfig()
    best: dict[str, Any] = {}
    """Changes, by dotted name, for `train_best`'s full schedule (`training.num_steps`, ...)."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        ordered(self.space)
        if self.metric not in (None, self.objective):
            raise ValueError(f"metric {self.metric!r} is not what the trial's evaluation reports: {self.objective}")
        for params in corner_assignments(self.space):
            self._check_trial(params, f"space: with {params}")
        for number, point in enumerate(self.search.starting_points):
            self._check_point(number, point)
        self._check_changes("best", self.best)
        grace = getattr(self.early_stopping, "grace_steps", None)
        if grace is not None and grace > self.trial.training.num_steps:
            raise ValueError(
                f"early_stopping.grace_steps {grace} is more than training.num_steps {self.trial.training.num_steps}"
            )
        if self.trial.training.batch_size % self.resources.workers_per_trial:
            raise ValueError(
                f"trial.training.batch_size {self.trial.training.batch_size} is not a multiple of "
                f"resources.workers_per_trial {self.resources.workers_per_trial}"
            )
        return self

    def _check_trial(self, params: dict[str, Any], where: str) -> None:
        try:
            trial = self.trial_config(params)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            key = ".".join(str(part) for part in first["loc"])
            raise ValueError(f"{where}: {key}: {first['msg']}") from None
        if trial.evaluation.metric != self.objective:
            raise ValueError(f"{where}: trials would report {trial.evaluation.metric}, not {self.objective}")

    def _check_point(self, number: int, point: dict[str, Scalar]) -> None:
        where = f"search.starting_points[{number}]"
        for name, value in point.items():
            if name not in self.space:
                raise ValueError(f"{where}: {name} is not searched: {', '.join(self.space)}")
            parameter = self.space[name]
            inside = (
                value in parameter.values
                if isinstance(parameter, Choice)
                else not isinstance(value, str | bool) and parameter.low <= value <= parameter.high
            )
            if not inside:
                raise ValueError(f"{where}: {name} = {value!r} is outside its range")
            if not parameter.exists(dict(point)):
                raise ValueError(f"{where}: {name} does not exist there: it needs {parameter.when}")

    def _check_changes(self, where: str, changes: dict[str, Any]) -> None:
        try:
            TrialConfig.from_dict(override(self.trial.to_dict(), changes))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            raise ValueError(f"{where}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None

    @property
    def objective(self) -> str:
        """Name of the metric that is minimised."""
        return self.trial.evaluation.metric

    def trial_config(self, params: dict[str, Any]) -> TrialConfig:
        """The trial with searched parameters put in, validated."""
        return TrialConfig.from_dict(override(self.trial.to_dict(), params))
