"""Opens pyarrow's file system for an address, with time limits where it has them."""

import os
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

from dtr_ray.storage.address import check_address

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

_CONNECT_TIMEOUT_S, _REQUEST_TIMEOUT_S = 10.0, 60.0
_TRUE = ("1", "true", "yes")
# What an S3 address may tell behind its question mark.
_S3_OPTIONS = ("endpoint_override", "region", "scheme", "anonymous", "force_virtual_addressing")


def open_filesystem(url: str) -> tuple["FileSystem", str]:
    """The file system, and the path in it.

    Raises:
        ValueError: the address is wrong, or this pyarrow has no such file system.
        OSError: the store does not answer.
    """
    check_address(url)
    if url.startswith("s3://"):
        return _open_s3(url)
    from pyarrow import ArrowInvalid, ArrowNotImplementedError
    from pyarrow.fs import FileSystem

    try:
        filesystem, path = FileSystem.from_uri(url)
    except (ArrowInvalid, ArrowNotImplementedError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{url} cannot be opened by this pyarrow: {reason}") from None
    return filesystem, path.rstrip("/")


def _open_s3(url: str) -> tuple["FileSystem", str]:
    """By hand: pyarrow's own reading of an address knows no time limits, nor the environment's endpoint."""
    from pyarrow.fs import AwsStandardS3RetryStrategy, S3FileSystem, resolve_s3_region

    parts = urlsplit(url)
    given = {key: values[-1] for key, values in parse_qs(parts.query, keep_blank_values=True).items()}
    unknown = sorted(set(given) - set(_S3_OPTIONS))
    if unknown:
        raise ValueError(f"{url}: {unknown[0]} is none of the options {', '.join(_S3_OPTIONS)}")
    endpoint = given.get("endpoint_override") or _environment("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
    scheme = given.get("scheme")
    if endpoint and "://" in endpoint:
        scheme, _, endpoint = endpoint.partition("://")
    region = given.get("region") or _environment("AWS_REGION", "AWS_DEFAULT_REGION")
    if region is None:
        region = "us-east-1" if endpoint else resolve_s3_region(parts.netloc)
    options: dict[str, Any] = {
        "region": region,
        "scheme": scheme,
        "endpoint_override": endpoint and endpoint.rstrip("/"),
        "anonymous": given.get("anonymous", "").lower() in _TRUE,
        "force_virtual_addressing": given.get("force_virtual_addressing", "").lower() in _TRUE,
        "connect_timeout": _CONNECT_TIMEOUT_S,
        "request_timeout": _REQUEST_TIMEOUT_S,
        # The store's own tries come on top.
        "retry_strategy": AwsStandardS3RetryStrategy(max_attempts=2),
    }
    try:
        # A small object takes one request instead of three.
        filesystem = S3FileSystem(allow_delayed_open=True, **options)
    except TypeError:
        filesystem = S3FileSystem(**options)
    return filesystem, f"{parts.netloc}{parts.path}".rstrip("/")


def _environment(*names: str) -> str | None:
    return next((os.environ[name] for name in names if os.environ.get(name)), None)
