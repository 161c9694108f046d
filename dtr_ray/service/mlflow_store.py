"""MlflowStore: puts a sweep's records into MLflow, so that sending one twice changes nothing.

What makes it so, checked with MLflow 3.17: SQL stores hold a metric once for the same run, key, time,
step and value (also through a server, which uses the same store); parameters may be set again to the
value that they have; tags, artifacts and a run's status replace what was there; runs are looked for by
their tags before one is made.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from dtr_ray.disk import sync
from dtr_ray.service.mlflow_client import connect, sqlite_path, sync_artifacts

if TYPE_CHECKING:
    from mlflow import MlflowClient

T = TypeVar("T")

SWEEP_RUN = "sweep"

_SWEEP_ID, _RUN_KEY, _STATUS = "dtr_ray.sweep_id", "dtr_ray.run_key", "dtr_ray.status"
_PARENT = "mlflow.parentRunId"
_STATUSES = {"FINISHED": "completed", "KILLED": "pruned", "FAILED": "failed"}
# MLflow's limits for one call of log_batch.
_MAX_ENTRIES, _MAX_PER_KIND = 1000, {"metric": 1000, "param": 100, "tag": 100}
# An answer of this kind can mean the record or a passing trouble of the server's database.
_BAD_REQUEST_TRIES = 5
_PASSING_HTTP = (401, 403, 404, 408, 425, 429)


class RefusedError(Exception):
    """MLflow will never take this."""


@dataclass(frozen=True)
class Entry:
    """One metric value, parameter or tag of a run."""

    kind: Literal["metric", "param", "tag"]
    key: str
    value: Any
    time_ms: int = 0
    step: int = 0


def entries_of(record: dict[str, Any]) -> list[Entry]:
    """What a record of kind metrics, tags, params or start puts on its run."""
    match record["kind"]:
        case "metrics":
            time_ms, step = record["time_ms"], record["step"]
            metrics = [Entry("metric", k, v, time_ms, step) for k, v in record["values"].items()]
            counts = record.get("non_finite", {}).items()
            return metrics + [
                Entry(
                    "tag",
                    f"dtr_ray.non_finite.{k}",
                    f"{count} values, the first at step {first}, the last {value}",
                )
                for k, (value, first, count) in counts
            ]
        case "tags":
            return [Entry("tag", k, v) for k, v in record["values"].items()]
        case "params":
            return [Entry("param", k, v) for k, v in record["values"].items()]
        case "start":
            tags = {_STATUS: "running", **record["tags"]}
            return [Entry("tag", k, v) for k, v in tags.items()] + [
                Entry("param", k, v) for k, v in record["params"].items()
            ]
    return []


class MlflowStore:
    """The runs of one sweep in an MLflow experiment.

    MLflow is imported and reached at the first call, not before. Every method may raise whatever MLflow,
    its database or the network raise; RefusedError says that trying again is of no use.
    """

    def __init__(
        self, tracking_uri: str, experiment: str, sweep_id: str, artifact_location: str | None
    ) -> None:
        self._uri, self._experiment, self._sweep_id = tracking_uri, experiment, sweep_id
        self._artifact_location = artifact_location
        self._connected: tuple[MlflowClient, str] | None = None
        self.run_ids: dict[str, str] = {}
        """MLflow's run ids by run key, as far as known."""
        self._knows_all = False
        """Whether `run_ids` has every run of this sweep in the experiment, but those that are unsure."""
        self.has_lost_runs = False
        """MLflow does not know a run that it had made: it may lack any of what it was sent."""
        self._unsure: set[str] = set()
        self._told: set[str] = set()
        """Runs whose `dtr_ray.status` says more than that they run."""
        self._bad_requests: dict[str, int] = {}

    def reset(self) -> None:
        """Connects anew at the next call, and looks for the experiment again."""
        self._connected = None

    def connect(self) -> None:
        """Reaches MLflow and makes the experiment, unless that is done."""
        self._connect()

    def harden(self) -> None:
        """Has on the disk what a SQLite file has taken: it ends a transaction with a name that it removes."""
        path = sqlite_path(self._uri)
        if path is not None:
            sync(path.absolute().parent)

    def settled(self, run_key: str) -> None:
        """The run's records so far are dealt with: a bad request to come is about another one."""
        self._bad_requests.pop(run_key, None)

    def start(self, run_key: str, record: dict[str, Any]) -> None:
        """Makes the run, or sets it running again, from its start record (without tags and parameters)."""
        name, parent = record["name"], record["parent"]
        if self._find(run_key) is None:
            self._create(run_key, name, parent, record["time_ms"])
            return
        run_id = self.run_ids[run_key]
        self._call(run_key, lambda client: client.update_run(run_id, status="RUNNING", name=name))
        if parent is not None:
            parent_id = self._run(parent, record["time_ms"])
            self._call(run_key, lambda client: client.set_tag(run_id, _PARENT, parent_id))

    def log(self, run_key: str, entries: Sequence[Entry]) -> list[tuple[Entry, str]]:
        """Sends entries in order; returns those that MLflow refuses for good, with the reason."""
        refused = []
        run_id = self._run(run_key, entries[0].time_ms)
        for batch in _batches(entries):
            refused += self._log_batch(run_key, run_id, batch)
        statuses = [e.value for e in entries if e.kind == "tag" and e.key == _STATUS]
        if statuses and not refused:
            (self._told.discard if statuses[-1] == "running" else self._told.add)(run_key)
        return refused

    def artifact(self, run_key: str, path: Path, artifact_path: str) -> None:
        """Copies a file, or a folder's content, to the run's artifacts."""
        run_id = self._run(run_key, 0)
        if path.is_dir():
            self._call(run_key, lambda client: client.log_artifacts(run_id, str(path), artifact_path or None))
        elif path.exists():
            self._call(run_key, lambda client: client.log_artifact(run_id, str(path), artifact_path or None))
        else:
            raise RefusedError(f"{path} does not exist")
        if sqlite_path(self._uri) is not None:
            run = self._call(run_key, lambda client: client.get_run(run_id))
            sync_artifacts(run.info.artifact_uri, artifact_path)

    def end(self, run_key: str, status: str, time_ms: int) -> None:
        """Ends the run; its `dtr_ray.status` follows unless something more exact was set."""
        run_id = self._run(run_key, time_ms)
        if run_key in self._unsure:
            # A request that seemed lost may have made a second run after all.
            self._find(run_key, again=True)
            self._unsure.discard(run_key)
        if run_key not in self._told:
            run = self._call(run_key, lambda client: client.get_run(run_id))
            if run.data.tags.get(_STATUS) == "running":
                self._call(run_key, lambda client: client.set_tag(run_id, _STATUS, _STATUSES[status]))
        self._call(run_key, lambda client: client.set_terminated(run_id, status, time_ms))

    def _log_batch(self, run_key: str, run_id: str, batch: Sequence[Entry]) -> list[tuple[Entry, str]]:
        """Halves a batch that is refused until the entries to blame are alone."""
        from mlflow.entities import Metric, Param, RunTag

        metrics = [Metric(e.key, e.value, e.time_ms, e.step) for e in batch if e.kind == "metric"]
        params = [Param(e.key, e.value) for e in batch if e.kind == "param"]
        tags = [RunTag(e.key, e.value) for e in batch if e.kind == "tag"]
        try:
            self._call(run_key, lambda client: client.log_batch(run_id, metrics, params, tags))
        except RefusedError as error:
            if len(batch) == 1 or self._is_deleted(run_key, run_id):
                return [(entry, str(error)) for entry in batch]
            middle = len(batch) // 2
            first = self._log_batch(run_key, run_id, batch[:middle])
            return first + self._log_batch(run_key, run_id, batch[middle:])
        return []

    def _is_deleted(self, run_key: str, run_id: str) -> bool:
        run = self._call(run_key, lambda client: client.get_run(run_id))
        return bool(run.info.lifecycle_stage == "deleted")

    def _run(self, run_key: str, time_ms: int) -> str:
        """The run's id; a run without a start record is made all the same."""
        if self._find(run_key) is None:
            self._create(run_key, run_key, None if run_key == SWEEP_RUN else SWEEP_RUN, time_ms)
        return self.run_ids[run_key]

    def _find(self, run_key: str, again: bool = False) -> str | None:
        if run_key in self.run_ids and not again:
            return self.run_ids[run_key]
        client, experiment_id = self._connect()
        if self._knows_all and run_key not in self._unsure:
            # MLflow takes the longer to answer the more runs there are.
            return None
        query = f"tags.`{_SWEEP_ID}` = '{self._sweep_id}' and tags.`{_RUN_KEY}` = '{run_key}'"
        found: list[str] = [run.info.run_id for run in client.search_runs([experiment_id], query)]
        if not found:
            return None
        # The oldest is last.
        kept = next((run_id for run_id in found if run_id == self.run_ids.get(run_key)), found[-1])
        for run_id in found:
            if run_id != kept:
                client.delete_run(run_id)
        self.run_ids[run_key] = kept
        return kept

    def _create(self, run_key: str, name: str, parent: str | None, time_ms: int) -> None:
        client, experiment_id = self._connect()
        tags = {_SWEEP_ID: self._sweep_id, _RUN_KEY: run_key, _STATUS: "running"}
        tags["dtr_ray.kind"] = "sweep" if run_key == SWEEP_RUN else "trial"
        if run_key != SWEEP_RUN:
            tags["dtr_ray.trial_id"] = run_key
        if parent is not None:
            tags[_PARENT] = self._run(parent, time_ms)
        self._unsure.add(run_key)
        run = client.create_run(experiment_id, time_ms or None, tags, name[:250])
        self._unsure.discard(run_key)
        self.run_ids[run_key] = run.info.run_id

    def _connect(self) -> tuple["MlflowClient", str]:
        if self._connected is None:
            client = connect(self._uri)
            self._connected = (client, self._experiment_id(client))
            if SWEEP_RUN in self.run_ids:
                # It may have come back with another, empty database.
                self._call(SWEEP_RUN, lambda client: client.get_run(self.run_ids[SWEEP_RUN]))
            if not self.run_ids:
                query, experiments = f"tags.`{_SWEEP_ID}` = '{self._sweep_id}'", [self._connected[1]]
                self._knows_all = not client.search_runs(experiments, query, max_results=1)
        return self._connected

    def _experiment_id(self, client: "MlflowClient") -> str:
        from mlflow.exceptions import MlflowException

        found = client.get_experiment_by_name(self._experiment)
        if found is None:
            try:
                return client.create_experiment(self._experiment, self._artifact_location)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                found = client.get_experiment_by_name(self._experiment)
        if found is None or found.lifecycle_stage == "deleted":
            raise RuntimeError(f"the MLflow experiment {self._experiment!r} is deleted: restore it to go on")
        return str(found.experiment_id)

    def _call(self, run_key: str, request: Callable[["MlflowClient"], T]) -> T:
        """Makes a request about a run; tells refusals from troubles that pass."""
        from mlflow.exceptions import MlflowException
        from requests import HTTPError

        client, _ = self._connect()
        try:
            return request(client)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                # The run was removed for good, or the server has another database: look or make anew.
                self.has_lost_runs = True
                self.run_ids.clear()
                self._told.clear()
                self._knows_all = False
            if error.error_code == "BAD_REQUEST":
                self._bad_requests[run_key] = self._bad_requests.get(run_key, 0) + 1
                if self._bad_requests[run_key] >= _BAD_REQUEST_TRIES:
                    raise RefusedError(str(error)) from error
            if error.error_code == "INVALID_PARAMETER_VALUE":
                raise RefusedError(str(error)) from error
            raise
        except HTTPError as error:
            code = 0 if error.response is None else error.response.status_code
            if 400 <= code < 500 and code not in _PASSING_HTTP:
                raise RefusedError(str(error)) from error
            raise


def _batches(entries: Sequence[Entry]) -> list[list[Entry]]:
    """Splits entries, in order, by what one call may hold."""
    batches: list[list[Entry]] = [[]]
    counts = dict.fromkeys(_MAX_PER_KIND, 0)
    for entry in entries:
        if len(batches[-1]) == _MAX_ENTRIES or counts[entry.kind] == _MAX_PER_KIND[entry.kind]:
            batches.append([])
            counts = dict.fromkeys(_MAX_PER_KIND, 0)
        batches[-1].append(entry)
        counts[entry.kind] += 1
    return batches
