"""Read single embeddings of contents files that lie elsewhere.

Of an Arrow IPC file these byte ranges are read: its footer, the metadata of its record batches, the
keys, and then the rows that are gathered. Where the columns lie is told by the file's own metadata,
FlatBuffers by the Arrow format's Footer, Message and RecordBatch.
"""

import contextlib
import struct
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from camenn_model.data.contents import Contents
from camenn_model.integrity import DamagedError
from schemas.embeddings import embedding_shape

Range = tuple[str, int, int]
"""(path, start, stop) of bytes"""
Read = Callable[[Sequence[Range]], list[bytes]]
"""Reads ranges of files, in their order"""

GAP = 256 * 2**10
"""Bytes between two rows that are read with them: a request takes as long"""
LONGEST = 2 * 2**20
"""Bytes from which a range takes no further row: several ranges are read at once"""
AT_ONCE = 32
"""Ranges in memory at once"""
TAIL = 4 * 2**10
"""Bytes of a file's end that hold the footer of a few record batches"""
ALIGNMENT = 64
"""Bytes that a buffer is padded to, at most"""
MAGIC = b"ARROW1"


class RangeContents(Contents):
    """Embeddings of one kind, read row by row.

    It has the interface of `Contents` and gives the same rows, and downloads no others.
    The SHA-256 of a file cannot be checked, as nobody reads the whole file. Its size is checked by
    whoever lists it, its structure here.

    Args:
        files: (path, bytes) of uncompressed Arrow IPC files, as for `Contents`.
        key: name of the key column.
        read: reads ranges, several at once.
        wanted: keys to use; None = all.

    Raises:
        DamagedError: a file is not such a file.
    """

    def __init__(
        self, files: Sequence[tuple[str, int]], key: str, read: Read, *, wanted: pa.ChunkedArray | None = None
    ) -> None:
        self.paths, self.shape, self.read = sorted(path for path, _ in files), (0, 0), read
        self.starts: list[tuple[str, int]] = []
        """(path, first byte of the embeddings) of each record batch"""
        self._arrange(self._open(sorted(files), key), wanted)

    def _open(self, files: list[tuple[str, int]], key: str) -> list[pa.Array]:
        """Find the embeddings, and return each batch's keys."""
        # All files' ranges are read at once: there may be a hundred files, and each costs a request.
        blocks = self._blocks(files)
        firsts = [(path, 8, found[0][0] if found else size) for (path, size), found in zip(files, blocks, strict=True)]
        schemas = self.read(firsts)
        wanted = [(path, *block) for (path, _), found in zip(files, blocks, strict=True) for block in found]
        messages = self.read([(path, offset, offset + length) for path, offset, length in wanted])
        of_path = {}
        for (path, _), data in zip(files, schemas, strict=True):
            with _structure(path):
                of_path[path] = pa.ipc.read_schema(pa.py_buffer(data))
                self.shape = embedding_shape(of_path[path])
        rows, buffers, ranges = [], [], []
        for (path, offset, length), message in zip(wanted, messages, strict=True):
            with _structure(path):
                count, columns = _layout(of_path[path], message)
                keys, (_, (start, size)) = columns[key], columns["embedding"]
                # The writer of a slice may count the padding after it.
                if not 0 <= size - count * 2 * self.shape[0] * self.shape[1] < ALIGNMENT:
                    raise ValueError("the embeddings have another size than the rows")
            if count:
                rows.append(count)
                buffers.append([(first - keys[0][0], size) for first, size in keys])
                ranges.append((path, offset + length + keys[0][0], offset + length + sum(keys[-1])))
                self.starts.append((path, offset + length + start))
        return [_strings(*found) for found in zip(rows, buffers, self.read(ranges), strict=True)]

    def _blocks(self, files: list[tuple[str, int]]) -> list[list[tuple[int, int]]]:
        """Read the footers.

        They say (offset, bytes) of the metadata of each file's record batches.
        """
        tails = self.read([(path, max(0, size - TAIL), size) for path, size in files])
        lengths = []
        for (path, size), tail in zip(files, tails, strict=True):
            with _structure(path):
                lengths.append(_footer_length(size, tail))
        long = [place for place, length in enumerate(lengths) if length > len(tails[place])]
        again = self.read([(files[place][0], files[place][1] - lengths[place], files[place][1]) for place in long])
        for place, tail in zip(long, again, strict=True):
            tails[place] = tail
        blocks = []
        for (path, _), length, tail in zip(files, lengths, tails, strict=True):
            with _structure(path):
                footer = tail[len(tail) - length :]
                blocks.append([(offset, size) for offset, size, _ in _structs(footer, _follow(footer, 0), 3, "qi4xq")])
        return blocks

    def gather(self, rows: NDArray[np.int64]) -> NDArray[np.float16]:
        """Gather the embeddings of rows.

        They are float16 [n, tokens, width]. A row of -1 gives zeros. Each is downloaded once.
        """
        distinct, inverse = np.unique(rows, return_inverse=True)
        absent = int(len(distinct) > 0 and distinct[0] < 0)
        found = np.zeros((len(distinct), *self.shape), dtype=np.float16)
        pieces = list(self._pieces(distinct[absent:]))
        for first in range(0, len(pieces), AT_ONCE):
            some = pieces[first : first + AT_ONCE]
            for (_, places, offsets), data in zip(some, self.read([where for where, _, _ in some]), strict=True):
                for place, offset in zip(places, offsets, strict=True):
                    row = np.frombuffer(data, np.float16, self.shape[0] * self.shape[1], offset)
                    found[absent + place] = row.reshape(self.shape)
        gathered: NDArray[np.float16] = found[inverse.reshape(-1)]
        return gathered

    def _pieces(self, rows: NDArray[np.int64]) -> Iterator[tuple[Range, list[int], list[int]]]:
        """Yield the ranges that hold some rows.

        Each comes with the places in `rows` that it holds, and their offsets in it.
        """
        size = 2 * self.shape[0] * self.shape[1]
        of = self.view_of[rows]
        at = np.array([start for _, start in self.starts], dtype=np.int64)[of] + size * self.place[rows]
        order = np.lexsort((at, of))
        of, at = of[order], at[order]
        first = 0
        for last in range(len(order)):
            end, following = int(at[last]) + size, last + 1
            if (
                following == len(order)
                or of[following] != of[last]
                or at[following] - end > GAP
                or at[following] + size - at[first] > LONGEST
            ):
                where = self.starts[of[first]][0], int(at[first]), end
                yield where, order[first:following].tolist(), (at[first:following] - at[first]).tolist()
                first = following

    def release(self) -> None:
        """Do nothing: no row stays in memory."""


