"""Examples, streamed: a seeded order over files and sessions, a bounded buffer, and batches whose items and sessions are encoded once.

Shapes: B examples, S sessions, H history, N items of the table.
"""

import itertools
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from camenn_model.batch import AlignmentBatch, AlignmentPairs, AudienceBatch, Batch, PairBatch
from camenn_model.feature_space import FeatureSpace, to_float
from camenn_model.item_table import Ints, ItemTable
from camenn_model.shards import UNIT_ROWS, date_of

T = TypeVar("T")
U = TypeVar("U")

BUFFER_ROWS = 65_536
"""Examples read ahead and mixed: some 40 MB."""

Unit = tuple[tuple[str, int, int], ...]
"""Successive examples of a day, read at a time: (path, first row, rows) of each file that has some of them."""


@dataclass(frozen=True)
class Rows:
    """Encoded examples, struct of arrays; everything but embeddings. [B] unless said."""

    item: Ints
    session: Ints
    audience_cats: Ints
    audience_values: NDArray[np.float32]
    audience_buckets: Ints
    values: NDArray[np.float32]
    buckets: Ints
    position: Ints
    label: NDArray[np.float32]
    history: Ints
    history_kind: Ints
    history_gap: NDArray[np.float32]
    user: NDArray[np.uint64]
    store: NDArray[np.uint64]
    start: Ints

    def __len__(self) -> int:
        return len(self.item)

    def take(self, rows: Ints) -> "Rows":
        """Some rows, in the given order."""
        return Rows(**{name: values[rows] for name, values in vars(self).items()})


class ExampleReader:
    """Reads example files into `Rows`.

    Args:
        table: the items; ids in examples are looked up there.
        users: table of user_id and fields.
        history_length, position_size: the model's.
    """

    def __init__(
        self, space: FeatureSpace, table: ItemTable, users: pa.Table, history_length: int, position_size: int
    ) -> None:
        self.space, self.table, self.users = space, table, users
        self.history_length, self.position_size = history_length, position_size

    def read(self, path: str) -> Rows:
        """All rows of one file, in the file's order. Sessions are numbered from 0 within the file."""
        return self.encode(pq.ParquetFile(path).read())

    def read_unit(self, unit: Unit) -> Rows:
        """The rows of a unit, in order. Sessions are numbered from 0 within it."""
        return self.encode(read_examples(unit))

    def encode(self, examples: pa.Table) -> Rows:
        """Rows of a table under the contract `EXAMPLES`."""
        from camenn_model.hashing import stable_hash

        item = _codes(examples["item_id"], self.table.ids)
        user_row = _codes(examples["user_id"], self.users["user_id"].combine_chunks())
        fields = self.users.take(pa.array(user_row, mask=user_row < 0))
        hour, weekday = examples["hour"].to_numpy(), examples["weekday"].to_numpy()
        audience_cats = self.space.encode_audience(examples["user_id"], examples["store_id"], hour, weekday, fields)
        columns = {name: to_float(examples[name]) for name in self.space.numbers if name in examples.column_names}
        audience_values, audience_buckets = self.space.encode_numbers(("audience_counts",), columns)
        values, buckets = self.space.encode_numbers(("item_counts", "pair_counts"), columns)
        position = np.nan_to_num(to_float(examples["position"]), nan=-1).astype(np.int64)
        history, kind, gap = self._history(examples)
        user, store = stable_hash(examples["user_id"]), stable_hash(examples["store_id"])
        # A session that goes on in another store is another audience row: store and local hour differ.
        key = np.stack([user, stable_hash(examples["session_id"]), store], axis=1)
        _, session = np.unique(key, axis=0, return_inverse=True)
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
            history=history,
            history_kind=kind,
            history_gap=gap,
            user=user,
            store=store,
            start=examples["session_start"].cast(pa.int64()).to_numpy(),
        )

    def _history(self, examples: pa.Table) -> tuple[Ints, Ints, NDArray[np.float32]]:
        column = examples["history_item"].combine_chunks()
        lengths = pc.list_value_length(column).to_numpy(zero_copy_only=False)
        item = _codes(pa.chunked_array([column.flatten()]), self.table.ids)
        kind = examples["history_kind"].combine_chunks().flatten().to_numpy()
        hours = examples["history_hours"].combine_chunks().flatten().to_numpy()
        return pack_history(item, kind, hours, lengths, self.history_length)


