"""Read the embeddings of photos and titles, mapped into memory."""

import mmap

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from camenn_model.config import NO_CONTENTS
from schemas.embeddings import embedding_shape

MEANS_AT_A_TIME = 4_096
"""Contents that are read at once where the means of all are kept"""


class Contents:
    """Embeddings of one kind, mapped.

    `gather` reads only the requested rows. Rows are in order of keys, whatever their file: results
    computed from all rows must not depend on the files.

    Args:
        paths: Arrow IPC files of (key, embedding), each with any keys in any order. A key in two
            files counts once.
        key: name of the key column.
        shape: (tokens, width), used where there are no files.
        wanted: keys to use; None = all. Contents are only ever added: files may hold those of
            listings that are gone.
        keep: whether read pages stay in memory for later reads. Otherwise they are released as soon
            as they are copied.
    """

    def __init__(
        self,
        paths: list[str],
        key: str,
        shape: tuple[int, int] = (0, 0),
        *,
        wanted: pa.ChunkedArray | None = None,
        keep: bool = True,
    ) -> None:
        self.keep = keep
        self.paths = sorted(paths)
        self.views: list[NDArray[np.float16]] = []
        self.maps: list[mmap.mmap] = []
        self.map_of: list[mmap.mmap] = []
        keys: list[pa.Array] = []
        self.shape = shape
        for path in self.paths:
            with open(path, "rb") as handle:
                self.maps.append(mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ))
            reader = pa.ipc.open_file(pa.py_buffer(self.maps[-1]))
            self.shape = embedding_shape(reader.schema)
            for number in range(reader.num_record_batches):
                batch = reader.get_batch(number)
                column = batch.column(batch.schema.get_field_index("embedding"))
                data = np.frombuffer(column.buffers()[1], dtype=np.float16)
                size = self.shape[0] * self.shape[1]
                first = column.offset * size
                self.views.append(data[first : first + len(column) * size].reshape(len(column), *self.shape))
                self.map_of.append(self.maps[-1])
                keys.append(batch.column(batch.schema.get_field_index(key)))
        self._arrange(keys, wanted)

    @classmethod
    def none(cls, key: str) -> "Contents":
        """Return contents of which there are none."""
        return cls([], key, NO_CONTENTS)

    def _arrange(self, keys: list[pa.Array], wanted: pa.ChunkedArray | None) -> None:
        """Put the rows in order of their keys, which are given for each view."""
        import pyarrow.compute as pc

        every: pa.Array = pa.concat_arrays(keys) if keys else pa.array([], pa.string())
        order = pc.array_sort_indices(every).to_numpy()
        if wanted is not None:
            order = order[pc.is_in(every, pc.unique(wanted)).to_numpy(zero_copy_only=False)[order]]
        ordered = every.take(pa.array(order))
        if len(order):
            # A retry may have written a key twice.
            first = np.append(True, pc.not_equal(ordered[1:], ordered[:-1]).to_numpy(zero_copy_only=False))
            order, ordered = order[first], ordered.filter(pa.array(first))
        self.keys: pa.Array = ordered
        lengths = np.array([len(of_view) for of_view in keys], dtype=np.int64)
        self.view_of: NDArray[np.int64] = np.repeat(np.arange(len(lengths)), lengths)[order]
        """Location of each row: number of the view, int64 [n] ..."""
        self.place: NDArray[np.int64] = order.astype(np.int64) - (np.cumsum(lengths) - lengths)[self.view_of]
        """... and the row in it, int64 [n]"""

    def __len__(self) -> int:
        return len(self.keys)

    def expect(self, shape: tuple[int, int]) -> None:
        """Set a model's (tokens, width) where there are no files.

        A city without any photo is an example.
        """
        if not self.paths:
            self.shape = shape

    def rows_of(self, keys: pa.Array | pa.ChunkedArray) -> NDArray[np.int64]:
        """Return the row of each key, int64 [n].

        It is -1 where the key is null or absent.
        """
        import pyarrow.compute as pc

        found = pc.fill_null(pc.index_in(keys, value_set=self.keys), -1)
        return np.asarray(
            found.to_numpy() if isinstance(found, pa.ChunkedArray) else found.to_numpy(zero_copy_only=False),
            dtype=np.int64,
        )

    def gather(self, rows: NDArray[np.int64]) -> NDArray[np.float16]:
        """Gather the embeddings of rows.

        They are float16 [n, tokens, width]. A row of -1 gives zeros.
        """
        out = np.zeros((len(rows), *self.shape), dtype=np.float16)
        some = np.flatnonzero(rows >= 0)
        view = self.view_of[rows[some]]
        for number in np.unique(view):
            mine = some[view == number]
            out[mine] = self.views[number][self.place[rows[mine]]]
            if not self.keep:
                self.map_of[number].madvise(mmap.MADV_DONTNEED)
        return out

    def release(self) -> None:
        """Release the memory of the pages read so far.

        The mapping stays, and later reads work as before.
        """
        for mapped in self.maps:
            mapped.madvise(mmap.MADV_DONTNEED)


class Means:
    """Means over tokens (or patches) of each content.

    They are float16 [n, width], computed when rows are requested: `means[rows]`.

    Args:
        contents: of n embeddings.
        used: number of tokens of each to average, int64 [n]; None = all.
    """

    def __init__(self, contents: Contents, used: NDArray[np.int64] | None = None) -> None:
        self.contents, self.used = contents, used

    def __len__(self) -> int:
        return len(self.contents)

    @property
    def shape(self) -> tuple[int, int]:
        """Return (n, width)."""
        return len(self), self.contents.shape[1]

    def __getitem__(self, rows: NDArray[np.int64] | slice) -> NDArray[np.float16]:
        """Compute the means of some rows, [·, width]."""
        rows = np.arange(len(self))[rows] if isinstance(rows, slice) else rows
        total = self.contents.gather(rows).astype(np.float32).sum(axis=1)
        count = np.full(len(rows), self.contents.shape[0]) if self.used is None else np.maximum(self.used[rows], 1)
        means: NDArray[np.float16] = (total / count[:, None]).astype(np.float16)
        self.contents.release()
        return means

    def kept(self) -> NDArray[np.float16]:
        """Return all of them, in memory."""
        out = np.zeros(self.shape, dtype=np.float16)
        for start in range(0, len(self), MEANS_AT_A_TIME):
            out[start : start + MEANS_AT_A_TIME] = self[start : start + MEANS_AT_A_TIME]
        return out
