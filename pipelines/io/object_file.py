"""Read an object as a file."""

import io
import os
from collections.abc import Callable
from typing import Any

from pipelines.io.object_client import Stat

TAIL = 64 * 2**10
"""Bytes of an object's end that stay in memory: Parquet's footer, or a small file whole"""


class ObjectFile(io.RawIOBase):
    """An object as a file to read, by exactly the ranges that are asked for.

    Nothing is read ahead, but for `TAIL`, which tells the size as well. All pieces are of one version
    of the object.
    """

    def __init__(
        self,
        path: str,
        end: Callable[[str, int], tuple[Stat, bytes]],
        download: Callable[..., list[bytes]],
        found: Stat | None,
    ) -> None:
        self._path, self._end, self._download = path, end, download
        self._found = found
        self._position = 0
        self._tail: tuple[int, bytes] = (0, b"")

    def _stat(self) -> Stat:
        if self._found is None:
            self._found, tail = self._end(self._path, TAIL)
            self._tail = self._found.bytes - len(tail), tail
        return self._found

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the position in bytes."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """Move to a position, without a request but for the object's size."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position}.get(whence)
        self._position = max(0, offset + (self._stat().bytes if base is None else base))
        return self._position

    def readinto(self, buffer: Any, /) -> int:
        """Read into a buffer."""
        view = memoryview(buffer).cast("B")
        data = self.read(len(view))
        view[: len(data)] = data
        return len(data)

    def readall(self) -> bytes:
        """Read the rest."""
        return self.read(-1)

    def read(self, size: int | None = -1, /) -> bytes:
        """Read `size` bytes, fewer at the end only. The rest, where it is negative."""
        everything = size is None or size < 0
        if everything and self._found is None and not self._position:
            (data,) = self._download(self._path)
            self._position = len(data)
            return data
        found = self._stat()
        start = self._position
        stop = found.bytes if everything or size is None else min(start + size, found.bytes)
        if start >= stop:
            return b""
        self._position = stop
        tail_start, tail = self._tail
        if not tail and start >= found.bytes - TAIL:
            tail_start = max(0, found.bytes - TAIL)
            (tail,) = self._download(self._path, [(tail_start, found.bytes)], found.token)
            self._tail = tail_start, tail
        if not tail or stop <= tail_start:
            (data,) = self._download(self._path, [(start, stop)], found.token)
            return data
        if start >= tail_start:
            return tail[start - tail_start : stop - tail_start]
        (data,) = self._download(self._path, [(start, tail_start)], found.token)
        return data + tail[: stop - tail_start]
