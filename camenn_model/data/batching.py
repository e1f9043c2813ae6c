"""Cut examples into batches, mixed by row group."""

import itertools
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from camenn_model.batch import AudienceBatch, Batch, PairBatch
from camenn_model.data.examples import ExampleReader, Histories, Rows, Unit
from camenn_model.data.item_table import Ints, ItemTable
from camenn_model.data.prefetch import prefetch
from camenn_model.data.shard_set import UNIT_ROWS, date_of

BUFFER_ROWS = 65_536
"""Examples read ahead and mixed: some 40 MB."""


def audience_batch(
    cats: Ints, values: NDArray[np.float32], buckets: Ints, history: Histories
) -> tuple[AudienceBatch, Ints]:
    """Build an AudienceBatch of S rows.

    Returns it with the item rows [G] that its histories point to. In the batch, table rows become
    places in [G].
    """
    distinct, place = np.unique(history.item, return_inverse=True)
    place = place.reshape(history.item.shape)
    offset = int(len(distinct) > 0 and distinct[0] == -1)
    batch = AudienceBatch(
        cats=torch.from_numpy(cats),
        values=torch.from_numpy(values),
        buckets=torch.from_numpy(buckets),
        history=torch.from_numpy(place - offset if offset else place),
        history_kind=torch.from_numpy(history.kind.astype(np.int64)),
        history_gap=torch.from_numpy(np.ascontiguousarray(history.gap)),
    )
    return batch, distinct[offset:].astype(np.int64)


def collate(rows: Rows, table: ItemTable) -> Batch:
    """Collate rows into the model's batch.

    It has each distinct item and session once.
    """
    items, item = np.unique(rows.item, return_inverse=True)
    sessions, first, session = np.unique(rows.session, return_index=True, return_inverse=True)
    audience, history_items = audience_batch(
        rows.audience_cats[first],
        rows.audience_values[first],
        rows.audience_buckets[first],
        rows.history.take(sessions),
    )
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
    """Concatenate the rows of several files.

    Sessions of different files stay distinct.
    """
    offset, sessions = 0, []
    for piece in pieces:
        sessions.append(piece.session + offset)
        offset += len(piece.history)
    columns = {
        name: np.concatenate([getattr(piece, name) for piece in pieces])
        for name in vars(pieces[0])
        if name not in ("session", "history")
    }
    return Rows(
        session=np.concatenate(sessions), history=Histories.concat([piece.history for piece in pieces]), **columns
    )


def list_units(files: list[tuple[str, int]], size: int = UNIT_ROWS) -> list[Unit]:
    """Cut example files into pieces of `size` rows, in order.

    The last piece of a day is smaller. Pieces depend on a day's rows alone, not on the files'
    number and boundaries, which depend on whether one night or many built the shard set.

    Args:
        files: (path, rows) as `ShardSet.examples` has them, those of a day one after another.
        size: rows of a piece.
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


def stream_batches(
    reader: ExampleReader, units: list[Unit], batch_size: int, rng: np.random.Generator, *, by_store: bool = False
) -> Iterator[Rows]:
    """Stream random batches of about `batch_size` examples.

    Sessions stay whole. The order is random, and depends only on the generator's state.

    Units of all days come in a random order, so that days are mixed. Sessions are mixed within a
    buffer of some 65,000 examples. With `by_store` a batch draws from few stores, so that it holds
    fewer distinct listings. The batches of a buffer come in a random order then.
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
    """Cut rows into batches of at most `batch_size`.

    Sessions stay whole, in a random order, or in their own.
    """
    count = int(rows.session.max()) + 1
    if rng is None:
        # Sessions are numbered by hash. Keep the files' order (by time) instead.
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
    """Yield first and one-past-last row of each batch.

    Sessions of the rows lie together.
    """
    edges = np.flatnonzero(np.append(session[1:] != session[:-1], True)) + 1
    start = 0
    while start < len(session):
        # The last whole session that still fits. A session longer than a batch is cut.
        place = int(np.searchsorted(edges, start + batch_size, side="right")) - 1
        end = int(edges[place]) if place >= 0 and edges[place] > start else start + batch_size
        yield start, min(end, len(session))
        start = min(end, len(session))


def split_batch(rows: Rows, parts: int) -> list[Rows]:
    """Split a batch into `parts` of about the same size.

    It is cut between sessions where one ends near. Some parts may be empty.
    """
    edges = np.concatenate([[0], np.flatnonzero(np.diff(rows.session)) + 1, [len(rows)]])
    ideal = np.arange(1, parts) * len(rows) / parts
    near = edges[np.abs(edges[:, None] - ideal[None, :]).argmin(axis=0)]
    # A long session is cut where the part ends: it is then encoded once in each part.
    cut = np.where(np.abs(near - ideal) <= len(rows) / (4 * parts), near, np.round(ideal)).astype(np.int64)
    bounds = np.concatenate([[0], np.maximum.accumulate(cut), [len(rows)]])
    return [rows.take(np.arange(low, high)) for low, high in zip(bounds[:-1], bounds[1:], strict=True)]
