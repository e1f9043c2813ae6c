"""The report's look at single listings and stores.

It shows when a listing sells, the facts about its photo and title, and a store's figures.
"""

from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.report.data import Work, read_columns
from pipelines.report.labels import FLAG_WORDS
from pipelines.report.scores import ScoreDigest, read_scores


@dataclass(frozen=True, kw_only=True)
class Hour:
    """A listing's mean predicted rate in one hour.

    It is for the audience rows of that hour. `share` is of its best hour's.
    """

    label: str
    cvr: float
    share: float


@dataclass(frozen=True, kw_only=True)
class Detail:
    """The details that a listing's card opens to.

    `best_rank`: its highest place in any audience row. `facts`: (name, value) pairs.
    """

    rows: int
    mean: float
    best_rank: int
    hours: list[Hour] = field(default_factory=list)
    facts: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class StoreFigures:
    """A store's figures.

    They are listings scored, their mean predicted rate over that of all stores less one, and
    listings to fix (None = not known).
    """

    listings: int
    mean: float
    against_all: float
    flagged: int | None


def read_details(work: Work, wanted: set[str]) -> dict[str, Detail]:
    """Read details of scored listings, by item id.

    Listings without scores are left out. The scores are read once more, and only these rows are
    kept.
    """
    manifest = work.manifests.get("score")
    if manifest is None or not manifest.paths("audience") or not wanted:
        return {}
    ids = pa.array(sorted(wanted), pa.string())
    audience = pa.concat_tables(read_columns(manifest.paths("audience"), ["audience_id", "hour"])).combine_chunks()
    pieces = [table.filter(pc.is_in(table["item_id"], value_set=ids)) for table in read_scores(manifest)]
    if not pieces:
        return {}
    rows = pa.concat_tables(pieces)
    place = pc.index_in(rows["audience_id"], value_set=audience["audience_id"].combine_chunks())
    frame = pd.DataFrame(
        {
            "item_id": rows["item_id"].to_numpy(zero_copy_only=False),
            "cvr": rows["cvr"].to_numpy().astype(float),
            "rank": rows["rank"].to_numpy(),
            "hour": audience["hour"].combine_chunks().take(place).to_numpy(zero_copy_only=False),
        }
    )
    facts = _facts(manifest.paths("listing_quality"), ids)
    return {
        str(item_id): Detail(
            rows=len(own),
            mean=float(own["cvr"].mean()),
            best_rank=int(own["rank"].min()),
            hours=_hours(own),
            facts=facts.get(str(item_id), []),
        )
        for item_id, own in frame.groupby("item_id")
    }


def _hours(own: pd.DataFrame) -> list[Hour]:
    """Compute mean rates by hour.

    They are given where the audience has hours and more than one of them.
    """
    means = own.dropna(subset="hour").groupby("hour")["cvr"].mean()
    if len(means) < 2:
        return []
    top = float(means.max())
    return [
        Hour(label=f"{int(hour)} h", cvr=float(cvr), share=float(cvr) / top if top else 0.0)
        for hour, cvr in means.items()
    ]


def _facts(paths: list[str], ids: pa.Array) -> dict[str, list[tuple[str, str]]]:
    found = {}
    names = ["item_id", "ita", "tia", "mismatch_percentile", "flags", "clicks", "orders", "lost_orders"]
    for table in read_columns(paths, names):
        for row in table.filter(pc.is_in(table["item_id"], value_set=ids)).to_pylist():
            found[row["item_id"]] = _words(row)
    return found


def _words(row: dict[str, Any]) -> list[tuple[str, str]]:
    facts = [("28 days", f"{row['orders']:,} orders of {row['clicks']:,} clicks")]
    if row["ita"] is not None:
        facts.append(("title belongs to photo", f"{row['ita']:.2f}"))
        facts.append(("photo belongs to title", f"{row['tia']:.2f}"))
    if row["mismatch_percentile"] is not None:
        facts.append(("fits better than", f"{1 - row['mismatch_percentile']:.0%} of listings"))
    if row["flags"]:
        facts.append(("to fix", ", ".join(FLAG_WORDS.get(flag, flag) for flag in row["flags"])))
        facts.append(("orders lost", f"{row['lost_orders']:.1f}"))
    return facts


def store_figures(work: Work, digest: ScoreDigest, names: list[str]) -> dict[str, StoreFigures]:
    """Compute figures of some stores, by store id."""
    every = digest.stores["total"].sum() / max(digest.stores["rows"].sum(), 1)
    flagged = _flagged_by_store(work)
    found = {}
    chosen = digest.stores[digest.stores["store_id"].isin(names)]
    for store_id, own in chosen.groupby("store_id"):
        mean = float(own["total"].sum() / own["rows"].sum())
        found[str(store_id)] = StoreFigures(
            listings=len(own),
            mean=mean,
            against_all=mean / every - 1 if every else 0.0,
            flagged=None if flagged is None else flagged.get(str(store_id), 0),
        )
    return found


def _flagged_by_store(work: Work) -> dict[str, int] | None:
    """Count each store's listings to fix.

    It is None where the catalog names no stores or quality is not known.
    """
    manifest = work.manifests.get("score")
    if manifest is None or not manifest.paths("listing_quality") or not manifest.paths("items"):
        return None
    items = pa.concat_tables(read_columns(manifest.paths("items"), ["item_id", "store_id"]))
    names, owners = items["item_id"].combine_chunks(), items["store_id"].combine_chunks()
    if owners.null_count == len(owners):
        return None
    counts: dict[str, int] = {}
    for table in read_columns(manifest.paths("listing_quality"), ["item_id", "flags"]):
        marked = table.filter(pc.greater(pc.list_value_length(table["flags"]), 0))
        stores = owners.take(pc.index_in(marked["item_id"].combine_chunks(), value_set=names))
        for entry in pc.value_counts(stores.drop_null()).to_pylist():
            counts[entry["values"]] = counts.get(entry["values"], 0) + entry["counts"]
    return counts
