"""Examples on their way into batches, against loops over made-up rows; over a shard set in test_train.py."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from camenn_model.data.alignment_sampler import AlignmentSampler
from camenn_model.data.batching import audience_batch
from camenn_model.data.examples import ExampleReader, Histories, pack_history
from schemas.training import EXAMPLES


def catalog(**columns: list[int]) -> Any:
    """What the sampler reads of an item table, one row a listing; no listing is held out or without content."""
    rows = len(columns["product"])
    values = {"held_out": np.zeros(rows, dtype=bool)} | {name: np.array(column) for name, column in columns.items()}
    return SimpleNamespace(with_content=lambda: np.ones(rows, dtype=bool), **values)


def test_foreign_listings_share_neither_product_nor_photo_nor_title() -> None:
    """Every pair of six listings of one subcategory has its verdict: what one of them shares with the next is no
    mismatch of it.
    """
    table = catalog(
        product=[0, 0, 1, 2, 3, 4],
        image_row=[0, 1, 0, 2, 3, 4],
        title_row=[0, 1, 2, 0, 3, 4],
        subcategory=[0] * 6,
    )
    sampler = AlignmentSampler(table)
    allowed = {
        (a, b)
        for a in range(6)
        for b in range(6)
        if not any(column[a] == column[b] for column in (table.product, table.image_row, table.title_row))
    }
    rng = np.random.default_rng(0)
    drawn = set()
    for _ in range(60):
        found = sampler.others(np.arange(6), rng)
        drawn |= {(anchor, int(other)) for anchor, other in enumerate(found) if other >= 0}
    assert drawn == allowed


def test_half_of_the_foreign_listings_are_of_the_same_subcategory() -> None:
    rows = 400
    table = catalog(
        product=list(range(rows)),
        image_row=list(range(rows)),
        title_row=list(range(rows)),
        subcategory=[row % 20 for row in range(rows)],
    )
    sampler = AlignmentSampler(table)
    rng = np.random.default_rng(1)
    found = np.stack([sampler.others(np.arange(rows), rng) for _ in range(20)])
    assert (found >= 0).all()
    near = (table.subcategory[sampler.rows[found]] == table.subcategory[None, :]).mean()
    # Of those from any subcategory a twentieth is near by chance.
    assert near == pytest.approx(0.5 + 0.5 / 20, abs=0.02)


def test_histories_are_cut_and_listings_that_are_gone_are_padding() -> None:
    item = np.array([7, -1, 5, 3, 2, 9])
    kind = np.array([1, 2, 2, 1, 2, 1], dtype=np.int8)
    hours = np.array([0.0, 1.0, 2.0, -0.5, 3.0, 4.0], dtype=np.float32)
    packed = pack_history(item, kind, hours, np.array([4, 0, 2]), 3)
    assert packed.item.tolist() == [[7, -1, 5], [-1, -1, -1], [2, 9, -1]]
    assert packed.kind.tolist() == [[1, 0, 2], [0, 0, 0], [2, 1, 0]]
    assert packed.gap == pytest.approx(np.log([[1, 1, 3], [1, 1, 1], [4, 5, 1]]))


def test_histories_are_padded_to_the_longest_of_those_taken() -> None:
    lengths, entries = np.array([1, 3, 0]), np.array([5, 6, 7, 8])
    packed = pack_history(entries, np.full(4, 2, np.int8), np.ones(4, np.float32), lengths, 9)
    assert packed.item.tolist() == [[5, -1, -1], [6, 7, 8], [-1, -1, -1]]
    assert packed.take(np.array([0, 2])).item.tolist() == [[5], [-1]]
    joined = Histories.concat([packed.take(np.array([2])), packed])
    assert joined.item.tolist() == [[-1, -1, -1], *packed.item.tolist()]
    assert joined.kind.tolist() == [[0, 0, 0], *packed.kind.tolist()]
    assert (joined.gap > 0).sum() == 4


@pytest.mark.parametrize("padded", [True, False])
def test_histories_point_to_the_listings_that_come_with_them(padded: bool) -> None:
    history = np.array([[30, 4, -1], [4, -1, -1]] if padded else [[30, 4, 8], [4, 8, 30]])
    rows = len(history)
    nothing = np.zeros((rows, 0), dtype=np.int64)
    kind = (history >= 0).astype(np.int64)
    packed = Histories(history.astype(np.int32), kind.astype(np.int8), kind.astype(np.float32))
    batch, listings = audience_batch(nothing, nothing.astype(np.float32), nothing, packed)
    assert listings.tolist() == sorted({int(row) for row in history.flat if row >= 0})
    assert [[int(listings[place]) if place >= 0 else -1 for place in row] for row in batch.history] == history.tolist()


def reader() -> ExampleReader:
    """A reader that encodes nothing of an audience row but its store, as its length."""

    def encode_audience(user: Any, store: Any, hour: Any, weekday: Any, fields: Any) -> np.ndarray:
        return np.array([[len(name)] for name in store.to_pylist()])

    def encode_numbers(groups: Any, columns: Any) -> tuple[np.ndarray, np.ndarray]:
        rows = len(next(iter(columns.values())))
        return np.zeros((rows, 0), dtype=np.float32), np.zeros((rows, 0), dtype=np.int64)

    space: Any = SimpleNamespace(
        numbers={"item_clicks": None}, encode_audience=encode_audience, encode_numbers=encode_numbers
    )
    table: Any = SimpleNamespace(ids=pa.array(["i0", "i1"]))
    users = pa.table({"user_id": pa.array(["u0"])})
    return ExampleReader(space, table, users, history_length=2, position_size=4)


def examples(rows: list[dict[str, Any]]) -> pa.Table:
    """Rows under the contract, with something in every column that they do not give."""
    plain: dict[str, Any] = {}
    for field in EXAMPLES.schema:
        kind = field.type
        text = pa.types.is_string(kind)
        plain[field.name] = [] if pa.types.is_list(kind) else "x" if text else 0
    return pa.Table.from_pylist([plain | row for row in rows], schema=EXAMPLES.schema)


def test_the_first_place_of_a_page_is_not_an_unknown_one() -> None:
    found = reader().encode(examples([{"position": place} for place in (None, 0, 1, 2, 3, 400)]))
    assert found.position.tolist() == [0, 1, 2, 3, 3, 3]


def test_a_session_that_goes_on_in_another_store_is_another_audience_row() -> None:
    """Store and hour are fields of the audience row: two stores under one session would share one store otherwise."""
    keys = [("u0", "a", "s"), ("u0", "a", "store"), ("u0", "b", "s"), ("u1", "a", "s"), ("u0", "a", "s")]
    found = reader().encode(
        examples([dict(zip(("user_id", "session_id", "store_id"), key, strict=True)) for key in keys])
    )
    same = [[a == b for b in found.session.tolist()] for a in found.session.tolist()]
    assert same == [[a == b for b in keys] for a in keys]
