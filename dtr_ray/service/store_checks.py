"""How the doctor looks at a store: the driver writes an object, each machine reads it and writes its own."""

import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from dtr_ray.service.findings import in_a_line
from dtr_ray.storage.address import divided, joined
from dtr_ray.storage.store import Store, reason_of

DRIVER_TOKEN = "driver"  # noqa: S105 - the name of a file


@contextmanager
def probe_in_store(url: str) -> Iterator[tuple[str, str, str]]:
    """Address of a folder that holds the driver's token, the token, and what is wrong, or ""."""
    token = secrets.token_hex(8)
    store, name = _at_once(url), f".doctor-{token}"
    try:
        store.check()
        store.put(f"{name}/{DRIVER_TOKEN}", token.encode())
    except (OSError, ValueError) as error:
        yield "", token, in_a_line(error)
        return
    try:
        yield joined(url, name), token, ""
    finally:
        with suppress(OSError):
            store.delete_folder(name)


def write_there(probe: str, name: str, token: str) -> str:
    """Reads the driver's object and writes this machine's; returns what is wrong, or ""."""
    store, above = _at_once(probe), divided(probe)[0]
    try:
        if store.get(DRIVER_TOKEN) != token.encode():
            return f"reads something else in {above} than was written there"
    except OSError as error:
        return f"cannot read {above}: {reason_of(error.__cause__ or error)}"
    try:
        store.put(name, f"{token} {name}".encode())
    except OSError as error:
        return f"cannot write in {above}: {reason_of(error.__cause__ or error)}"
    return ""


def read_there(probe: str, name: str) -> str:
    """What a machine has written; "" where it is not there."""
    with suppress(OSError):
        return _at_once(probe).get(name).decode()
    return ""


def _at_once(url: str) -> Store:
    """A store whose requests fail instead of waiting."""
    store = Store(url)
    store.close()
    return store
