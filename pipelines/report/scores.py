"""The report's single read of the score table.

It takes bounded memory, and finds the distribution, each store's best listings and the top ten.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from camenn_model.evaluation.distribution import EDGES, decile_shares, histogram, population_stability_index
from pipelines.io import files
from pipelines.report.data import read_columns
from pipelines.runs.manifest import Manifest

TOP = 10
"""Ranks whose change from night to night is counted."""

_BATCH = 262_144


@dataclass(frozen=True, kw_only=True)
class ScoreDigest:
    """A summary of a score table.

    `histogram`: int64 [2802], counts by log-odds. `stores`: store_id, item_id, total (sum of cvr),
    rows. `top`: audience_id and item_id of the first `TOP` ranks.
    """

    rows: int
    mean: float
    histogram: np.ndarray
    stores: pd.DataFrame
    top: pd.DataFrame


@dataclass(frozen=True, kw_only=True)
class Drift:
    """Tonight's scores beside the previous night's.

    `psi`: population stability index over the previous night's deciles. `shares`: float64 [10],
    tonight's share of each decile. `changed` of `compared` top-ten places hold a listing that was
    not in the same audience row's top ten before.
    """

    mean: float
    previous_mean: float
    psi: float
    shares: np.ndarray
    changed: int
    compared: int

    @property
    def mean_change(self) -> float:
        """Return the relative change of the mean score.

        0.1 = 10 % higher.
        """
        return self.mean / self.previous_mean - 1 if self.previous_mean else 0.0


def read_scores(manifest: Manifest) -> Iterator[pa.Table]:
    """Yield a run's `scores`, a bounded piece at a time.

    They are without model_version.
    """
    for path in manifest.paths("scores"):
        with files.open_read(path) as handle:
            parquet = pq.ParquetFile(handle, pre_buffer=not files.is_local(path))
            for groups in _row_groups(parquet):
                for batch in parquet.iter_batches(_BATCH, groups, ["audience_id", "item_id", "cvr", "rank"]):
                    yield pa.Table.from_batches([batch])


def _row_groups(parquet: pq.ParquetFile) -> Iterator[list[int]]:
    """Yield row groups that have about `_BATCH` rows together.

    What is read of an object stays in memory until all of its row groups that were asked for are.
    """
    groups: list[int] = []
    rows = 0
    for group in range(parquet.num_row_groups):
        groups.append(group)
        rows += parquet.metadata.row_group(group).num_rows
        if rows >= _BATCH:
            yield groups
            groups, rows = [], 0
    if groups:
        yield groups


def digest_scores(manifest: Manifest, *, with_stores: bool) -> ScoreDigest:
    """Read a run's `scores` once.

    `with_stores` also adds up the scores by store and listing.

    Rows of audience ids that the run's `audience` table does not have count in the distribution,
    but in no store.
    """
    audience = (
        pa.concat_tables(read_columns(manifest.paths("audience"), ["audience_id", "store_id"]))
        if with_stores and manifest.paths("audience")
        else None
    )
    counts = np.zeros(len(EDGES) + 1, dtype=np.int64)
    rows, total = 0, 0.0
    sums: list[pa.Table] = []
    tops: list[pa.Table] = []
    for table in read_scores(manifest):
        cvr = table["cvr"].to_numpy().astype(np.float64)
        rows += len(cvr)
        total += float(cvr.sum())
        counts += histogram(cvr)
        tops.append(table.filter(pc.less_equal(table["rank"], TOP)).select(["audience_id", "item_id"]))
        if audience is not None:
            sums.append(_sum_by_store(table, audience))
    empty = pd.DataFrame({"store_id": [], "item_id": [], "total": [], "rows": []})
    stores = (
        pa.concat_tables(sums).group_by(["store_id", "item_id"]).aggregate([("total", "sum"), ("rows", "sum")])
        if sums
        else None
    )
    return ScoreDigest(
        rows=rows,
        mean=total / rows if rows else 0.0,
        histogram=counts,
        stores=empty if stores is None else stores.rename_columns(["store_id", "item_id", "total", "rows"]).to_pandas(),
        top=pa.concat_tables(tops).to_pandas() if tops else pd.DataFrame({"audience_id": [], "item_id": []}),
    )


def _sum_by_store(table: pa.Table, audience: pa.Table) -> pa.Table:
    place = pc.index_in(table["audience_id"], value_set=audience["audience_id"].combine_chunks())
    keyed = pa.table(
        {
            "store_id": audience["store_id"].combine_chunks().take(place),
            "item_id": table["item_id"],
            "cvr": table["cvr"],
        }
    )
    keyed = keyed.filter(pc.is_valid(keyed["store_id"]))
    summed = keyed.group_by(["store_id", "item_id"]).aggregate([("cvr", "sum"), ("cvr", "count")])
    return summed.rename_columns(["store_id", "item_id", "total", "rows"])


def top_by_store(digest: ScoreDigest, items: int) -> pd.DataFrame:
    """List each store's best listings.

    Columns are store_id, item_id, cvr (mean over the store's audience rows that have it), place
    from 1.

    They are ordered by the sum of cvr. Where every listing is scored for every audience row that is
    the order of the means. Where only the best of each row are published, a listing that made it
    once does not stand above one that always does.
    """
    frame = digest.stores.sort_values(["store_id", "total", "item_id"], ascending=[True, False, True])
    frame = frame.groupby("store_id", sort=False).head(items)
    return frame.assign(cvr=frame["total"] / frame["rows"], place=frame.groupby("store_id", sort=False).cumcount() + 1)


def compare_nights(now: ScoreDigest, before: ScoreDigest) -> Drift:
    """Measure tonight's drift from the previous night's scores."""
    shares = decile_shares(now.histogram, before.histogram)
    expected, found = decile_shares(before.histogram, before.histogram), shares
    audiences = set(now.top["audience_id"]) & set(before.top["audience_id"])
    kept = now.top[now.top["audience_id"].isin(audiences)]
    both = kept.merge(before.top, on=["audience_id", "item_id"])
    return Drift(
        mean=now.mean,
        previous_mean=before.mean,
        psi=population_stability_index(found, expected),
        shares=shares,
        changed=len(kept) - len(both),
        compared=len(kept),
    )