def pack_history(
    item: Ints, kind: NDArray[np.int8], hours: NDArray[np.float32], lengths: Ints, size: int
) -> tuple[Ints, Ints, NDArray[np.float32]]:
    """Flat histories → ([S, H] item row, -1 = padding; [S, H] kind; [S, H] log1p of hours). Items that are no longer listed become padding."""
    count = len(lengths)
    row = np.repeat(np.arange(count), lengths)
    place = np.arange(len(item)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    keep = (place < size) & (item >= 0)
    history = np.full((count, size), -1, dtype=np.int64)
    kinds = np.zeros((count, size), dtype=np.int64)
    gap = np.zeros((count, size), dtype=np.float32)
    history[row[keep], place[keep]] = item[keep]
    kinds[row[keep], place[keep]] = kind[keep]
    gap[row[keep], place[keep]] = np.log1p(np.maximum(hours[keep], 0))
    return history, kinds, gap


def _codes(column: pa.ChunkedArray, known: pa.Array) -> Ints:
    if len(known) == 0:
        return np.full(len(column), -1, dtype=np.int64)
    return pc.fill_null(pc.index_in(column, value_set=known), -1).to_numpy().astype(np.int64)


def audience_batch(
    cats: Ints, values: NDArray[np.float32], buckets: Ints, history: Ints, kind: Ints, gap: NDArray[np.float32]
) -> tuple[AudienceBatch, Ints]:
    """AudienceBatch of S rows, and the item rows [G] that its histories point to (table rows become places in [G])."""
    distinct, place = np.unique(history, return_inverse=True)
    place = place.reshape(history.shape)
    offset = int(len(distinct) > 0 and distinct[0] == -1)
    batch = AudienceBatch(
        cats=torch.from_numpy(cats),
        values=torch.from_numpy(values),
        buckets=torch.from_numpy(buckets),
        history=torch.from_numpy(place - offset if offset else place),
        history_kind=torch.from_numpy(kind),
        history_gap=torch.from_numpy(gap),
    )
    return batch, distinct[offset:]


def collate(rows: Rows, table: ItemTable) -> Batch:
    """Rows → the model's batch: each distinct item and session once."""
    items, item = np.unique(rows.item, return_inverse=True)
    _, first, session = np.unique(rows.session, return_index=True, return_inverse=True)
    audience, history_items = audience_batch(
        rows.audience_cats[first], rows.audience_values[first], rows.audience_buckets[first], rows.history[first], rows.history_kind[first], rows.history_gap[first]
    )  # fmt: skip
    return Batch(
        items=table.batch(items),
        audience=audience,
        history=table.history(history_items),
        pairs=PairBatch(
            item=torch.from_numpy(item),
            audience=torch.from_numpy(session),
            values=torch.from_numpy(rows.values),
            buckets=torch.from_numpy(rows.buckets),
            position=torch.from_numpy(rows.position),
            label=torch.from_numpy(rows.label),
        ),
    )


def concat_rows(pieces: list[Rows]) -> Rows:
    """Rows of several files as one; sessions keep apart."""
    offset, sessions = 0, []
    for piece in pieces:
        sessions.append(piece.session + offset)
        offset += int(piece.session.max(initial=-1)) + 1
    columns = {
        name: np.concatenate([getattr(piece, name) for piece in pieces])
        for name in vars(pieces[0])
        if name != "session"
    }
    return Rows(session=np.concatenate(sessions), **columns)


def list_units(files: list[tuple[str, int]], size: int = UNIT_ROWS) -> list[Unit]:
    """Cut example files into pieces of `size` rows, in order.

    The last piece of a day is smaller. Pieces depend on a day's rows alone: in how many files they lie, and where one
    ends, tells how the shard set came about, in one night or in many.

    Args:
        files: (path, rows) as `ShardSet.examples` has them, those of a day one after another.
    """
    units: list[Unit] = []
    for _, of_day in itertools.groupby(files, key=lambda file: date_of(file[0])):
        room = 0
        for path, rows in of_day:
            first = 0
            while first < rows:
                if not room:
                    units.append(())
                    room = size
                taken = min(room, rows - first)
                units[-1] += ((path, first, taken),)
                first, room = first + taken, room - taken
    return units


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


def stream_batches(
    reader: ExampleReader, units: list[Unit], batch_size: int, rng: np.random.Generator, *, by_store: bool = False
) -> Iterator[Rows]:
    """Batches of about `batch_size` examples, whole sessions together, in a random order that depends on nothing but the generator's state.

    Units of all days come in a random order, so that days are mixed; sessions are mixed within a buffer of some 65,000
    examples. With `by_store` a batch draws from few stores, so that it holds fewer distinct listings; the batches of a
    buffer come in a random order then.
    """
    mixed = [units[number] for number in rng.permutation(len(units))]
    for rows in prefetch(_buffers(reader, mixed), 1):
        yield from cut_batches(rows, batch_size, rng, by_store=by_store)


def _buffers(reader: ExampleReader, units: list[Unit]) -> Iterator[Rows]:
    waiting: list[Rows] = []
    held = 0
    for place, unit in enumerate(units):
        waiting.append(reader.read_unit(unit))
        held += len(waiting[-1])
        if held >= BUFFER_ROWS or place == len(units) - 1:
            rows = concat_rows(waiting)
            waiting, held = [], 0
            if len(rows):
                yield rows


def cut_batches(
    rows: Rows, batch_size: int, rng: np.random.Generator | None, *, by_store: bool = False
) -> Iterator[Rows]:
    """Cut rows into batches of at most `batch_size`, whole sessions together: in a random order of sessions, or in theirs."""
    count = int(rows.session.max()) + 1
    if rng is None:
        # Sessions are numbered by hash; keep the files' order (by time) instead.
        rank = np.argsort(np.argsort(np.unique(rows.session, return_index=True)[1]))
    else:
        rank = rng.permutation(count)
    if rng is not None and by_store:
        # A session is in one store (see `encode`): stores in a random order, and within a store its sessions.
        _, first = np.unique(rows.session, return_index=True)
        stores, store = np.unique(rows.store[first], return_inverse=True)
        rank = np.argsort(np.lexsort((rank, rng.permutation(len(stores))[store])))
    order = np.argsort(rank[rows.session], kind="stable")
    cuts = list(_cuts(rows.session[order], batch_size))
    for number in rng.permutation(len(cuts)) if rng is not None and by_store else range(len(cuts)):
        start, end = cuts[number]
        yield rows.take(order[start:end])


def _cuts(session: Ints, batch_size: int) -> Iterator[tuple[int, int]]:
    """First and one-past-last row of each batch of rows whose sessions lie together."""
    edges = np.flatnonzero(np.append(session[1:] != session[:-1], True)) + 1
    start = 0
    while start < len(session):
        # The last whole session that still fits; a session longer than a batch is cut.
        place = int(np.searchsorted(edges, start + batch_size, side="right")) - 1
        end = int(edges[place]) if place >= 0 and edges[place] > start else start + batch_size
        yield start, min(end, len(session))
        start = min(end, len(session))


def split_batch(rows: Rows, parts: int) -> list[Rows]:
    """A batch as `parts` batches of about the same size, cut between sessions where one ends near; some may be empty."""
    edges = np.concatenate([[0], np.flatnonzero(np.diff(rows.session)) + 1, [len(rows)]])
    ideal = np.arange(1, parts) * len(rows) / parts
    near = edges[np.abs(edges[:, None] - ideal[None, :]).argmin(axis=0)]
    # A long session is cut where the part ends: it is then encoded once in each part.
    cut = np.where(np.abs(near - ideal) <= len(rows) / (4 * parts), near, np.round(ideal)).astype(np.int64)
    bounds = np.concatenate([[0], np.maximum.accumulate(cut), [len(rows)]])
    return [rows.take(np.arange(low, high)) for low, high in zip(bounds[:-1], bounds[1:], strict=True)]


def map_ahead(work: Callable[[T], U], source: Iterator[T], workers: int) -> Iterator[U]:
    """`work` of each element, in the source's order, up to `workers` at a time and as many waiting."""
    with ThreadPoolExecutor(workers, thread_name_prefix="gather") as pool:
        ahead: deque[Future[U]] = deque()
        try:
            for element in source:
                ahead.append(pool.submit(work, element))
                if len(ahead) > 2 * workers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()


def prefetch(source: Iterator[T], depth: int = 2) -> Iterator[T]:
    """Run an iterator in a thread, `depth` elements ahead: gathering from mapped files and computing overlap."""
    ready: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(depth)
    stop = threading.Event()

    def work() -> None:
        try:
            for element in source:
                while not stop.is_set():
                    try:
                        ready.put((element, None), timeout=0.1)
                        break
                    except queue.Full:
                        continue
                if stop.is_set():
                    return
            ready.put((None, StopIteration()))
        except BaseException as error:
            ready.put((None, error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            element, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield element
    finally:
        stop.set()


class AlignmentSampler:
    """Draws alignment pairs uniformly over the training catalog (FashionBERT's matching, made directional).

    Half of the pairs are the listing's own; of the others half come from the same subcategory, half from anywhere, never from the same
    product, photo or title. Held-out listings are never drawn.
    """

    def __init__(self, table: ItemTable) -> None:
        self.table = table
        self.rows = np.flatnonzero(table.with_content() & ~table.held_out)
        groups = table.subcategory[self.rows]
        self.by_group = np.argsort(groups, kind="stable")
        self.group_start = np.searchsorted(groups[self.by_group], groups)
        self.group_end = np.searchsorted(groups[self.by_group], groups, side="right")

    def __len__(self) -> int:
        return len(self.rows)

    def others(self, anchors: Ints, rng: np.random.Generator) -> Ints:
        """For each anchor (a place in `rows`) the place of a listing of another product; -1 where ten draws found none."""
        found = np.full(len(anchors), -1, dtype=np.int64)
        near = rng.random(len(anchors)) < 0.5
        for attempt in range(10):
            open_ = np.flatnonzero(found < 0)
            if not len(open_):
                break
            anchor = anchors[open_]
            low, high = self.group_start[anchor], self.group_end[anchor]
            within = self.by_group[(low + rng.random(len(open_)) * (high - low)).astype(np.int64)]
            anywhere = rng.integers(0, len(self.rows), len(open_))
            drawn = np.where(near[open_], within, anywhere)
            a, b = self.rows[anchor], self.rows[drawn]
            table = self.table
            same = (
                (table.product[a] == table.product[b])
                | (table.image_row[a] == table.image_row[b])
                | (table.title_row[a] == table.title_row[b])
            )
            found[open_] = np.where(same, -1, drawn)
            # A subcategory of one product has no foreign listing: look anywhere from the sixth draw on.
            near &= attempt < 5
        return found

    def draw(self, pairs: int, listings: int, rng: np.random.Generator) -> AlignmentBatch | None:
        """A batch of `pairs` ITA and `pairs` TIA pairs, and of `listings` for the contrastive loss, the pairs' anchors among them; None if the catalog has no two."""
        if len(self.rows) < 2:
            return None
        contrasted = rng.choice(len(self.rows), size=min(max(pairs, listings), len(self.rows)), replace=False)
        anchors = contrasted[:pairs]
        pieces, columns = [contrasted], []
        for _ in ("ita", "tia"):
            foreign = self.others(anchors, rng)
            swap = (rng.random(len(anchors)) < 0.5) & (foreign >= 0)
            other = np.where(swap, foreign, anchors)
            pieces.append(other)
            columns.append((other, ~swap))
        places, inverse = np.unique(np.concatenate(pieces), return_inverse=True)
        index, ita_other, tia_other = np.split(inverse, np.cumsum([len(contrasted), len(anchors)]))
        anchor = index[: len(anchors)]
        table_rows = self.rows[places]

        def paired(image: Ints, text: Ints, label: NDArray[np.bool_]) -> AlignmentPairs:
            return AlignmentPairs(
                image_of=torch.from_numpy(image),
                text_of=torch.from_numpy(text),
                label=torch.from_numpy(label.astype(np.float32)),
            )

        _, group = np.unique(self.table.product[self.rows[contrasted]], return_inverse=True)
        return AlignmentBatch(
            items=self.table.batch(table_rows, content_only=True),
            ita=paired(anchor, ita_other, columns[0][1]),
            tia=paired(tia_other, anchor, columns[1][1]),
            index=torch.from_numpy(index),
            group=torch.from_numpy(group),
        )
