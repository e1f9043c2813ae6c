"""Tiles and ranks against sorting all pairs; with a scorer of given logits, so that there are many
ties. The real one is in tests/end_to_end.
"""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from camenn_model.calibration import PlattScaling
from camenn_model.data.feature_space import NUMERIC_GROUPS, FeatureSpace
from pipelines.score.tiles import RankChunk, ScoreTile, Tile, encode_tile

CALIBRATION = PlattScaling(slope=0.5, intercept=-1.0)
COUNTS = [*NUMERIC_GROUPS["item_counts"], *NUMERIC_GROUPS["pair_counts"]]


class Given:
    """Logits [audience rows, listings] instead of a model; states are row numbers."""

    def __init__(self, logits: np.ndarray) -> None:
        self.logits = torch.from_numpy(logits)

    def item_states(self, rows: np.ndarray) -> np.ndarray:
        return rows

    def audience_states(self, rows: np.ndarray, history: Any) -> np.ndarray:
        return rows

    def score_tile(self, items: Any, audience: Any, values: Any, buckets: Any, allowed: Any = None) -> torch.Tensor:
        assert values.shape == buckets.shape == (len(audience), len(items), len(COUNTS))
        found = self.logits[audience][:, items]
        return found if allowed is None else found.masked_fill(~allowed, -torch.inf)


def tile_step(logits: np.ndarray, top_k: int, pairs: set[tuple[int, int]] | None) -> ScoreTile:
    """The step as its `setup` leaves it. `pairs`: the candidates."""
    rows, items = logits.shape
    job: Any = SimpleNamespace(top_k=top_k)
    step: Any = ScoreTile(job)  # what it has is stood in for
    number = SimpleNamespace(encode=lambda values: (values, np.zeros(values.shape, dtype=np.int64)))
    step.package = SimpleNamespace(
        space=SimpleNamespace(numbers=dict.fromkeys(COUNTS, number)), calibration=CALIBRATION
    )
    table: Any = type(
        "Table", (), {"__len__": lambda _: items, "batch": lambda _, rows: rows, "history": lambda *_: None}
    )
    step.table = table()
    step.scorer = Given(logits)
    step.attributes = SimpleNamespace(subcategory=np.zeros(items), brand=np.zeros(items))
    columns = {name: np.zeros((1, 1), dtype=np.float32) for name in COUNTS}
    step.snapshot = SimpleNamespace(tile=lambda *_: columns)
    step.audience = SimpleNamespace(
        user=np.zeros(rows), store=np.zeros(rows), batch=lambda wanted: (np.arange(rows)[wanted], None)
    )
    # As `camenn score` writes them: by audience row, then by item row.
    step.candidates = None if pairs is None else np.array([a * items + i for a, i in sorted(pairs)], dtype=np.int64)
    step.latest = None
    step.progress = SimpleNamespace(add=lambda _: None)
    found: ScoreTile = step
    return found


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_each_audience_row_gets_its_best_ranked(data: st.DataObject) -> None:
    rows, items = data.draw(st.integers(1, 5), label="audience rows"), data.draw(st.integers(1, 7), label="listings")
    some = st.lists(st.integers(-2, 2), min_size=rows * items, max_size=rows * items)
    logits = np.array(data.draw(some), dtype=np.float32).reshape(rows, items)
    every = [(a, i) for a in range(rows) for i in range(items)]
    pairs = data.draw(st.none() | st.sets(st.sampled_from(every), min_size=1), label="candidates")
    top_k = data.draw(st.sampled_from([0, 1, 2, 3, 10]), label="top_k")
    edges = sorted({0, rows, *data.draw(st.sets(st.integers(0, rows)))})
    cuts = sorted({0, items, *data.draw(st.sets(st.integers(0, items)))})
    # Listings in an order of their own, as those of a store may lie anywhere in the catalog.
    order = np.array(data.draw(st.permutations(range(items))), dtype=np.int32)
    tiles = [
        Tile(chunk, edges[chunk : chunk + 2], order[start:end].tobytes())  # type: ignore[arg-type]
        for start, end in zip(cuts[:-1], cuts[1:], strict=True)
        for chunk in range(len(edges) - 1)
    ]
    step = tile_step(logits, top_k, pairs)
    pieces: dict[int, list[bytes]] = {}
    for tile in tiles:
        for chunk, piece in step.process(tile):
            pieces.setdefault(chunk, []).append(piece)
    rank = RankChunk("", top_k, "m1")
    rank.audience_ids = pa.array([f"a{row}" for row in range(rows)])
    rank.item_ids = pa.array([f"i{item}" for item in range(items)])
    found = [row for chunk in sorted(pieces) for row in next(rank.process((chunk, pieces[chunk]))).to_pylist()]

    cvr = 1 / (1 + np.exp(-(0.5 * logits.astype(np.float64) - 1.0)))
    expected = []
    for a in range(rows):
        best = sorted((-cvr[a, i], i) for i in range(items) if pairs is None or (a, i) in pairs)
        for place, (minus, i) in enumerate(best[: top_k or None]):
            expected.append(
                {
                    "audience_id": f"a{a}",
                    "item_id": f"i{i}",
                    "cvr": float(np.float32(-minus)),
                    "rank": place + 1,
                    "model_version": "m1",
                }
            )
    assert found == expected


def test_a_tile_is_encoded_in_the_models_order() -> None:
    """Values and buckets of a tile have training's column order, or each weight would multiply another number."""
    rng = np.random.default_rng(0)

    def number(place: int) -> Any:
        return SimpleNamespace(
            encode=lambda values: (values * np.float32(place + 1), np.full(values.shape, place, dtype=np.int64))
        )

    numbers = {name: number(place) for place, name in enumerate(sorted(COUNTS))}
    shapes = [(3, 4), (1, 4), (3, 1)]
    columns = {name: rng.normal(size=shapes[place % 3]).astype(np.float32) for place, name in enumerate(sorted(COUNTS))}
    values, buckets = encode_tile(numbers, columns, (3, 4))
    whole = {name: np.ascontiguousarray(np.broadcast_to(column, (3, 4))) for name, column in columns.items()}
    space: Any = SimpleNamespace(numbers=numbers)
    expected = FeatureSpace.encode_numbers(space, ("item_counts", "pair_counts"), whole)
    assert np.array_equal(values, expected[0]) and np.array_equal(buckets, expected[1])
    assert values.dtype == np.float32 and buckets.dtype == np.int64
