"""FileSource: images that are files, wherever the files are, with captions from files or from a list."""

import json
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from dtr_ray.sources.captions import caption_lines
from dtr_ray.sources.files import Files
from dtr_ray.sources.listing import Item, Names, Source


class ImageCaptions(Protocol):
    """The captions of N images, by the image's number."""

    def of_image(self, index: int) -> tuple[str, ...]:
        """At least one; raises ValueError naming the file where they cannot be read."""


class CaptionFiles:
    """A file an image: lines of text, or JSON whose `caption` is a text or a list of them."""

    def __init__(self, files: Files) -> None:
        self._files = files

    def of_image(self, index: int) -> tuple[str, ...]:
        """Its file, read."""
        name, data = self._files.name(index), self._files.read(index)
        if not name.endswith(".json"):
            return tuple(caption_lines(data, name))
        try:
            value = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"the captions {name} cannot be read: {error}") from error
        return stripped(value.get("caption") if isinstance(value, dict) else None, name)


class CaptionTexts:
    """Texts in memory: all of them in one list, those of an image one after another."""

    def __init__(self, texts: Sequence[Sequence[str]]) -> None:
        """Texts of each of the N images, at least one."""
        self._texts = Names(text for own in texts for text in own)
        self._stops = np.cumsum([len(own) for own in texts], dtype=np.int64)

    def of_image(self, index: int) -> tuple[str, ...]:
        """Its texts."""
        start = int(self._stops[index - 1]) if index else 0
        return tuple(self._texts[start : int(self._stops[index])])


class FileSource(Source):
    """Images that are files in a folder or in archives."""

    def __init__(
        self,
        names: Sequence[str],
        labels: np.ndarray,
        class_names: tuple[str, ...],
        digest: str,
        images: Files,
        captions: ImageCaptions | None,
    ) -> None:
        super().__init__(names, labels, class_names, digest)
        self._labels = labels
        self._images = images
        self._captions = captions

    def read(self, index: int) -> Item:
        """The image's file, not decoded, and its captions where they were asked for."""
        captions = () if self._captions is None else self._captions.of_image(index)
        return Item(self._images.read(index), int(self._labels[index]), captions)


def stripped(captions: object, name: str) -> tuple[str, ...]:
    """A caption or a list of them without blanks at the ends, empty ones left out.

    Raises:
        ValueError: none is left, or something is no text; the message names `name`.
    """
    texts = [captions] if isinstance(captions, str) else captions
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise ValueError(
            f"{name} has no caption: there must be a text or a list of texts, not {captions!r:.80}"
        )
    found = tuple(text.strip() for text in texts if text.strip())
    if not found:
        raise ValueError(f"{name} has no caption that is not empty")
    return found
