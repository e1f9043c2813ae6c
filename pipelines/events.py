"""Cleaning of the click and order logs: every row in gets exactly one outcome."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import apache_beam as beam
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from camenn_model.hashing import stable_hash
from pipelines import files
from pipelines.manifest import Count
from pipelines.tables import Slice, Source, drop_nulls, make_rejects
from schemas.contract import Contract, conform
from schemas.events import CLICKS
from schemas.rejects import REJECTS


class CleanEvents(beam.DoFn):
    """(Slice, rows) → rows without nulls where a value is required; rejects and counts beside."""

    def __init__(self, stage: str, contract: Contract) -> None:
        self.stage = stage
        self.contract = contract

    def process(self, element: tuple[Slice, pa.Table]) -> Iterator[Any]:
        where, table = element
        kept, rejects = drop_nulls(self.stage, where, table.select(self.contract.names), self.contract)
        yield kept
        yield beam.pvalue.TaggedOutput("counts", Count(self.contract.name, "in", table.num_rows))
        yield beam.pvalue.TaggedOutput("counts", Count(self.contract.name, "rejected", rejects.num_rows))
        if rejects.num_rows:
            yield beam.pvalue.TaggedOutput("rejects", rejects)


def clean_log(stage: str, contract: Contract, table: pa.Table) -> tuple[pd.DataFrame, pa.Table, int]:
    """Collapse exact copies of events: (frame ordered by time and key, rejects, number of copies).

    Of a user's clicks that share an exposure_id and differ, the first by time and values stays and the others are rejects; those of two users are
    not compared, as users are read in buckets and the answer must not depend on which share one. Times become int64 microseconds.
    """
    time = "clicked_at" if contract is CLICKS else "ordered_at"
    table = table.set_column(table.column_names.index(time), time, table[time].cast(pa.int64()))
    table = table.take(pa.array(np.argsort(table[time].to_numpy(), kind="stable"))).combine_chunks()
    frame = table.to_pandas(types_mapper={pa.string(): pd.StringDtype("pyarrow")}.get)
    # Only events of one moment can be copies, and only they need the rest of the order.
    moments = frame[time].to_numpy()
    same = moments[1:] == moments[:-1]
    tied = np.flatnonzero(np.append(same, False) | np.append(False, same))
    copies = np.zeros(len(frame), dtype=bool)
    if len(tied):
        order = [time, *contract.key, *(name for name in contract.names if name not in (time, *contract.key))]
        ordered = frame.iloc[tied].sort_values(order, kind="stable")
        copies[tied] = ordered.duplicated().to_numpy()
        places = np.arange(len(frame))
        places[tied] = ordered.index.to_numpy()
        frame = frame.iloc[places[~copies]].reset_index(drop=True)
    rejects = REJECTS.schema.empty_table()
    if contract is CLICKS and len(np.unique(stable_hash(table["exposure_id"]))) < len(frame):
        again = frame.duplicated(["user_id", "exposure_id"]).to_numpy()
        if again.any():
            ids = frame.loc[again, "exposure_id"].tolist()
            items = frame.loc[again, "item_id"].tolist()
            details = [
                f"table 'clicks': column 'exposure_id': '{exposure}' (item_id '{item}') stands on another, different click. Give each exposure its own id."
                for exposure, item in zip(ids, items, strict=True)
            ]
            rejects = make_rejects(stage, [f"clicks:{exposure}" for exposure in ids], "duplicate_exposure_id", details)
            frame = frame[~again].reset_index(drop=True)
    return frame, rejects, int(copies.sum())


@dataclass
class Outcomes:
    """Counts the rows of one table out of the door, exclusion by exclusion."""

    table: str
    counts: list[Count]

    def keep(self, frame: pd.DataFrame, mask: np.ndarray, exclusion: str) -> pd.DataFrame:
        """Rows where `mask` holds; the others are counted under `exclusion`."""
        lost = int(len(mask) - mask.sum())
        if lost:
            self.counts.append(Count(self.table, exclusion, lost))
            return frame[mask].reset_index(drop=True)
        return frame


def item_codes(ids: pd.Series, known: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """Row of each id in `known`, int64 [n]; -1 = not there."""
    if len(ids) == 0:
        return np.zeros(0, dtype=np.int64)
    found = pc.index_in(
        pa.Array.from_pandas(ids, type=pa.string()),
        value_set=known.combine_chunks() if isinstance(known, pa.ChunkedArray) else known,
    )
    return pc.fill_null(found, -1).to_numpy(zero_copy_only=False).astype(np.int64)


def usable_orders(orders: pd.DataFrame, known: pa.ChunkedArray, as_of: int, outcomes: Outcomes) -> pd.DataFrame:
    """Orders that feed labels and counts, with their `item` code: known by `as_of`, of a listing of the catalog, not returned."""
    orders = outcomes.keep(orders, (orders["ordered_at"] <= as_of).to_numpy(dtype=bool), "after_as_of")
    orders = outcomes.keep(orders, (orders["quantity"] > 0).to_numpy(dtype=bool), "returns")
    orders = orders.assign(item=item_codes(orders["item_id"], known))
    return outcomes.keep(orders, (orders["item"] >= 0).to_numpy(dtype=bool), "unknown_item")


def usable_clicks(clicks: pd.DataFrame, known: pa.ChunkedArray, as_of: int, outcomes: Outcomes) -> pd.DataFrame:
    """Clicks that feed counts and examples, with their `item` code and the start of their session (its first click, `session_start`)."""
    clicks = outcomes.keep(clicks, (clicks["clicked_at"] <= as_of).to_numpy(dtype=bool), "after_as_of")
    # The session starts at its first click, whether or not the catalog knows that click's listing.
    start = clicks.groupby(["user_id", "session_id"], sort=False)["clicked_at"].transform("min")
    clicks = clicks.assign(session_start=start.astype("int64"), item=item_codes(clicks["item_id"], known))
    return outcomes.keep(clicks, (clicks["item"] >= 0).to_numpy(dtype=bool), "unknown_item")


def read_times(source: Source, column: str) -> np.ndarray:
    """One time column of a log, int64 microseconds, nulls left out: eight bytes a row in the submitting process.

    Raises:
        InputError: times finer than microseconds.
    """
    pieces = []
    for path in source.files:
        with files.open_read(path) as handle:
            times = pq.read_table(handle, columns=[column])
        times = conform(
            times, replace(source.contract, columns=tuple(c for c in source.contract.columns if c.name == column)), path
        )[column]
        pieces.append(pc.drop_null(times).cast(pa.int64()).to_numpy())
    return np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.int64)
