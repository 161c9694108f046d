"""Addresses of stores, and the folders on a machine's own disk that go with them."""

import hashlib
import os
import re
from pathlib import Path
from typing import Literal
from urllib.parse import parse_qs, urlsplit

from dtr_ray.cache import cache_dir

SCRATCH = "DTR_RAY_SCRATCH"
SCHEMES = ("s3", "gs", "gcs", "abfs", "abfss", "hdfs", "viewfs", "file")
_SECRET_KEYS = ("access_key", "secret_key", "session_token", "access_token", "account_key", "sas_token")
_FORM = "write it as s3://BUCKET/FOLDER, gs://BUCKET/FOLDER or file:///FOLDER"


def is_url(text: str) -> bool:
    """Whether this names a store, and not a folder."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text) is not None


def check_address(url: str) -> None:
    """Raises ValueError where it is no store's address, or holds a secret."""
    try:
        parts = urlsplit(url)
        hidden = parts.username is not None and (
            parts.password is not None or not parts.scheme.startswith("abfs")
        )
    except ValueError:
        raise ValueError(f"{without_secrets(url)} is no address of a store: {_FORM}") from None
    if hidden or any(key in parse_qs(parts.query, keep_blank_values=True) for key in _SECRET_KEYS):
        raise ValueError(
            f"{without_secrets(url)}: keys do not belong into an address; they come from the environment "
            "(AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, ...) or from the machine's role"
        )
    if parts.scheme not in SCHEMES:
        raise ValueError(f"{url[:200]!r}: {parts.scheme}:// is no store that is known; {_FORM}")
    if parts.fragment or ".." in parts.path.split("/"):
        raise ValueError(f"{url[:200]!r} is no address of a store: {_FORM}")
    if parts.scheme == "file" and (parts.netloc or not parts.path.strip("/")):
        raise ValueError(f"{url[:200]!r}: a folder's address has three slashes and a name: file:///FOLDER")
    if parts.scheme != "file" and not parts.netloc:
        raise ValueError(f"{url[:200]!r} names no bucket: {_FORM}")


def joined(url: str, *names: str) -> str:
    """The address of something below another; what follows its `?` stays at the end."""
    path, mark, query = url.partition("?")
    return "/".join([path.rstrip("/"), *names]) + mark + query


def divided(url: str) -> tuple[str, str]:
    """The address above, and the last name."""
    path, mark, query = url.partition("?")
    above, _, name = path.rstrip("/").rpartition("/")
    return above + mark + query, name


def results_root(output: str, folder: Path) -> Path:
    """The folder that holds MLflow's SQLite file where no server is named; `folder` is the sweep's here."""
    return Path("runs") if is_url(output) else folder.parent


def without_secrets(text: str) -> str:
    """A text whose addresses have lost user names, keys and tokens."""
    text = re.sub(r"(\w+://)(?!\w[\w.-]*@[\w.-]+\.dfs\.)[^/\s?]*@", r"\1", text)
    keys = "|".join(_SECRET_KEYS)
    return re.sub(rf"(?i)([?&](?:{keys})=)[^&\s]*", r"\1***", text)


def scratch_folder(url: str, who: Literal["driver", "worker", "copy"]) -> Path:
    """The folder on this machine's own disk for what lies at an address; its last name is the address's.

    It is below DTR_RAY_SCRATCH, else below the cache. The driver's and the workers' are apart, since they
    speak to one another through the store alone.
    """
    root = os.environ.get(SCRATCH) or str(cache_dir() / "scratch")
    digest = hashlib.sha256(url.encode()).hexdigest()[:12]
    return Path(root).expanduser().absolute() / who / digest / divided(url)[1]
