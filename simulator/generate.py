"""Writer of a city to a data directory.

It writes all of it or nothing, and equal files from equal configurations.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from schemas.catalog import CATALOG
from schemas.contract import Contract, conform
from schemas.errors import InputError
from schemas.events import CLICKS, ORDERS
from schemas.users import STORES, USERS
from simulator import tables
from simulator.behaviour import simulate_days
from simulator.catalog import Catalog, make_catalog
from simulator.classes import make_classes
from simulator.config import CityConfig
from simulator.people import Users, make_users
from simulator.photos import write_photos
from simulator.truth import ClickTerms, Draws, expected_ladder

LADDER_DRAWS, LADDER_CLICKS = 64, 40_000
_CLICKS_AT_ONCE = 2_000

Progress = Callable[[str, int, int], None]
"""Called with (what is counted, done, total)."""


@dataclass(frozen=True, kw_only=True)
class CitySummary:
    """The summary of a generated city.

    `rows`: of the data tables together, without the truth.
    """

    rows: int
    listings: int
    clicks: int
    orders: int
    users: int
    stores: int
    photos: int
    exposures: int
    ctr: float
    cvr: float
    """Share of clicks that were followed by an order, ever."""


class _Table:
    """A Parquet file that grows by tables.

    Its schema is the first one's, or its contract's.
    """

    def __init__(self, path: Path, contract: Contract | None = None) -> None:
        self.path, self.contract = path, contract
        self.rows = 0
        self._writer: pq.ParquetWriter | None = None

    def append(self, table: pa.Table) -> None:
        """Write `table` as a row group.

        It is checked against the contract. Optional columns that it lacks are left out.
        """
        if self.contract is not None:
            table = conform(table, self.contract, str(self.path)).select(table.column_names)
        if self._writer is None:
            self._writer = pq.ParquetWriter(self.path, table.schema, compression="zstd")
        self._writer.write_table(table)
        self.rows += table.num_rows

    def close(self) -> int:
        """Finish the file and return its rows."""
        if self._writer is not None:
            self._writer.close()
        return self.rows


def _write(path: Path, table: pa.Table, contract: Contract | None = None) -> int:
    file = _Table(path, contract)
    file.append(table)
    return file.close()


def _write_logs(
    out: Path, catalog: Catalog, users: Users, config: CityConfig, progress: Progress | None
) -> tuple[int, int, int]:
    """Write the logs, one day in memory at a time.

    Returns (exposures, clicks, order lines).
    """
    clicks_file = _Table(out / "clicks.parquet", CLICKS)
    orders_file = _Table(out / "orders.parquet", ORDERS)
    truth_file = _Table(out / "truth" / "clicks.parquet")
    exposures = 0
    for day in simulate_days(catalog, users, config):
        exposures += day.exposures
        clicks = tables.clicks_table(day.clicks, day.day, catalog, config)
        clicks_file.append(clicks)
        truth_file.append(tables.truth_clicks_table(day.clicks, day.day, clicks, catalog, config))
        orders_file.append(tables.orders_table(day.orders, day.day, catalog, config))
        if progress is not None:
            progress("days", day.day + 1, config.days)
    truth_file.close()
    return exposures, clicks_file.close(), orders_file.close()


def draw_listings(
    user: np.ndarray, store: np.ndarray, catalog: Catalog, users: Users, config: CityConfig, draws: int = LADDER_DRAWS
) -> Draws:
    """Draw `draws` listings of its store for each click.

    They are drawn uniformly, with the terms that they have for the click's user. User and store are
    int64 [n].
    """
    rng = np.random.default_rng([config.seed, 7])
    listings = catalog.listings
    by_store = np.argsort(listings.store, kind="stable")
    first = np.searchsorted(listings.store[by_store], np.arange(config.stores + 1))
    low, high = first[store][:, None], first[store + 1][:, None]
    drawn = by_store[(low + rng.random((len(store), draws)) * (high - low)).astype(np.int64)]
    visual, text = np.empty(drawn.shape), np.empty(drawn.shape)
    for start in range(0, len(drawn), _CLICKS_AT_ONCE):
        rows = slice(start, start + _CLICKS_AT_ONCE)
        visual[rows] = np.einsum("nk,ndk->nd", users.visual_taste[user[rows]], listings.visual[drawn[rows]]) / 2.0
        text[rows] = np.einsum("nk,ndk->nd", users.text_taste[user[rows]], listings.text[drawn[rows]]) / np.sqrt(6.0)
    return Draws(
        config.content_weight * visual,
        config.content_weight * text,
        listings.image_ok[drawn],
        listings.text_ok[drawn],
        listings.mismatched[drawn],
    )


def ladder_of(out: Path, catalog: Catalog, users: Users, config: CityConfig) -> dict[str, dict[str, float]]:
    """Compute expected AUC ladders of the clicks written to `out`.

    There is one ladder of all clicks, one of the test days', and one of their uniform sessions'.

    At most `LADDER_CLICKS` clicks of each are taken, drawn uniformly: the expected AUC of so many
    varies by less than 0.001. Strata in which it is not defined (too few clicks) are left out.
    """
    names = [*ClickTerms._fields, "test", "uniform"]
    truth = pq.read_table(out / "truth" / "clicks.parquet", columns=names)
    columns = {name: truth[name].to_numpy() for name in names}
    clicks = pq.read_table(out / "clicks.parquet", columns=["user_id", "store_id"])
    user, store = (
        pc.index_in(clicks[name], value_set=ids(np.arange(count))).to_numpy().astype(np.int64)
        for name, ids, count in (
            ("user_id", tables.user_ids, config.users),
            ("store_id", tables.store_ids, config.stores),
        )
    )
    test = columns["test"]
    strata = {"all": test | True, "test": test, "test_uniform": test & columns["uniform"]}
    found = {}
    for name, chosen in strata.items():
        rows = np.flatnonzero(chosen)
        if len(rows) < 100:
            continue
        if len(rows) > LADDER_CLICKS:
            rows = np.sort(np.random.default_rng([config.seed, 8]).choice(rows, LADDER_CLICKS, replace=False))
        terms = ClickTerms(*(columns[field][rows] for field in ClickTerms._fields))
        draws = draw_listings(user[rows], store[rows], catalog, users, config)
        found[name] = expected_ladder(terms, draws, config)
    return found


def _write_city(out: Path, config: CityConfig, progress: Progress | None) -> CitySummary:
    classes = make_classes(config)
    catalog = make_catalog(classes, config)
    users = make_users(catalog.stores, config)
    truth = out / "truth"
    truth.mkdir(parents=True)

    def photo_progress(done: int, total: int) -> None:
        if progress is not None:
            progress("photos", done, total)

    photos = write_photos(catalog.bank, classes, config, out, photo_progress)
    listings = _write(out / "catalog.parquet", tables.catalog_table(catalog, config), CATALOG)
    user_rows = _write(out / "users.parquet", tables.users_table(users), USERS)
    stores = _write(out / "stores.parquet", tables.stores_table(config), STORES)
    exposures, clicks, orders = _write_logs(out, catalog, users, config, progress)
    _write(truth / "listings.parquet", tables.truth_listings_table(catalog, config))
    _write(truth / "photos.parquet", tables.truth_photos_table(catalog))
    _write(truth / "classes.parquet", tables.truth_classes_table(catalog))
    _write(truth / "stores.parquet", tables.truth_stores_table(catalog, config))
    _write(truth / "users.parquet", tables.truth_users_table(users))
    (truth / "ladder.json").write_text(json.dumps(ladder_of(out, catalog, users, config), indent=2) + "\n")
    ordered = pq.read_table(truth / "clicks.parquet", columns=["ordered"])["ordered"]
    summary = CitySummary(
        rows=listings + user_rows + stores + clicks + orders,
        listings=listings,
        clicks=clicks,
        orders=orders,
        users=user_rows,
        stores=stores,
        photos=photos,
        exposures=exposures,
        ctr=clicks / exposures,
        cvr=ordered.to_numpy().mean().item(),
    )
    (truth / "summary.json").write_text(json.dumps(asdict(summary), indent=2) + "\n")
    (truth / "config.json").write_text(json.dumps(config_record(config), indent=2) + "\n")
    return summary


def config_record(config: CityConfig) -> dict[str, Any]:
    """Return the identity of a city.

    It consists of the configuration, and names and sizes of the photos it reads.

    Raises:
        InputError: the photo folder cannot be used.
    """
    record = config.to_json()
    if config.photo_folder is not None:
        files = [f"{path} {path.stat().st_size}" for c in make_classes(config) for path in c.files]
        record["photo_files"] = hashlib.sha256("\n".join(files).encode()).hexdigest()
    return record


def read_existing(out: Path, config: CityConfig) -> CitySummary | None:
    """Read the summary of the city in `out`.

    It is the city that `out` already holds, or None where `out` is absent or an empty folder.

    Raises:
        InputError: `out` holds something else, or a city of another configuration (naming what
            differs).
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    remedy = "choose another --out, or delete it yourself; nothing was changed"
    config_file, summary_file = out / "truth" / "config.json", out / "truth" / "summary.json"
    if not (config_file.is_file() and summary_file.is_file()):
        raise InputError(f"simulate: {out} exists and does not hold a simulated city; {remedy}")
    try:
        there: dict[str, Any] = json.loads(config_file.read_text())
        summary = CitySummary(**json.loads(summary_file.read_text()))
    except (json.JSONDecodeError, TypeError) as error:
        raise InputError(f"simulate: {config_file} or {summary_file} cannot be read ({error}); {remedy}") from error
    asked = config_record(config)
    other = [
        f"{name} is {there.get(name)}, requested {asked.get(name)}"
        for name in sorted({*there, *asked})
        if there.get(name) != asked.get(name)
    ]
    if other:
        raise InputError(f"simulate: {out} holds another city ({'; '.join(other[:4])}); {remedy}")
    return summary


def generate_city(out: Path, config: CityConfig, progress: Progress | None = None) -> tuple[CitySummary, bool]:
    """Write the city to `out`.

    Returns (summary, made). It is not made where `out` already holds this very city.

    Everything is written to a hidden folder next to `out`, which takes its place when complete: an
    interrupted run leaves `out` as it was.

    Raises:
        InputError: `out` holds something else, a configuration is impossible, or a photo folder is
            unreadable.
    """
    existing = read_existing(out, config)
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
        summary = _write_city(partial, config, progress)
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return summary, True
