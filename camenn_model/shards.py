"""A shard set, opened: its items, users and example files, and the embeddings mapped into memory. Nothing here imports torch or Beam."""

import mmap
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from camenn_model.published import check_table_files, read_manifest, read_published
from schemas.contract import InputError
from schemas.embeddings import embedding_shape
from schemas.manifest import RUNS, remedy
from schemas.training import EXAMPLE_ORDER

UNIT_ROWS = 8_192
"""Examples of a day that are read and mixed at a time; a row group of their files has as many"""
BLOCK_ROWS = 262_144
"""Examples of a day that are read at a time where all of them are wanted in order; a file has no more"""
MEANS_AT_A_TIME = 4_096
"""Contents that are read at a time where the means of all are kept"""


class Contents:
    """Embeddings of one kind, mapped: `gather` reads only the rows asked for.

    Rows are in order of keys, wherever they lie: what is computed from all of them must not depend on the files.

    Args:
        paths: Arrow IPC files of (key, embedding), each with any keys in any order; one that stands in two counts once.
        key: name of the key column.
        shape: (tokens, width) where there are no files that tell it.
        wanted: keys that are of interest; None = all. Contents are only ever added: files may hold those of listings
            that are gone.
        keep: whether what was read stays in memory, for the next time; otherwise it is given back as soon as it is copied.
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
        import pyarrow.compute as pc

        self.keep = keep
        self.views: list[NDArray[np.float16]] = []
        self.maps: list[mmap.mmap] = []
        self.map_of: list[mmap.mmap] = []
        keys: list[pa.Array] = []
        self.shape = shape
        for path in sorted(paths):
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
        lengths = np.array([len(view) for view in self.views], dtype=np.int64)
        self.view_of: NDArray[np.int64] = np.repeat(np.arange(len(lengths)), lengths)[order]
        """Where each row lies: number of the view, int64 [n] ..."""
        self.place: NDArray[np.int64] = order.astype(np.int64) - (np.cumsum(lengths) - lengths)[self.view_of]
        """... and the row in it, int64 [n]"""

    def __len__(self) -> int:
        return len(self.keys)

    def expect(self, shape: tuple[int, int]) -> None:
        """Have a model's (tokens, width) where there are no files that tell it: of a city without any photo, say."""
        if not self.maps:
            self.shape = shape

    def rows_of(self, keys: pa.Array | pa.ChunkedArray) -> NDArray[np.int64]:
        """Row of each key, int64 [n]; -1 where the key is null or not there."""
        import pyarrow.compute as pc

        found = pc.fill_null(pc.index_in(keys, value_set=self.keys), -1)
        return np.asarray(
            found.to_numpy() if isinstance(found, pa.ChunkedArray) else found.to_numpy(zero_copy_only=False),
            dtype=np.int64,
        )

    def gather(self, rows: NDArray[np.int64]) -> NDArray[np.float16]:
        """Embeddings of rows, float16 [n, tokens, width]; a row of -1 gives zeros."""
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
        """Give back the memory of what was read so far; the mapping stays, and reading goes on as before."""
        for mapped in self.maps:
            mapped.madvise(mmap.MADV_DONTNEED)


class Means:
    """Mean over tokens (or patches) of each content, float16 [n, width], computed when rows are asked for: `means[rows]`.

    Args:
        contents: of n embeddings.
        used: tokens of each that count, int64 [n]; None = all.
    """

    def __init__(self, contents: Contents, used: NDArray[np.int64] | None = None) -> None:
        self.contents, self.used = contents, used

    def __len__(self) -> int:
        return len(self.contents)

    @property
    def shape(self) -> tuple[int, int]:
        """(n, width)."""
        return len(self), self.contents.shape[1]

    def __getitem__(self, rows: NDArray[np.int64] | slice) -> NDArray[np.float16]:
        """Of some rows, [·, width]."""
        rows = np.arange(len(self))[rows] if isinstance(rows, slice) else rows
        total = self.contents.gather(rows).astype(np.float32).sum(axis=1)
        count = np.full(len(rows), self.contents.shape[0]) if self.used is None else np.maximum(self.used[rows], 1)
        means: NDArray[np.float16] = (total / count[:, None]).astype(np.float16)
        self.contents.release()
        return means

    def kept(self) -> NDArray[np.float16]:
        """All of them, in memory."""
        out = np.zeros(self.shape, dtype=np.float16)
        for start in range(0, len(self), MEANS_AT_A_TIME):
            out[start : start + MEANS_AT_A_TIME] = self[start : start + MEANS_AT_A_TIME]
        return out


