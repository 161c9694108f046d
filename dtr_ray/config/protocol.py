"""Protocol: the identity of a figure, which is everything that changes what it measures.

Figures of two protocols do not compare: a distance falls with more samples, and moves with the sampler, its
steps, the features and the images. What a method may choose is no part of it: model, training, and
`sampling.guidance_scale`, which may be searched like any other strength of a method; nor what changes
rounding alone (`evaluation.batch_size`, the number of workers, `training.precision`), nor where clean-fid's
weights lie, which are checked by their hash.

A protocol is a plain dictionary with dotted names, as JSON files keep it: `metric`, `data.identity` (name,
resolution and content of the images, None where not known), and the trial's own keys. `{}` is unknown: so
are records that were written before protocols were.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from dtr_ray.config.errors import shown
from dtr_ray.config.trial import TrialConfig

Protocol = Mapping[str, Any]
UNKNOWN = "unknown protocol"

_IDENTITY = "data.identity"
# Where the images lie says nothing once it is known what they are.
_PLACE = ("data.name", "data.path")
SOURCES: dict[str, tuple[str, ...]] = {
    "metric": ("evaluation.num_samples", "evaluation.features"),
    "data.classes": ("data.num_classes", "data.text_encoder", "data.name"),
}
"""The trial's keys that decide an entry which is no key of its own."""


def protocol_of(
    trial: TrialConfig, data_identity: str | None = None, *, proxy: bool = False
) -> dict[str, Any]:
    """What a trial's figures measure.

    Args:
        trial: the trial.
        data_identity: `ImageData.identity`, where the images have been looked at.
        proxy: of `evaluation.proxy`, which the trial must have, instead of the full evaluation.
    """
    data, evaluation, sampling = trial.data, trial.evaluation, trial.sampling
    cheaper = evaluation.proxy if proxy else None
    assert cheaper is not None or not proxy
    return {
        "metric": evaluation.proxy_metric if proxy else evaluation.metric,
        _IDENTITY: data_identity,
        "data.name": data.name,
        "data.path": data.path,
        "data.resolution": data.resolution,
        "data.classes": data.classes,
        "data.vae": data.vae,
        "data.text_encoder": data.text_encoder,
        "evaluation.features": evaluation.features,
        "evaluation.num_samples": (cheaper and cheaper.num_samples) or evaluation.num_samples,
        "evaluation.seed": evaluation.seed,
        "sampling.sampler": (cheaper and cheaper.sampler) or sampling.sampler,
        "sampling.num_steps": (cheaper and cheaper.num_steps) or sampling.num_steps,
        "sampling.clip_denoised": sampling.clip_denoised,
        # Of up to three channels the first three are all.
        "sampling.guidance_channels": sampling.guidance_channels if data.sample_shape[0] > 3 else "all",
    }


def differing(one: Protocol, other: Protocol) -> list[str]:
    """The entries in which two known protocols differ, in order; an unknown identity differs from none."""
    identities = {p.get(_IDENTITY) for p in (one, other)} - {None}
    passed_over = set(_PLACE) if len(identities) == 1 and all(_known(p) for p in (one, other)) else set()
    if not all(_known(p) for p in (one, other)):
        passed_over.add(_IDENTITY)
    # The metric's name follows from the rest.
    keys = [key for key in dict.fromkeys([*one, *other]) if key not in passed_over]
    found = [key for key in keys if one.get(key) != other.get(key)]
    return [key for key in found if key != "metric" or len(found) == 1]


def _known(protocol: Protocol) -> bool:
    return protocol.get(_IDENTITY) is not None


def differences(one: Protocol, other: Protocol) -> list[str]:
    """In words what differs: `sampling.num_steps is 20, not 50`; the unknown differs from all that is known.

    `one` is said first; empty where their figures compare.
    """
    if not one or not other:
        return [] if bool(one) == bool(other) else [f"one of them is of an {UNKNOWN}"]
    return [f"{key} is {shown(one.get(key))}, not {shown(other.get(key))}" for key in differing(one, other)]


def describe(protocol: Protocol) -> str:
    """A protocol in one short line."""
    if not protocol:
        return UNKNOWN
    sampling = f"{protocol['sampling.sampler']} in {protocol['sampling.num_steps']} steps"
    parts = [f"{protocol['evaluation.num_samples']:,} samples", sampling, *_particulars(protocol)]
    return f"{protocol['metric']}: {', '.join(parts)}; {_describe_data(protocol)}"


def _particulars(protocol: Protocol) -> Iterator[str]:
    yield f"seed {protocol['evaluation.seed']}"
    if protocol["sampling.clip_denoised"]:
        yield "clipped"
    if protocol["sampling.guidance_channels"] != "all":
        yield "three channels guided"


def _describe_data(protocol: Protocol) -> str:
    where = protocol["data.path"] or protocol["data.name"]
    classes = protocol["data.classes"]
    kind = (
        "captions" if protocol["data.text_encoder"] else f"{classes} classes" if classes > 1 else "no classes"
    )
    identity = protocol[_IDENTITY]
    latents = f", latents of {protocol['data.vae']}" if protocol["data.vae"] else ""
    return (
        f"{where} at {protocol['data.resolution']} px, {kind}{latents}{f' ({identity})' if identity else ''}"
    )


def groups(protocols: Iterable[Protocol]) -> list[Protocol]:
    """The protocols of which no two compare, in order of first appearance."""
    found: list[Protocol] = []
    for protocol in protocols:
        if all(differences(protocol, known) for known in found):
            found.append(protocol)
    return found
