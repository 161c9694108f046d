"""Files that only grow, kept in a store as pieces: object stores cannot append.

Piece n holds the bytes from n times the piece's size on; the last one is put again, as a whole, whenever the
file has grown. So an event costs one request, and a file of any length few objects.
"""

from pathlib import Path

from dtr_ray.storage.store import DamagedError, Store

PIECE_BYTES = 128 * 1024


class PieceWriter:
    """Brings a growing file to a store; the only writer of its pieces."""

    def __init__(self, store: Store, folder: str, path: Path) -> None:
        """`folder` is that of the pieces, `path` the file on this machine."""
        self._store, self._folder, self._path = store, folder, path
        self.size = 0
        """Bytes of the file that the store has."""

    def push(self) -> None:
        """Brings what has been added to the file; a last line without its end is left for later."""
        first = self.size // PIECE_BYTES * PIECE_BYTES
        try:
            with self._path.open("rb") as file:
                file.seek(first)
                content = file.read()
        except FileNotFoundError:
            return
        content = content[: content.rfind(b"\n") + 1]
        if first + len(content) <= self.size:
            return
        for start in range(0, len(content), PIECE_BYTES):
            piece = content[start : start + PIECE_BYTES]
            self._store.put(piece_name(self._folder, first + start), piece)
            self.size = first + start + len(piece)


def piece_name(folder: str, start: int) -> str:
    """The object that holds the bytes from `start`, a multiple of PIECE_BYTES, on."""
    return f"{folder}/{start:012d}"


def read_pieces(store: Store, folder: str, start: int, end: int) -> bytes:
    """The bytes of a file from `start` to `end`; raises DamagedError where the store has fewer."""
    content = b""
    for place in range(start // PIECE_BYTES * PIECE_BYTES, end, PIECE_BYTES):
        piece = store.get(piece_name(folder, place))
        content += piece[max(0, start - place) : end - place]
    if len(content) != end - start:
        raise DamagedError(f"{folder} has {len(content)} of the bytes {start} to {end}")
    return content


def read_all_pieces(store: Store, folder: str) -> bytes:
    """All bytes of a file, as far as its pieces follow one another."""
    content = b""
    for entry in store.entries(folder):
        if entry.name != piece_name(folder, len(content)):
            raise DamagedError(f"{folder} lacks the bytes from {len(content)} on")
        content += store.get(entry.name)
    return content