def date_of(path: str) -> str:
    """The date that an example file is filed under."""
    return path.split("/date=")[1].split("/")[0]


def first_row(path: str) -> tuple[Any, ...]:
    """Read what an example file's first row has of `EXAMPLE_ORDER`."""
    with pq.ParquetFile(path) as file:
        row = file.read_row_group(0, columns=list(EXAMPLE_ORDER)).slice(0, 1).to_pylist()[0]
    return tuple(row[name] for name in EXAMPLE_ORDER)


@dataclass(frozen=True)
class ShardSet:
    """A published shard set.

    Raises:
        InputError: nothing is published at `root`, or something else than shards.
    """

    root: str

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """The published run's manifest."""
        latest = read_published(self.root, "shards", "--shards")
        return read_manifest(Path(self.root) / RUNS / latest["run"])

    def _check(self, table: str) -> None:
        check_table_files(Path(self.root), self.manifest, table, remedy("shards", table))

    def files(self, table: str) -> list[tuple[str, int]]:
        """(path, rows) of a table's files, ordered by path.

        Raises:
            DamagedError: one of them is lost or damaged.
        """
        self._check(table)
        entries = self.manifest["tables"].get(table, {}).get("files", [])
        return sorted((str(Path(self.root) / entry["path"]), int(entry["rows"])) for entry in entries)

    def examples(self, split: str) -> list[tuple[str, int]]:
        """List (path, rows) of the example files of one split, in order of time.

        A day's rows are those of its files one after another, whichever runs wrote them.

        Raises:
            InputError: the shard set was written by a version that filed splits by folder.
            DamagedError: a file of any split is lost or damaged.
        """
        return self._examples.get(split, [])

    @cached_property
    def _examples(self) -> dict[str, list[tuple[str, int]]]:
        self._check("examples")
        entries = self.manifest["tables"].get("examples", {}).get("files", [])
        if any("split" not in entry for entry in entries):
            raise InputError(
                f"--shards {self.root}: was written by an earlier version of camenn. Run `camenn shards --rebuild` into it."
            )
        days: dict[tuple[str, str], list[tuple[str, int]]] = {}
        for path, rows, split in sorted(
            (str(Path(self.root) / entry["path"]), int(entry["rows"]), entry["split"]) for entry in entries
        ):
            days.setdefault((split, date_of(path)), []).append((path, rows))
        found: dict[str, list[tuple[str, int]]] = {}
        for (split, _), of_day in sorted(days.items()):
            # Names tell runs and pieces: only the rows tell which file of a day comes first.
            in_order = sorted(of_day, key=lambda file: first_row(file[0])) if len(of_day) > 1 else of_day
            found.setdefault(split, []).extend(in_order)
        return found

    def closed_before(self) -> str:
        """The first date that is not over yet, attribution windows included: labels of earlier ones are complete, but for orders that arrive late."""
        options = self.manifest["options"]
        closed_us = int(options["days"]["as_of"]) - round(float(options["attribution_hours"]) * 3_600_000_000)
        return str(np.datetime64(closed_us, "us").astype("datetime64[D]"))

    @cached_property
    def items(self) -> pa.Table:
        """The items, ordered by item_id."""
        return pa.concat_tables([pq.ParquetFile(path).read() for path, _ in self.files("items")])

    @cached_property
    def users(self) -> pa.Table:
        """The users and their fields."""
        return pa.concat_tables([pq.ParquetFile(path).read() for path, _ in self.files("users")])

    @cached_property
    def images(self) -> Contents:
        """Photos' patch features, of the items' photos."""
        paths = [path for path, _ in self.files("contents_images")]
        return Contents(paths, "image_key", wanted=self.items["image_key"])

    @cached_property
    def titles(self) -> Contents:
        """Titles' token states, of the items' titles."""
        paths = [path for path, _ in self.files("contents_titles")]
        return Contents(paths, "title_key", wanted=self.items["title_key"])
