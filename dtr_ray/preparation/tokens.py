"""The tokens of all captions, encoded in any process and written by one, in order; goes on where it was.

U different captions, L = 77 tokens, D channels.
"""

import json
import os
from collections.abc import Sequence

import numpy as np
from numpy.lib import format as npy_format

from dtr_ray.config.data import TEXT_TOKENS
from dtr_ray.data.manifest import TOKENS, FileEntry, caption_names
from dtr_ray.preparation.files import entry_of, full_disk, write_json
from dtr_ray.preparation.job import Job

CHUNK_CAPTIONS = 64
"""Captions that are encoded at once: 7.6 MB of CLIP ViT-L/14's tokens."""
_NOTED_EVERY = 16


class Tokens:
    """`tokens.npy` in the making: chunks of captions, each of which is to be encoded and written in order.

    Attributes:
        names: the U captions, the empty one first.
        num_done: chunks that are written.
    """

    def __init__(self, job: Job, texts: Sequence[Sequence[str]]) -> None:
        self._path = job.folder / TOKENS
        self._partial = job.work / TOKENS
        self._note = job.work / "tokens.json"
        self.names = caption_names(texts)
        self._shape = (len(self.names), TEXT_TOKENS, job.config.text_channels)
        self.num_done = 0
        if self._path.exists():
            self.num_done = self.num_chunks
        elif self._partial.exists() and self._note.exists():
            self.num_done = int(json.loads(self._note.read_text(encoding="ascii"))["chunks"])

    @property
    def num_chunks(self) -> int:
        """Chunks in all."""
        return -(-len(self.names) // CHUNK_CAPTIONS)

    @property
    def num_rows(self) -> int:
        """Captions whose tokens are written."""
        return min(self.num_done * CHUNK_CAPTIONS, len(self.names))

    def chunk(self, number: int) -> list[str]:
        """The captions of a chunk."""
        return self.names[number * CHUNK_CAPTIONS : (number + 1) * CHUNK_CAPTIONS]

    def write(self, number: int, tokens: np.ndarray) -> None:
        """Writes a chunk's tokens, float16 (n, L, D), the next in order; raises DiskFullError."""
        assert number == self.num_done
        assert tokens.shape == (len(self.chunk(number)), *self._shape[1:])
        assert tokens.dtype == np.float16
        row_bytes = 2 * self._shape[1] * self._shape[2]
        with full_disk(self._path), self._partial.open("r+b" if number else "w+b") as file:
            header = {"descr": "<f2", "fortran_order": False, "shape": self._shape}
            npy_format.write_array_header_2_0(file, header)
            file.seek(file.tell() + number * CHUNK_CAPTIONS * row_bytes)
            file.write(np.ascontiguousarray(tokens).data)
            self.num_done += 1
            if self.num_done % _NOTED_EVERY == 0 or self.num_done == self.num_chunks:
                file.flush()
                os.fsync(file.fileno())
                write_json(self._note, {"chunks": self.num_done})

    def close(self) -> FileEntry:
        """Gives the file its name when all is written."""
        assert self.num_done == self.num_chunks
        if not self._path.exists():
            self._partial.replace(self._path)
        return entry_of(self._path)
