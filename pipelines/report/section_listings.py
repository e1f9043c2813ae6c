"""The report's sections with photos.

They are retrieval, listings to fix, and top items by store.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd
import pyarrow.compute as pc

from pipelines.report.data import Item, Work, read_columns
from pipelines.report.labels import FLAG_WORDS
from pipelines.report.listing_details import Detail
from pipelines.report.photos import Photo
from pipelines.report.scores import ScoreDigest, top_by_store

QUERIES_PER_DIRECTION = 6
FLAGGED = 24
FLAGGED_COLUMNS = ["item_id", "mismatch", "flags", "clicks", "orders", "lost_orders"]
STORES_WITH_PHOTOS = 24
STORES_LISTED = 300
ITEMS_PER_STORE = 6
NAMES_PER_STORE = 3


@dataclass(frozen=True, kw_only=True)
class Card:
    """A listing as the page shows it.

    `note` and `good` depend on the section: a figure, and whether to mark it as right.
    """

    item: Item
    photo: Photo
    note: str = ""
    good: bool | None = None
    reasons: list[str] = field(default_factory=list)
    activity: str = ""
    detail: Detail | None = None


@dataclass(frozen=True, kw_only=True)
class Query:
    """One retrieval query with its answers."""

    direction: str
    card: Card
    results: list[Card]


@dataclass(frozen=True, kw_only=True)
class Store:
    """One store's best listings."""

    store_id: str
    cards: list[Card]


def retrieval_ids(work: Work) -> set[str]:
    """List the listings that the retrieval section shows."""
    return {
        name
        for query in _chosen_queries(work)
        for name in (query["item_id"], *(result["item_id"] for result in query["results"]))
    }


def _chosen_queries(work: Work) -> list[dict[str, Any]]:
    chosen = []
    for direction in ("image_to_text", "text_to_image"):
        chosen += [query for query in work.retrieval or [] if query["direction"] == direction][:QUERIES_PER_DIRECTION]
    return chosen


def retrieval(work: Work, card: Callable[..., Card]) -> list[Query]:
    """Show the retrieval queries with photos."""
    return [
        Query(
            direction=query["direction"],
            card=card(query["item_id"]),
            results=[
                card(result["item_id"], note=f"{result['cosine']:.2f}", good=bool(result["same_product"]))
                for result in query["results"][:5]
            ],
        )
        for query in _chosen_queries(work)
    ]


def read_flagged(work: Work) -> tuple[pd.DataFrame, dict[str, int], int] | None:
    """Read the flagged listings, those that lost most first.

    Returned are the flagged listings (item_id, mismatch, flags, clicks, orders, lost_orders),
    listings by flag, and all listings. It is None without scores.
    """
    manifest = work.manifests.get("score")
    if manifest is None or not manifest.paths("listing_quality"):
        return None
    counts: dict[str, int] = {}
    worst: list[pd.DataFrame] = []
    listings = 0
    for table in read_columns(manifest.paths("listing_quality"), FLAGGED_COLUMNS):
        listings += table.num_rows
        flags = table["flags"].combine_chunks()
        for entry in pc.value_counts(pc.list_flatten(flags)).to_pylist():
            counts[entry["values"]] = counts.get(entry["values"], 0) + entry["counts"]
        frame = table.filter(pc.greater(pc.list_value_length(table["flags"]), 0)).to_pandas()
        # Listings that merely lack a photo or a title are left out: whoever listed them knows.
        frame = frame[[not {"no_image", "no_text"} >= set(names) for names in frame["flags"]]]
        worst.append(_worst(frame))
    frame = _worst(pd.concat(worst))
    return frame, dict(sorted(counts.items(), key=lambda pair: -pair[1])), listings


def _worst(frame: pd.DataFrame) -> pd.DataFrame:
    """Select the first listings by lost orders.

    Those that lost none are ordered by mismatch.
    """
    return frame.sort_values(
        ["lost_orders", "mismatch", "item_id"], ascending=[False, False, True], ignore_index=True
    ).head(FLAGGED)


def flagged_cards(frame: pd.DataFrame, card: Callable[..., Card]) -> list[Card]:
    """Make the cards of flagged listings.

    They show what the listings lost, and why they are flagged.
    """
    found = []
    for row in frame.to_dict("records"):
        reasons = [FLAG_WORDS.get(flag, flag) for flag in row["flags"]]
        if "mismatch" in row["flags"]:
            reasons[list(row["flags"]).index("mismatch")] += f" ({row['mismatch']:.2f})"
        lost = f"−{row['lost_orders']:.1f} orders" if row["lost_orders"] >= 0.05 else "no orders lost"
        made = card(row["item_id"], note=lost, good=False)
        found.append(
            replace(made, reasons=reasons, activity=f"{row['orders']:,} orders of {row['clicks']:,} clicks in 28 days")
        )
    return found


def choose_stores(digest: ScoreDigest) -> tuple[pd.DataFrame, list[str], list[str]]:
    """Choose the stores to show.

    Returns the best listings of all stores, the stores shown with photos (those with the most
    scored pairs), and the stores only listed.
    """
    best = top_by_store(digest, ITEMS_PER_STORE)
    pairs = digest.stores.groupby("store_id")["rows"].sum().sort_index().sort_values(ascending=False, kind="stable")
    with_photos = sorted(pairs.index[:STORES_WITH_PHOTOS])
    return best, with_photos, sorted(pairs.index[STORES_WITH_PHOTOS : STORES_WITH_PHOTOS + STORES_LISTED])


def stores(best: pd.DataFrame, names: list[str], items: int, card: Callable[..., Card]) -> list[Store]:
    """List the first `items` listings of some stores."""
    groups = dict(list(best[best["place"] <= items].groupby("store_id")))
    return [
        Store(
            store_id=name,
            cards=[
                card(item, note=f"{cvr:.1%}")
                for item, cvr in zip(groups[name]["item_id"], groups[name]["cvr"], strict=True)
            ],
        )
        for name in names
    ]
