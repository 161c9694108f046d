"""The one place that finds pretrained weights: diffusers' VAE, CLIP's text encoder, clean-fid's Inception.

They come from the Hugging Face hub (HF_ENDPOINT names a mirror), from a local folder or file, or, Inception's
one file, from its authors (DTR_RAY_MIRROR: another address under which the file lies). What is fetched is
fetched once a machine, under a lock, checked, and kept in the cache folder with a record of what was checked.
"""

import hashlib
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from dtr_ray.cache import cache_dir, locked, looks_local
from dtr_ray.config import DataConfig
from dtr_ray.config.evaluation import EvaluationConfig
from dtr_ray.weights import hub
from dtr_ray.weights.download import DownloadError, FileFacts, check_url, download
from dtr_ray.weights.narrator import Narrator
from dtr_ray.weights.offline import HUB, OURS, forbidden_by
from dtr_ray.weights.record import Record
from dtr_ray.weights.repository import OnProgress, Repository

# The TorchScript that clean-fid and StyleGAN2-ADA use.
INCEPTION_FILE = "inception-2015-12-05.pt"
_INCEPTION_URL = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics"
_INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
# About: for the progress alone.
_INCEPTION_BYTES = 95_000_000
_KEYS = {"vae": "data.vae", "text_encoder": "data.text_encoder", "inception": "evaluation.feature_weights"}


@dataclass(frozen=True)
class Weights:
    """Weights that a configuration names."""

    kind: Literal["vae", "text_encoder", "inception"]
    source: str | None = None
    """Hub id, `id@revision`, or a local folder; Inception: a local file, or None for the cache's."""
    commit: str | None = None
    """The hub's commit, where it has been settled: all machines are to have the same."""
    url: str | None = None
    """Hub or mirror that it was settled at; default: that of the environment."""

    def __str__(self) -> str:
        """As messages call it."""
        return "clean-fid's Inception" if self.source is None else f"{_KEYS[self.kind]} {self.source}"


@dataclass(frozen=True)
class Found:
    """Weights that are on this machine."""

    weights: Weights
    """With the commit."""
    path: Path
    """Folder, or Inception's file."""
    fetched_bytes: int = 0
    """What had to be downloaded for it."""


def required_weights(data: DataConfig, evaluation: EvaluationConfig | None = None) -> list[Weights]:
    """The weights without which a trial, or its evaluation, does not run."""
    found = []
    if data.vae is not None:
        found.append(Weights("vae", data.vae))
    if data.text_encoder is not None:
        found.append(Weights("text_encoder", data.text_encoder))
    if evaluation is not None and evaluation.features == "inception":
        found.append(Weights("inception", evaluation.feature_weights))
    return found


def find(weights: Weights, on_progress: OnProgress | None = None) -> Found:
    """Weights on this machine, fetched where they are not here yet.

    Args:
        weights: which.
        on_progress: default: tells standard error.

    Raises:
        ValueError: they are not where they are said to be, cannot be had, or are others; one line.
    """
    if weights.kind == "inception" or not looks_local(str(weights.source)):
        return _find_in_cache(weights, on_progress)
    folder = Path(str(weights.source)).expanduser()
    if not folder.is_dir():
        raise ValueError(f"{weights} is no folder")
    return Found(weights, folder)


def ask(weights: Weights) -> str:
    """Address from which weights that are not here can be fetched; asks there, and fetches nothing.

    Raises:
        ValueError: they cannot be had, or are to be in a local place and are not there; one line.
    """
    try:
        if weights.kind != "inception" and not looks_local(str(weights.source)):
            variable = forbidden_by(OURS, HUB)
            name, revision = hub.split_source(str(weights.source))
            url = weights.url or hub.hub_url()
            if variable is None:
                hub.online_listing(url, name, weights.commit or revision)
        elif weights.source is None:
            url, variable = f"{_inception_base(weights)}/{INCEPTION_FILE}", forbidden_by(OURS)
            if variable is None:
                check_url(url)
        else:
            raise ValueError(f"{weights} is not there, or is something else")
    except DownloadError as error:
        raise ValueError(f"{weights} is not here, and cannot be fetched from {url}: {error}") from error
    if variable is not None:
        raise ValueError(f"{weights} is not here, and {variable} forbids to ask {url}")
    return url


