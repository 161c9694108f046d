"""Repositories of the Hugging Face hub: what is in one, which of its files are needed, where they lie."""

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, NamedTuple
from urllib.parse import quote

from dtr_ray.weights.download import DownloadError, FileFacts, read_url

Kind = Literal["vae", "text_encoder"]

_HUB_URL = "https://huggingface.co"
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
)
# What `save_pretrained` calls the weights, safe ones first: (stem, ending). Both libraries read `.bin`, which
# are pickles, with PyTorch's `weights_only` alone, so nothing in such a file is run.
_WEIGHT_FILES: dict[Kind, tuple[tuple[str, str], ...]] = {
    "vae": (("diffusion_pytorch_model", "safetensors"), ("diffusion_pytorch_model", "bin")),
    "text_encoder": (("model", "safetensors"), ("pytorch_model", "bin")),
}
NAMES: dict[Kind, str] = {
    "vae": "the VAE (config.json, diffusion_pytorch_model.safetensors)",
    "text_encoder": "the encoder (config.json, model.safetensors, tokenizer.json)",
}
"""What a repository is to hold, in words."""


class Listing(NamedTuple):
    """The files of a repository as of one commit."""

    commit: str
    files: dict[str, FileFacts]


def hub_url() -> str:
    """Address of the hub: HF_ENDPOINT, or the public one."""
    return (os.environ.get("HF_ENDPOINT") or _HUB_URL).rstrip("/")


def split_source(source: str) -> tuple[str, str]:
    """Name and revision of `name` or `name@revision`; raises ValueError where it can be no repository's."""
    name, _, revision = source.partition("@")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or source.endswith("@"):
        raise ValueError(f"{source} is neither a folder here nor a hub's OWNER/NAME or OWNER/NAME@REVISION")
    return name, revision or "main"


def online_listing(url: str, name: str, revision: str) -> Listing:
    """What the hub at `url` has; raises DownloadError."""
    address = f"{url}/api/models/{quote(name)}/revision/{quote(revision, safe='')}?blobs=true"
    try:
        answer = json.loads(read_url(address, token_header()))
        if not re.fullmatch("[0-9a-f]{7,64}", answer["sha"]):
            raise ValueError(answer["sha"])
        return Listing(answer["sha"], {f["rfilename"]: _facts(f) for f in answer["siblings"]})
    except (ValueError, KeyError, TypeError) as error:
        raise DownloadError(f"{address} does not answer as a hub does ({error!r})") from error


def _facts(file: dict[str, object]) -> FileFacts:
    size, blob, large = file.get("size"), file.get("blobId"), file.get("lfs")
    checksum = None if blob is None else f"git:{blob}"
    if isinstance(large, dict):
        # The blob is a pointer then, which states the SHA-256 of what it points to.
        size, checksum = large.get("size", size), f"sha256:{large['sha256']}"
    assert size is None or isinstance(size, int)
    return FileFacts(size, checksum)


def file_url(url: str, name: str, commit: str, file: str) -> str:
    """Where the hub at `url` has a file."""
    return f"{url}/{quote(name)}/resolve/{quote(commit, safe='')}/{quote(file)}"


def token_header() -> dict[str, str]:
    """What opens private and gated repositories: the token of HF_TOKEN or `hf auth login`, if any."""
    from huggingface_hub import constants, get_token

    token = None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()
    return {} if token is None else {"Authorization": f"Bearer {token}"}


def hub_cache() -> Path:
    """The folder in which Hugging Face's own libraries keep what they have downloaded."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def cached_file(name: str, revision: str, file: str) -> Path | None:
    """A file that Hugging Face's own libraries have downloaded before."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, file, revision=revision)
    return Path(found) if isinstance(found, str) else None


def cached_listing(kind: Kind, name: str, revision: str) -> Listing | None:
    """What Hugging Face's own libraries have downloaded of a repository, if that is all that is needed."""
    for config in (f"{folder}config.json" for folder in ("", f"{kind}/")):
        path = cached_file(name, revision, config)
        if path is None:
            continue
        snapshot = path.parents[config.count("/")]
        files = [found for found in snapshot.rglob("*") if found.is_file()]
        facts = {found.relative_to(snapshot).as_posix(): _facts_of_cached(found) for found in files}
        try:
            wanted_files(kind, facts)
        except ValueError:
            continue  # a part of it, which does not help
        return Listing(snapshot.name, facts)
    return None


def _facts_of_cached(path: Path) -> FileFacts:
    """That cache links to files which are named by their checksums."""
    target = path.readlink().name if path.is_symlink() else ""
    kinds = {64: "sha256", 40: "git"}
    known = len(target) in kinds and re.fullmatch("[0-9a-f]+", target)
    return FileFacts(path.stat().st_size, f"{kinds[len(target)]}:{target}" if known else None)


def wanted_files(kind: Kind, names: Iterable[str]) -> list[str]:
    """Which of a repository's files the loader reads: configuration, weights, and a tokenizer's for text.

    Of a whole pipeline's repository, those of the part in question. Of weights only one set: safetensors
    where there are any; no variants of less precision, no other libraries' formats.

    Raises:
        ValueError: there is something missing, which the message names.
    """
    names = set(names)
    prefix = part_prefix(kind, names)
    found = [f"{prefix}config.json"]
    if found[0] not in names:
        raise ValueError("it has no config.json")
    for stem, ending in _WEIGHT_FILES[kind]:
        weights = _one_set(f"{prefix}{stem}", ending, names)
        if weights:
            break
    else:
        stem, ending = _WEIGHT_FILES[kind][0]
        raise ValueError(f"it has no {prefix}{stem}.{ending}")
    found += weights
    if kind == "text_encoder":
        prefix = part_prefix("tokenizer", names) if prefix else ""
        tokenizer = [f"{prefix}{file}" for file in _TOKENIZER_FILES if f"{prefix}{file}" in names]
        slow = [f"{prefix}vocab.json", f"{prefix}merges.txt"]
        if f"{prefix}tokenizer.json" not in tokenizer and not names.issuperset(slow):
            raise ValueError(f"it has neither {prefix}tokenizer.json nor {' and '.join(slow)}")
        found += tokenizer
    return found


def part_prefix(part: str, names: Iterable[str]) -> str:
    """Where a part lies: `part/` in the repository or folder of a whole pipeline, else at the top, ""."""
    names = set(names)
    whole = "model_index.json" in names or "config.json" not in names
    return f"{part}/" if whole and any(name.startswith(f"{part}/") for name in names) else ""


def _one_set(stem: str, ending: str, names: set[str]) -> list[str]:
    """One file with all weights, or an index and the files that it tells of."""
    if f"{stem}.{ending}" in names:
        return [f"{stem}.{ending}"]
    index = f"{stem}.{ending}.index.json"
    parts = sorted(n for n in names if re.fullmatch(rf"{re.escape(stem)}-\d+-of-\d+\.{ending}", n))
    return [index, *parts] if index in names and parts else []
