"""When nothing may be downloaded: by the environment's word, and while a trial runs."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

# Ours forbids all downloads, Hugging Face's those from the hub.
OURS, HUB = "DTR_RAY_OFFLINE", "HF_HUB_OFFLINE"


def forbidden_by(*names: str) -> str | None:
    """The first of these variables of the environment that is set to forbid downloads; None if none is."""
    return next((n for n in names if os.environ.get(n, "").upper() in ("1", "ON", "YES", "TRUE")), None)


@contextmanager
def offline() -> Iterator[None]:
    """Nothing is downloaded within, by us or by Hugging Face's libraries: what is not here is an error."""
    from huggingface_hub import constants

    before, constant = {name: os.environ.get(name) for name in (OURS, HUB)}, constants.HF_HUB_OFFLINE
    os.environ.update({OURS: "1", HUB: "1"})
    # It was read from the environment when the library was loaded.
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = constant
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
