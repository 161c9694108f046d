"""Repository: a hub's files in the cache folder, fetched once a machine and checked."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from dtr_ray.cache import cache_dir, locked
from dtr_ray.weights import hub
from dtr_ray.weights.download import DownloadError, FileFacts, download
from dtr_ray.weights.offline import HUB, OURS, forbidden_by
from dtr_ray.weights.record import Record

OnProgress = Callable[[int, int], None]
"""Hears how many bytes are here, and how many there will be, of what has to be fetched."""


@dataclass(frozen=True)
class Snapshot:
    """A repository's files on this machine, as of a commit."""

    folder: Path
    commit: str
    fetched_bytes: int = 0
    """What had to be downloaded for it."""


@dataclass(frozen=True)
class Repository:
    """Where a repository is, on the hub and here."""

    kind: hub.Kind
    name: str
    revision: str
    url: str
    """The hub's address."""
    key: str
    """Of the configuration, for messages."""
    commit: str | None = None
    """The one to have, where it is settled; else that of the revision when it is first asked for."""

    def find(self, on_progress: OnProgress) -> Snapshot:
        """The files that are needed, fetched where they are not here yet; raises ValueError."""
        found = self._recorded()
        if found is not None:
            return found
        # One lock for all revisions: they may share files.
        with locked(self._home / "fetch"):
            return self._recorded() or self._fetch(on_progress)

    @property
    def _home(self) -> Path:
        return cache_dir() / "weights" / self.name.replace("/", "--")

    @property
    def _record_path(self) -> Path:
        return self._home / f"{self.kind}@{quote(self.revision, safe='')}.json"

    def _recorded(self) -> Snapshot | None:
        """What has been fetched and checked before, if it is still so."""
        record = Record.read(self._record_path)
        if record is None or record.commit is None or self.commit not in (None, record.commit):
            return None
        folder = self._home / record.commit
        return Snapshot(folder, record.commit) if record.holds(folder) else None

    def _fetch(self, on_progress: OnProgress) -> Snapshot:
        listing, problem = self._listing()
        if listing is None:
            raise self._missing("", problem)
        try:
            names = hub.wanted_files(self.kind, listing.files)
        except ValueError as error:
            raise ValueError(f"{self._title} at {self.url} is not what it is to be: {error}") from error
        folder, facts = self._home / listing.commit, {name: listing.files[name] for name in names}
        missing = [name for name in names if not self._settled(folder, name, facts[name])]
        if missing and problem is not None:
            raise self._missing(missing[0], problem)
        done = self._download(folder, {name: facts[name] for name in missing}, on_progress)
        Record.of(folder, facts, listing.commit).write(self._record_path)
        return Snapshot(folder, listing.commit, done)

    def _download(self, folder: Path, facts: dict[str, FileFacts], on_progress: OnProgress) -> int:
        """Downloads files of a commit into its folder; returns their bytes."""
        total, done = sum(file.size or 0 for file in facts.values()), 0
        for name, file in facts.items():
            address, path = hub.file_url(self.url, self.name, folder.name, name), folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                download(address, path, file, hub.token_header(), on_bytes=_after(done, total, on_progress))
            except DownloadError as error:
                raise self._missing(name, error) from error
            done += path.stat().st_size
        return done

    def _listing(self) -> tuple[hub.Listing | None, DownloadError | None]:
        """What is in the repository: the hub knows, or else what has been downloaded before.

        With it why the hub could not be asked, where it could not.
        """
        revision, variable = self.commit or self.revision, forbidden_by(OURS, HUB)
        try:
            if variable is None:
                return hub.online_listing(self.url, self.name, revision), None
            problem = DownloadError(f"{variable} forbids to ask {self.url}")
        except DownloadError as error:
            problem = error
        record = Record.read(self._record_path)
        if record is not None and record.commit is not None and self.commit in (None, record.commit):
            return hub.Listing(record.commit, record.files), problem
        return hub.cached_listing(self.kind, self.name, revision), problem

    def _settled(self, folder: Path, name: str, facts: FileFacts) -> bool:
        """Whether the right file is in the commit's folder, or is put there from Hugging Face's own cache."""
        path = folder / name
        if path.exists() and facts.fault(path) is None:
            return True
        path.unlink(missing_ok=True)
        cached = hub.cached_file(self.name, folder.name, name)
        if cached is None or facts.fault(cached) is not None:
            return False
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(cached.resolve())
        return True

    @property
    def _title(self) -> str:
        return f"{self.key} {self.name}" + ("" if self.revision == "main" else f"@{self.revision}")

    def _missing(self, file: str, problem: DownloadError | None) -> ValueError:
        """The error for a file that is not here and cannot be had, with the ways out."""
        assert problem is not None
        if problem.reason == "GatedRepo":
            return ValueError(
                f"{self._title}: its owner must let you in: ask at {self.url}/{self.name}, and set HF_TOKEN"
            )
        if not file and problem.code in (401, 403, 404):
            is_revision = problem.reason == "RevisionNotFound"
            what = f"no revision {self.revision} of it" if is_revision else "no such repository"
            return ValueError(
                f"{self._title}: {self.url} has {what} ({problem}); HF_TOKEN opens what is private, and a "
                f"folder here is written ./{self.name}"
            )
        what = file or hub.NAMES[self.kind]
        return ValueError(
            f"{self._title}: {what} is not here (looked in {self._home} and {hub.hub_cache()}), and cannot "
            f"be fetched: {problem}. Set HF_ENDPOINT to a hub or mirror that can be reached, or copy the "
            f"first of these folders from a machine that has it, or name a local folder in {self.key}"
        )


def _after(before: int, total: int, on_progress: OnProgress) -> Callable[[int], None]:
    """What tells of one file's bytes, when those of others are here already."""
    return lambda count: on_progress(before + count, total)
