"""Writer of the data directory: all of it or nothing."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from examples.complete_journey.log import HalfLog, conversion_rate, make_log
from examples.complete_journey.photos import assign_photos, fingerprint, read_photos
from examples.complete_journey.source import HALVES, Ints, Journey, package_version, read_journey
from schemas.catalog import CATALOG
from schemas.contract import Contract, conform
from schemas.errors import InputError
from schemas.events import CLICKS, ORDERS
from schemas.users import STORES, USERS

RECORD = "complete_journey.json"
"""In the data directory: what it was made from, and what came out."""
TIMEZONE = "America/New_York"
"""Of all stores: the zone of the times in the R package of the same log."""

Progress = Callable[[str], None]
"""Called with what is done next."""


@dataclass(frozen=True, kw_only=True)
class JourneySummary:
    """The summary of a data directory."""

    listings: int
    listings_with_photo: int
    clicks: int
    orders: int
    sessions: int
    users: int
    stores: int
    cvr: float
    """Share of clicks that a purchase of the same product by the same household follows within 24 hours."""


def catalog_table(products: pd.DataFrame, images: list[str | None]) -> pa.Table:
    """Make the table `catalog`.

    `images` has one path, or None, per product.
    """
    return pa.table(
        {
            "item_id": _ids(products["product_id"].to_numpy(np.int64)),
            "title": _texts(products["title"]),
            "category": _texts(products["department"]),
            "subcategory": _texts(products["product_category"]),
            "brand": _ids(products["manufacturer_id"].to_numpy(np.int64)),
            "price": pa.array(products["price"].to_numpy(np.float32)),
            "image_uri": pa.array(images, pa.string()),
        }
    )


def clicks_table(journey: Journey, log: HalfLog, half: str) -> pa.Table:
    """Make the table `clicks` of one half."""
    sessions = _ids(journey.basket[log.click_line])
    exposure = pa.array(np.char.add(f"{half}", np.arange(len(log.product)).astype("U8")))
    return pa.table(
        {
            "exposure_id": exposure,
            "session_id": sessions,
            "user_id": _ids(journey.household[log.click_line]),
            "store_id": _ids(journey.store[log.click_line]),
            "item_id": _ids(journey.products["product_id"].to_numpy(np.int64)[log.product]),
            "clicked_at": _times(log.second),
            "position": pa.array(log.position, pa.int64()),
        }
    )


def orders_table(journey: Journey, log: HalfLog) -> pa.Table:
    """Make the table `orders` of one half."""
    return pa.table(
        {
            "order_id": _ids(journey.basket[log.line]),
            "user_id": _ids(journey.household[log.line]),
            "store_id": _ids(journey.store[log.line]),
            "item_id": _ids(journey.products["product_id"].to_numpy(np.int64)[journey.product[log.line]]),
            "ordered_at": _times(journey.second[log.line]),
            "quantity": pa.array(journey.quantity[log.line]),
        }
    )


def users_table(households: pd.DataFrame) -> pa.Table:
    """Make the table `users`.

    It has the households whose demographics are known.
    """
    fields = {name: _texts(households[name]) for name in households.columns if name != "household_id"}
    return pa.table({"user_id": _ids(households["household_id"].to_numpy(np.int64)), **fields})


def stores_table(stores: Ints) -> pa.Table:
    """Make the table `stores` of these stores."""
    return pa.table({"store_id": _ids(stores), "timezone": pa.array([TIMEZONE] * len(stores))})


def _ids(numbers: Ints) -> pa.Array:
    return pa.array(numbers).cast(pa.string())


def _texts(column: "pd.Series[Any]") -> pa.Array:
    return pa.array(column, pa.string(), from_pandas=True)


def _times(seconds: Ints) -> pa.Array:
    return pa.array(seconds.astype("datetime64[s]").astype("datetime64[us]"))


def _write(out: Path, table: pa.Table, contract: Contract) -> int:
    file = out / f"{contract.name}.parquet"
    pq.write_table(conform(table, contract, str(file)).select(table.column_names), file, compression="zstd")
    return table.num_rows


def _write_journey(
    out: Path, households: str | None, seed: int, photos: dict[str, list[str]] | None, progress: Progress
) -> JourneySummary:
    progress("reading the purchases")
    journey = read_journey()
    images: list[str | None] = [None] * len(journey.products)
    if photos is not None:
        images = assign_photos(journey.products, photos, seed)
    halves = sorted(HALVES) if households is None else [households]
    logs = []
    for half in halves:
        progress(f"making the clicks of half {half}")
        logs.append(make_log(journey, half, seed))
    progress("writing the tables")
    lines = np.concatenate([log.line for log in logs])
    stores = np.unique(journey.store[lines])
    users = journey.households[journey.households["household_id"].isin(journey.household[lines])]
    clicks = [clicks_table(journey, log, half) for log, half in zip(logs, halves, strict=True)]
    rates = [conversion_rate(journey, log) for log in logs]
    return JourneySummary(
        listings=_write(out, catalog_table(journey.products, images), CATALOG),
        listings_with_photo=sum(image is not None for image in images),
        clicks=_write(out, pa.concat_tables(clicks), CLICKS),
        orders=_write(out, pa.concat_tables(orders_table(journey, log) for log in logs), ORDERS),
        sessions=len(np.unique(journey.basket[lines])),
        users=_write(out, users_table(users), USERS),
        stores=_write(out, stores_table(stores), STORES),
        cvr=np.average(rates, weights=[table.num_rows for table in clicks]).item(),
    )


def _settings(households: str | None, seed: int, photos: Path | None) -> dict[str, Any]:
    return {
        "package": package_version(),
        "households": households or "all",
        "seed": seed,
        "photos": None if photos is None else fingerprint(photos),
    }


def read_existing(out: Path, settings: dict[str, Any]) -> JourneySummary | None:
    """Read the summary of `out`, if it is this log's.

    None where `out` is absent or an empty folder.

    Raises:
        InputError: `out` holds something else, or the log with other settings.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    remedy = "choose another --out, or delete it yourself; nothing was changed"
    file = out / RECORD
    if not file.is_file():
        raise InputError(f"complete_journey: {out} exists and does not hold this log; {remedy}")
    try:
        record = json.loads(file.read_text())
        there, summary = dict(record["settings"]), JourneySummary(**record["summary"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"complete_journey: {file} cannot be read ({error}); {remedy}") from error
    other = [
        f"{name} is {there.get(name)}, requested {value}"
        for name, value in settings.items()
        if there.get(name) != value
    ]
    if other:
        raise InputError(f"complete_journey: {out} holds another log ({'; '.join(other)}); {remedy}")
    return summary


def make_data(
    out: Path, *, households: str | None, seed: int, photos: Path | None, progress: Progress
) -> tuple[JourneySummary, bool]:
    """Write the data directory `out` and return (summary, made).

    It is not made where `out` already holds this very log. An interrupted run leaves `out` as it
    was. `households` is a half, or None for both.

    Raises:
        InputError: the package is not installed, `photos` is no Grocery Store Dataset, or `out`
            holds something else.
    """
    found = None if photos is None else read_photos(photos)
    settings = _settings(households, seed, photos)
    existing = read_existing(out, settings)
    if existing is not None:
        return existing, False
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.parent / f".{out.name}.partial-{os.getpid()}"
    if partial.exists():
        # Left by a killed run that had this process id.
        shutil.rmtree(partial)
    partial.mkdir()
    try:
        summary = _write_journey(partial, households, seed, found, progress)
        record = {"settings": settings, "summary": asdict(summary)}
        (partial / RECORD).write_text(json.dumps(record, indent=2) + "\n")
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return summary, True
