"""Examples, streamed in a seeded order.

The order is over files and sessions, through a bounded buffer. Items and sessions of a batch are
encoded once.

Shapes: B examples, S sessions, H history, N items of the table.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from camenn_model.data.feature_space import FeatureSpace
from camenn_model.data.field_encoders import to_float
from camenn_model.data.item_table import Ints, ItemTable
from schemas.training import NO_HISTORY

Unit = tuple[tuple[str, int, int], ...]
"""Successive examples of a day, read at a time: (path, first row, rows) of each file that has some of them."""

Numbers = tuple[NDArray[np.float32], Ints]
HISTORY = ["history_item", "history_kind", "history_hours"]


@dataclass(frozen=True)
class Histories:
    """Histories of audience rows, padded to the longest.

    They are in small types, as a history may have hundreds of entries.
    """

    item: NDArray[np.int32]  # [S, H] rows of the item table, -1 = padding
    kind: NDArray[np.int8]  # [S, H]
    gap: NDArray[np.float32]  # [S, H] log1p of the hours before

    def __len__(self) -> int:
        return len(self.item)

    def take(self, rows: Ints | slice) -> "Histories":
        """Take some rows, without the places that none of them fills."""
        item = self.item[rows]
        length = int(np.flatnonzero((item >= 0).any(axis=0)).max(initial=0)) + 1
        return Histories(item[:, :length], self.kind[rows, :length], self.gap[rows, :length])

    @classmethod
    def concat(cls, pieces: "Sequence[Histories]") -> "Histories":
        """Concatenate the rows of several, padded to the longest."""
        length = max(piece.item.shape[1] for piece in pieces)

        def joined(arrays: list[NDArray[Any]], padding: int) -> NDArray[Any]:
            return np.concatenate(
                [np.pad(a, ((0, 0), (0, length - a.shape[1])), constant_values=padding) for a in arrays]
            )

        return cls(
            joined([piece.item for piece in pieces], -1),
            joined([piece.kind for piece in pieces], NO_HISTORY),
            joined([piece.gap for piece in pieces], 0),
        )


@dataclass(frozen=True)
class Rows:
    """Encoded examples, struct of arrays.

    They hold everything but embeddings. [B] unless noted.
    """

    item: Ints
    session: Ints  # row of ``history``
    audience_cats: Ints
    audience_values: NDArray[np.float32]
    audience_buckets: Ints
    values: NDArray[np.float32]
    buckets: Ints
    position: Ints
    label: NDArray[np.float32]
    user: NDArray[np.uint64]
    store: NDArray[np.uint64]
    start: Ints
    history: Histories  # of each session, shared by everything that is taken of the rows

    def __len__(self) -> int:
        return len(self.item)

    def take(self, rows: Ints) -> "Rows":
        """Take some rows, in the given order."""
        columns = {name: values[rows] for name, values in vars(self).items() if name != "history"}
        return Rows(**columns, history=self.history)


@dataclass(frozen=True)
class NumberRows:
    """What the count network reads of examples, [B] each."""

    audience_values: NDArray[np.float32]
    audience_buckets: NDArray[np.uint8]
    values: NDArray[np.float32]
    buckets: NDArray[np.uint8]
    label: NDArray[np.float32]


class ExampleReader:
    """A reader of example files into `Rows`.

    Args:
        table: the items, where ids in examples are looked up.
        users: table of user_id and fields.
        history_length, position_size: the model's.
    """

    def __init__(
        self, space: FeatureSpace, table: ItemTable, users: pa.Table, history_length: int, position_size: int
    ) -> None:
        self.space, self.table, self.users = space, table, users
        self.history_length, self.position_size = history_length, position_size

    def read(self, path: str) -> Rows:
        """Read all rows of one file, in its order.

        Sessions are numbered from 0 within the file.
        """
        return self.encode(pq.ParquetFile(path).read())

    def read_unit(self, unit: Unit) -> Rows:
        """Read the rows of a unit, in order.

        Sessions are numbered from 0 within it.
        """
        return self.encode(read_examples(unit))

    def read_numbers(self, unit: Unit) -> NumberRows:
        """Read the numbers of a unit, in order."""
        examples = read_examples(unit, ["label", *self._numbers(unit[0][0])])
        audience, pairs = self._encode_numbers(examples)
        return NumberRows(
            audience_values=audience[0],
            audience_buckets=audience[1].astype(np.uint8),
            values=pairs[0],
            buckets=pairs[1].astype(np.uint8),
            label=examples["label"].to_numpy().astype(np.float32),
        )

    def _numbers(self, path: str) -> list[str]:
        return [name for name in pq.read_schema(path).names if name in self.space.numbers]

    def _encode_numbers(self, examples: pa.Table) -> tuple[Numbers, Numbers]:
        """Return values and buckets of the audience's numbers, and of the pair's."""
        columns = {name: to_float(examples[name]) for name in self.space.numbers if name in examples.column_names}
        return (
            self.space.encode_numbers(("audience_counts",), columns),
            self.space.encode_numbers(("item_counts", "pair_counts"), columns),
        )

    def encode(self, examples: pa.Table) -> Rows:
        """Encode rows of a table under the contract `EXAMPLES`."""
        from camenn_model.hashing import stable_hash

        item = _codes(examples["item_id"], self.table.ids)
        user_row = _codes(examples["user_id"], self.users["user_id"].combine_chunks())
        fields = self.users.take(pa.array(user_row, mask=user_row < 0))
        hour, weekday = examples["hour"].to_numpy(), examples["weekday"].to_numpy()
        audience_cats = self.space.encode_audience(examples["user_id"], examples["store_id"], hour, weekday, fields)
        (audience_values, audience_buckets), (values, buckets) = self._encode_numbers(examples)
        position = np.nan_to_num(to_float(examples["position"]), nan=-1).astype(np.int64)
        user, store = stable_hash(examples["user_id"]), stable_hash(examples["store_id"])
        # A session that goes on in another store is another audience row: store and local hour differ.
        key = np.stack([user, stable_hash(examples["session_id"]), store], axis=1)
        _, first, session = np.unique(key, axis=0, return_index=True, return_inverse=True)
        return Rows(
            item=item,
            session=session.astype(np.int64),
            audience_cats=audience_cats,
            audience_values=audience_values,
            audience_buckets=audience_buckets,
            values=values,
            buckets=buckets,
            position=np.clip(position + 1, 0, self.position_size - 1),
            label=examples["label"].to_numpy().astype(np.float32),
            user=user,
            store=store,
            start=examples["session_start"].cast(pa.int64()).to_numpy(),
            history=self._history(examples.select(HISTORY).take(first)),
        )

    def _history(self, examples: pa.Table) -> Histories:
        column = examples["history_item"].combine_chunks()
        lengths = pc.list_value_length(column).to_numpy(zero_copy_only=False)
        item = _codes(pa.chunked_array([column.flatten()]), self.table.ids)
        kind = examples["history_kind"].combine_chunks().flatten().to_numpy()
        hours = examples["history_hours"].combine_chunks().flatten().to_numpy()
        return pack_history(item, kind, hours, lengths, self.history_length)


def pack_history(item: Ints, kind: NDArray[np.int8], hours: NDArray[np.float32], lengths: Ints, size: int) -> Histories:
    """Pack flat histories into rows of at most `size` places.

    Items that are no longer listed become padding.
    """
    count = len(lengths)
    size = min(size, max(1, int(lengths.max(initial=0))))
    row = np.repeat(np.arange(count), lengths)
    place = np.arange(len(item)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    keep = (place < size) & (item >= 0)
    packed = Histories(
        np.full((count, size), -1, dtype=np.int32),
        np.full((count, size), NO_HISTORY, dtype=np.int8),
        np.zeros((count, size), dtype=np.float32),
    )
    packed.item[row[keep], place[keep]] = item[keep]
    packed.kind[row[keep], place[keep]] = kind[keep]
    packed.gap[row[keep], place[keep]] = np.log1p(np.maximum(hours[keep], 0))
    return packed


def _codes(column: pa.ChunkedArray, known: pa.Array) -> Ints:
    if len(known) == 0:
        return np.full(len(column), -1, dtype=np.int64)
    return pc.fill_null(pc.index_in(column, value_set=known), -1).to_numpy().astype(np.int64)


def count_rows(units: Iterable[Unit]) -> int:
    """Count the examples of some units."""
    return sum(rows for unit in units for _, _, rows in unit)


def read_examples(unit: Unit, columns: list[str] | None = None) -> pa.Table:
    """Read a unit's examples, or some of their columns."""
    pieces = []
    for path, first, rows in unit:
        with pq.ParquetFile(path) as file:
            ends = np.cumsum([file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)])
            low, high = np.searchsorted(ends, [first, first + rows - 1], side="right").tolist()
            start = int(ends[low - 1]) if low else 0
            found = file.read_row_groups(list(range(low, high + 1)), columns=columns)
        pieces.append(found.slice(first - start, rows))
    return pa.concat_tables(pieces)