def find_part(kind: hub.Kind, source: str, part: str) -> Path:
    """Folder of a part of the weights: all there is, or the part's own in a whole pipeline.

    Args:
        kind: of the weights.
        source: as in the configuration.
        part: `vae`, `text_encoder` or `tokenizer`.

    Raises:
        ValueError: as `find`.
    """
    return part_folder(find(Weights(kind, source)).path, part)


def part_folder(folder: Path, part: str) -> Path:
    """The part's own folder in that of a whole pipeline; else `folder`."""
    names = [path.relative_to(folder).as_posix() for path in (*folder.glob("*"), *folder.glob("*/*"))]
    return folder / hub.part_prefix(part, names)


def _find_in_cache(weights: Weights, on_progress: OnProgress | None) -> Found:
    with Narrator(str(weights)) as narrator:
        tell = on_progress or narrator
        try:
            if weights.kind == "inception":
                return _find_inception(weights, tell)
            return _find_in_hub(weights, str(weights.source), weights.kind, tell)
        except OSError as error:
            raise ValueError(
                f"{weights} cannot be kept in {cache_dir()} ({error}): set DTR_RAY_CACHE to a folder that can"
            ) from error


def _find_in_hub(weights: Weights, source: str, kind: hub.Kind, tell: OnProgress) -> Found:
    key = _KEYS[kind]
    try:
        name, revision = hub.split_source(source)
    except ValueError as error:
        raise ValueError(f"{key} {error}") from error
    url = weights.url or hub.hub_url()
    snapshot = Repository(kind, name, revision, url, key, weights.commit).find(tell)
    settled = replace(weights, commit=snapshot.commit, url=url)
    return Found(settled, snapshot.folder, snapshot.fetched_bytes)


def _find_inception(weights: Weights, tell: OnProgress) -> Found:
    own = weights.source is not None
    path = Path(weights.source).expanduser() if weights.source is not None else cache_dir() / INCEPTION_FILE
    if own and not path.is_file():
        raise ValueError(
            f"feature_weights {path} is no file; "
            f"clean-fid's Inception is at {_INCEPTION_URL}/{INCEPTION_FILE}"
        )
    base = _inception_base(weights)
    found = Found(weights if own else replace(weights, url=base), path)
    facts = FileFacts(checksum=f"sha256:{_INCEPTION_SHA256}")
    # A record for each place: there may be several copies, right ones and wrong ones.
    place = hashlib.sha256(str(path.absolute()).encode()).hexdigest()[:16]
    record_path = cache_dir() / "weights" / "inception" / f"{place}.json"

    def checked() -> bool:
        record = Record.read(record_path)
        return record is not None and record.files == {path.name: facts} and record.holds(path.parent)

    if checked():
        return found
    with locked(record_path):
        if checked():
            return found
        fault = facts.fault(path) if path.is_file() else "is not there"
        if fault is not None and own:
            raise ValueError(
                f"{path} is not clean-fid's Inception (it {fault}): "
                f"get it again from {_INCEPTION_URL}/{INCEPTION_FILE}"
            )
        if fault is not None:
            _download_inception(base, path, facts, tell)
        Record.of(path.parent, {path.name: facts}).write(record_path)
    return replace(found, fetched_bytes=0 if fault is None else path.stat().st_size)


def _inception_base(weights: Weights) -> str:
    """Address under which Inception's file lies."""
    return (weights.url or os.environ.get("DTR_RAY_MIRROR") or _INCEPTION_URL).rstrip("/")


def _download_inception(base: str, path: Path, facts: FileFacts, tell: OnProgress) -> None:
    """Fetches the file from the address `base` to `path`."""
    variable = forbidden_by(OURS)
    try:
        if variable is not None:
            raise DownloadError(f"{variable} forbids to ask {base}")
        download(
            f"{base}/{INCEPTION_FILE}", path, facts, on_bytes=lambda count: tell(count, _INCEPTION_BYTES)
        )
    except DownloadError as error:
        raise ValueError(
            f"clean-fid's Inception: {path} is not there, and cannot be fetched from "
            f"{base}/{INCEPTION_FILE}: {error}. Put it there, or set DTR_RAY_MIRROR to an address below "
            f"which {INCEPTION_FILE} lies, or name a copy in evaluation.feature_weights; or choose "
            "evaluation.features: efficientnet_lite0, which needs no download"
        ) from error
