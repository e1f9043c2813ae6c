"""A city of any size for measuring the pipelines.

It has the simulator's own catalog, people and logs, with a few unique bytes instead of each photo.

Drawing photos would take hours at 100,000 listings, and stub encoders never decode them.
"""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.io.files import write_json
from pipelines.score.audience import by_store
from schemas.catalog import CATALOG
from schemas.contract import conform
from schemas.events import CLICKS, ORDERS
from simulator import tables
from simulator.behaviour import simulate_days
from simulator.catalog import make_catalog
from simulator.classes import make_classes
from simulator.config import CityConfig
from simulator.people import make_users

LISTINGS_PER_STORE = 100
CLICKS_PER_USER = 17
DAYS = 28
PHOTO_BYTES = 256
FILES = 8
"""Number of files of each log, so that they can be read in parallel. A row group for each day."""
SKEW_ITEM, SKEW_USER = 0.30, 0.05
"""Shares of all clicks that fall on one listing and on one user"""
MADE = "city.json"
"""Written last: a directory without it is incomplete and is made again."""


def city_config(items: int, clicks: int, clicks_per_user: int = CLICKS_PER_USER, days: int = DAYS) -> CityConfig:
    """Return the sizes of the city.

    A store has a hundred listings, and a user about as many clicks as in the simulator's own city.
    """
    return CityConfig(
        seed=0,
        listings=items,
        clicks=clicks,
        stores=max(2, items // LISTINGS_PER_STORE),
        users=max(20, clicks // clicks_per_user),
        days=days,
    )


def make_city(
    directory: Path, items: int, clicks: int, pairs: int, clicks_per_user: int = CLICKS_PER_USER, days: int = DAYS
) -> dict[str, int]:
    """Write a city's tables and return its row counts.

    The tables are `catalog`, `clicks`, `orders`, `users`, `stores` and `audience`. An existing
    equal city is reused.

    `pairs` is the most pairs (audience row, listing) that scoring is to meet. The audience is whole
    stores, at every 4-hour bucket.
    """
    asked = {"items": items, "clicks": clicks, "pairs": pairs, "clicks_per_user": clicks_per_user, "days": days}
    record = directory / MADE
    if (there := _there(record, asked)) is not None:
        return there
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    config = city_config(items, clicks, clicks_per_user, days)
    catalog = make_catalog(make_classes(config), config)
    users = make_users(catalog.stores, config)
    rows = {
        "items": _write(directory / "catalog.parquet", _catalog(tables.catalog_table(catalog, config))),
        "users": _write(directory / "users.parquet", tables.users_table(users)),
        "stores": _write(directory / "stores.parquet", tables.stores_table(config)),
        "clicks": 0,
        "orders": 0,
    }
    audience = by_store(tables.stores_table(config)["store_id"].to_pylist())
    buckets = audience.num_rows // config.stores
    stores = min(config.stores, max(1, pairs // (buckets * items // config.stores)))
    rows["audience"] = _write(directory / "audience.parquet", audience.slice(0, stores * buckets))
    for name in ("clicks", "orders"):
        (directory / name).mkdir()
    writers: dict[str, pq.ParquetWriter] = {}
    for day in simulate_days(catalog, users, config):
        number = day.day * FILES // config.days
        logs = {
            "clicks": conform(tables.clicks_table(day.clicks, day.day, catalog, config), CLICKS, "clicks"),
            "orders": conform(tables.orders_table(day.orders, day.day, catalog, config), ORDERS, "orders"),
        }
        for name, table in logs.items():
            path = directory / name / f"part-{number}.parquet"
            if str(path) not in writers:
                writers[str(path)] = pq.ParquetWriter(path, table.schema, compression="zstd")
            writers[str(path)].write_table(table)
            rows[name] += table.num_rows
        print(f"city: day {day.day + 1} of {config.days}, {rows['clicks']:,} clicks", file=sys.stderr, flush=True)
    for writer in writers.values():
        writer.close()
    _record(record, asked, rows)
    return rows


def multiply_city(source: Path, target: Path, copies: int) -> dict[str, int]:
    """Write `target` with copies of the people of `source`.

    `target` has the same catalog and stores, and `copies` times the people and logs of `source`,
    under ids of their own. Returns its row counts.

    Simulating ten million clicks takes more than an hour. Users of a copy behave as those of the
    original, which does not affect the cost.
    """
    asked = {"copies": copies, "of": json.loads((source / MADE).read_text())["asked"]}
    record = target / MADE
    if (there := _there(record, asked)) is not None:
        return there
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    rows = {}
    for name in ("catalog", "stores"):
        os.link(source / f"{name}.parquet", target / f"{name}.parquet")
        rows[name] = pq.ParquetFile(target / f"{name}.parquet").metadata.num_rows
    for name in ("users", "clicks", "orders"):
        files = sorted((source / name).glob("*.parquet")) or [source / f"{name}.parquet"]
        (target / name).mkdir()
        for number, path in enumerate(files):
            for copy in range(copies):
                table = pq.ParquetFile(path).read()
                for column in ("user_id", "session_id", "exposure_id", "order_id"):
                    if column in table.column_names:
                        renamed = pc.binary_join_element_wise(table[column], str(copy), ".")
                        table = table.set_column(table.column_names.index(column), column, renamed)
                rows[name] = rows.get(name, 0) + table.num_rows
                pq.write_table(
                    table, target / name / f"part-{number}-{copy}.parquet", compression="zstd", row_group_size=65_536
                )
    _record(record, asked, rows)
    return rows


def skew_city(source: Path, target: Path) -> dict[str, int]:
    """Write `target`: `source` with skewed clicks.

    One listing has 30 % of all clicks and one user 5 %. Returns its row counts.
    """
    asked = {"skewed": json.loads((source / MADE).read_text())["asked"]}
    record = target / MADE
    if (there := _there(record, asked)) is not None:
        return there
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, copy_function=os.link)
    record.unlink()
    rng = np.random.default_rng(0)
    first = pq.ParquetFile(min((source / "clicks").glob("*.parquet"))).read_row_group(0)
    for path in sorted((target / "clicks").glob("*.parquet")):
        table = pq.ParquetFile(path).read()
        for share, columns in ((SKEW_ITEM, ("item_id", "store_id")), (SKEW_USER, ("user_id",))):
            taken = pa.array(rng.random(table.num_rows) < share)
            for name in columns:
                changed = pc.if_else(taken, first[name][0], table[name])
                table = table.set_column(table.column_names.index(name), name, changed)
        path.unlink()  # It is the source's own file.
        pq.write_table(table, path, compression="zstd", row_group_size=65_536)
    rows = dict(json.loads((source / MADE).read_text())["rows"])
    _record(record, asked, rows)
    return rows


def _record(path: Path, asked: dict[str, Any], rows: dict[str, int]) -> None:
    """Record that a city is whole."""
    write_json(str(path), {"asked": asked, "rows": rows})


def _there(path: Path, asked: dict[str, Any]) -> dict[str, int] | None:
    """Return the row counts of this very city.

    They are None where it was not made before.
    """
    if not path.exists():
        return None
    there = json.loads(path.read_text())
    return dict(there["rows"]) if there["asked"] == asked else None


def _catalog(table: pa.Table) -> pa.Table:
    """Return the catalog with unique bytes instead of paths.

    The bytes resemble a photo's, but are fewer.
    """
    photos = [f"{item}-".encode() * (PHOTO_BYTES // (len(item) + 1)) for item in table["item_id"].to_pylist()]
    return conform(
        table.drop_columns(["image_uri"])
        .append_column("image_uri", pa.nulls(table.num_rows, pa.string()))
        .append_column("image_bytes", pa.array(photos, pa.binary())),
        CATALOG,
        "catalog",
    )


def _write(path: Path, table: pa.Table) -> int:
    pq.write_table(table, path, compression="zstd", row_group_size=8_192)
    return table.num_rows