# --- the Arrow format


@contextlib.contextmanager
def _structure(path: str) -> Iterator[None]:
    """Say which file is not what was written."""
    try:
        yield
    except (ValueError, KeyError, IndexError, struct.error) as error:
        raise DamagedError(
            f"{path}: is not an Arrow file as camenn writes contents ({error}). Run `camenn fsck` on its output."
        ) from error


def _footer_length(size: int, tail: bytes) -> int:
    """Return the bytes of a file's footer.

    Its length and the magic after it count too.
    """
    if not tail.endswith(MAGIC):
        raise ValueError("its end is missing")
    length = _number(tail, "i", len(tail) - len(MAGIC) - 4) + 4 + len(MAGIC)
    if not 0 < length <= size:
        raise ValueError("its footer is longer than the file")
    return length


def _number(data: bytes, code: str, place: int) -> int:
    return int(struct.unpack_from(f"<{code}", data, place)[0])


def _field(data: bytes, table: int, number: int) -> int | None:
    """Return where a field of a FlatBuffers table lies.

    It is None where the field is left out.
    """
    fields = table - _number(data, "i", table)
    if 4 + 2 * number >= _number(data, "H", fields):
        return None
    offset = _number(data, "H", fields + 4 + 2 * number)
    return table + offset if offset else None


def _follow(data: bytes, place: int) -> int:
    return place + _number(data, "I", place)


def _structs(data: bytes, table: int, number: int, code: str) -> list[tuple[int, ...]]:
    """Return a field that is a vector of structs."""
    place = _field(data, table, number)
    if place is None:
        return []
    vector = _follow(data, place)
    step = struct.calcsize(f"<{code}")
    return [struct.unpack_from(f"<{code}", data, vector + 4 + step * k) for k in range(_number(data, "I", vector))]


def _layout(schema: pa.Schema, metadata: bytes) -> tuple[int, dict[str, list[tuple[int, ...]]]]:
    """Return a batch's number of rows and its layout.

    The layout is {column: (offset, bytes) of each buffer}, in the batch's body.
    """
    # Before the message lie 0xFFFFFFFF and its length, 4 bytes each.
    if metadata[:4] != b"\xff" * 4:
        raise ValueError("no record batch is where the footer says")
    message = metadata[8:]
    header = _field(message, _follow(message, 0), 2)
    if header is None:
        raise ValueError("a record batch is empty")
    batch = _follow(message, header)
    if _field(message, batch, 3) is not None:
        raise ValueError("it is compressed")
    length = _field(message, batch, 0)
    buffers = _structs(message, batch, 2, "qq")
    columns: dict[str, list[tuple[int, ...]]] = {}
    for field in schema:
        # Validity and values, and of strings the offsets between them.
        if not (pa.types.is_string(field.type) or pa.types.is_fixed_size_binary(field.type)):
            raise ValueError(f"column {field.name} is {field.type}")
        count = 3 if pa.types.is_string(field.type) else 2
        columns[field.name], buffers = buffers[:count], buffers[count:]
    return 0 if length is None else _number(message, "q", length), columns


def _strings(rows: int, buffers: list[tuple[int, int]], data: bytes) -> pa.Array:
    """Return the strings whose buffers lie in `data`."""
    whole = pa.py_buffer(data)
    return pa.Array.from_buffers(
        pa.string(), rows, [whole.slice(start, size) if size else None for start, size in buffers]
    )
