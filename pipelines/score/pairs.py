"""Cut audience rows and listings into work to score.

The units are pairs, chunks and tiles.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from camenn_model.data.range_contents import GAP
from pipelines.features.time_index import Ints
from pipelines.runs.accounting import Count
from pipelines.score.joins import Join
from pipelines.score.snapshot import Log
from pipelines.score.tiles import Tile

TILE_ITEMS = 512
CHUNK_ROWS = 512


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Audience rows [first, last) and the listings that they meet."""

    audience: tuple[int, int]
    items: Ints


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """The pairs to score, and their features' sources."""

    score_date: str
    weekday: int
    items: pa.Table
    audience: pa.Table
    """Ordered by store and audience_id"""
    fields: pa.Table
    """What is known of each audience row's user, a column each"""
    log: Log
    candidates: Ints | None
    """Rows of (audience, item) that were requested, int64 [n, 2], None = all"""
    candidates_unknown: int
    chunks: list[Chunk]
    rejects: pa.Table
    counts: list[Count]
    joins: dict[str, Join]
    """Joins of the tables' ids, by the gate's name"""

    met: Ints
    """Number of listings that each audience row is scored against, int64 [S]"""

    @property
    def count(self) -> int:
        """Count the pairs that are computed."""
        return self.rows(0)

    def rows(self, top_k: int) -> int:
        """Count the rows that scores must have.

        Each audience row has the smaller of top_k (0 = all) and the number of listings it meets.
        """
        return int(np.minimum(self.met, top_k).sum() if top_k else self.met.sum())


def plan_chunks(audience: pa.Table, items: pa.Table, candidates: Ints | None) -> list[Chunk]:
    """Cut the audience into chunks that meet the same listings.

    The audience is ordered by store. The listings are their own store's, and those of no store.
    """
    item_store = items["store_id"].to_pandas()
    shared = item_store.isna().to_numpy()
    stores = audience["store_id"].to_pandas().to_numpy(dtype=object)
    edges = (
        np.flatnonzero(np.append(stores[1:] != stores[:-1], True)) + 1 if not shared.all() else np.array([len(stores)])
    )
    chunks = []
    start = 0
    for end in edges:
        mine = (
            np.flatnonzero(shared | (item_store == stores[start]).to_numpy(dtype=bool))
            if not shared.all()
            else np.arange(items.num_rows)
        )
        for first in range(start, int(end), CHUNK_ROWS):
            last = min(first + CHUNK_ROWS, int(end))
            met = mine
            if candidates is not None:
                asked = candidates[(candidates[:, 0] >= first) & (candidates[:, 0] < last), 1]
                met = np.intersect1d(mine, asked)
            if len(met):
                chunks.append(Chunk(audience=(first, last), items=met))
        start = int(end)
    return chunks


def cut_tiles(chunks: list[Chunk]) -> list[Tile]:
    """Cut the chunks into tiles.

    A tile has at most 512 listings × 512 audience rows.
    """
    return [
        Tile(number, chunk.audience, chunk.items[first : first + TILE_ITEMS].astype(np.int32).tobytes())
        for number, chunk in enumerate(chunks)
        for first in range(0, len(chunk.items), TILE_ITEMS)
    ]


def ranges_pay(chunks: list[Chunk], history: NDArray[np.int32], contents: Iterable[tuple[int, int]]) -> bool:
    """Return whether workers read contents by ranges.

    They do where all tiles together read less than half of the contents' bytes that way. A row costs
    a request too, which counts as the bytes that take as long. No tile costs more than all contents.

    Args:
        chunks: of the pairs to score.
        history: item rows of each audience row's history, [S, H], -1 = none.
        contents: (rows, bytes) of the photos, and of the titles.
    """
    tiles: list[int] = []
    for chunk in chunks:
        known = np.unique(history[slice(*chunk.audience)])
        # Wherever a tile is scored, the histories of its audience rows are read.
        heard, met = int((known >= 0).sum()), len(chunk.items)
        tiles += [heard + min(TILE_ITEMS, met - first) for first in range(0, met, TILE_ITEMS)]
    read, whole = 0.0, 0
    for rows, size in contents:
        whole += size
        read += sum(min(count * (size / rows + GAP), size) for count in tiles) if rows else 0
    return read < whole / 2


def listings_met(chunks: list[Chunk], candidates: Ints | None, audience_rows: int) -> Ints:
    """Count each audience row's listings to score, int64 [S]."""
    met = np.zeros(audience_rows, dtype=np.int64)
    for chunk in chunks:
        first, last = chunk.audience
        if candidates is None:
            met[first:last] = len(chunk.items)
        else:
            pairs = candidates[(candidates[:, 0] >= first) & (candidates[:, 0] < last)]
            pairs = pairs[np.isin(pairs[:, 1], chunk.items)]
            met[first:last] = np.bincount(pairs[:, 0] - first, minlength=last - first)
    return met
