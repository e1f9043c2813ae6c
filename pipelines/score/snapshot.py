"""The as-of features at the score's own time.

They are the features of every listing, and of every user, store and pair with events.

Training's functions build them, with the score's time as every query's time. Pairs without events
are not stored: they get the values of a query without events (no counts, no last time). The
snapshot is written once per run and read by every worker.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines.features.as_of import (
    Events,
    Floats,
    ItemAttributes,
    Queries,
    item_features,
    pair_features,
    user_features,
)
from pipelines.features.attribution import attribute_orders
from pipelines.features.history import user_history
from pipelines.features.time_index import DAY_US, NEVER, Ints
from pipelines.inputs.logs import CleanLog, clean_log, drop_impossible, share_codes, usable_clicks, usable_orders
from pipelines.io import files
from pipelines.io.clock import latest_time
from pipelines.io.tables import Source, list_slices, read_slice
from pipelines.runs.accounting import Count, Outcomes
from schemas.contract import Contract
from schemas.training import AUDIENCE_COUNTS, ITEM_COUNTS

STORE_ITEM = ("store_item_clicks", "store_item_orders")
ITEM = tuple(column.name for column in ITEM_COUNTS if column.name not in STORE_ITEM)
PAIR = ("pair_clicks", "pair_orders", "pair_days_since_click", "pair_days_since_order")
USER_SUBCATEGORY = ("user_subcategory_clicks", "user_subcategory_orders")
USER_BRAND = ("user_brand_orders",)
ACTIVE_DAYS = 28


def empty_value(name: str) -> float:
    """Return a feature's value without any event.

    The value is a count of 0, or NaN for the time since an event.
    """
    return np.nan if "days_since" in name else 0.0


@dataclass(frozen=True)
class Sparse:
    """Feature columns of key pairs that have events.

    The key pairs are (left, right), ordered by key.
    """

    key: Ints
    size: int
    columns: dict[str, Floats]

    @classmethod
    def build(cls, left: Ints, right: Ints, size: int, columns: dict[str, Floats]) -> "Sparse":
        """Build from key pairs and their columns.

        All right keys are below `size`.
        """
        key = left * np.int64(size) + right
        order = np.argsort(key)
        return cls(key[order], size, {name: values[order] for name, values in columns.items()})

    def dense(self, left: Ints, right: Ints) -> dict[str, Floats]:
        """Return columns [len(left), len(right)] float32.

        Pairs that are not stored, and left codes of -1, get the empty value.
        """
        asked = left[:, None] * np.int64(self.size) + right[None, :]
        place = np.minimum(np.searchsorted(self.key, asked), max(len(self.key) - 1, 0))
        found = (
            (self.key[place] == asked) & (left[:, None] >= 0) & (right[None, :] >= 0)
            if len(self.key)
            else np.zeros(asked.shape, dtype=bool)
        )
        return {
            name: np.where(found, values[place] if len(values) else 0, np.float32(empty_value(name))).astype(np.float32)
            for name, values in self.columns.items()
        }

    def table(self) -> pa.Table:
        """Return the columns as a table for writing."""
        return pa.table({"key": self.key, **self.columns}).replace_schema_metadata({"size": str(self.size)})

    @classmethod
    def from_table(cls, table: pa.Table) -> "Sparse":
        """Read what `table` wrote."""
        columns = {name: table[name].to_numpy() for name in table.column_names if name != "key"}
        return cls(table["key"].to_numpy(), int(table.schema.metadata[b"size"]), columns)


def read_log(stage: str, source: Source) -> tuple[CleanLog, list[pa.Table], list[Count]]:
    """Read a whole log, cleaned.

    Returns (events, all rejects, counts).
    """
    contract: Contract = source.contract
    pieces, rejects, latest = [], [], latest_time()
    for where in list_slices(source):
        kept, bad = drop_impossible(stage, where, read_slice(where, contract).select(contract.names), contract, latest)
        pieces.append(kept)
        rejects.append(bad)
    whole = pa.concat_tables(pieces) if pieces else pa.table({c.name: pa.array([], c.type) for c in contract.columns})
    log = clean_log(stage, contract, whole)
    rejects.append(log.rejects)
    rejected = sum(table.num_rows for table in rejects)
    counts = [
        Count(contract.name, "in", source.rows),
        Count(contract.name, "rejected", rejected),
        Count(contract.name, "duplicates", log.copies),
    ]
    return log, rejects, counts


@dataclass(frozen=True, kw_only=True)
class Log:
    """Both logs as codes, up to the score's time."""

    events: Events
    users: pd.Index
    stores: pd.Index
    attributes: ItemAttributes
    time: int
    last_seen: pd.DataFrame
    """user_id, store_id, at (int64 microseconds): each user's last event."""

    def user_codes(self, ids: list[str | None]) -> Ints:
        """Return the codes of users.

        -1 = null or never seen.
        """
        return self.users.get_indexer(pd.Index(ids, dtype=object)).astype(np.int64)

    def store_codes(self, ids: list[str]) -> Ints:
        """Return the codes of stores.

        -1 = never seen.
        """
        return self.stores.get_indexer(pd.Index(ids, dtype=object)).astype(np.int64)


def build_log(
    stage: str,
    clicks: Source,
    orders: Source,
    item_ids: pa.ChunkedArray,
    attributes: ItemAttributes,
    time: int,
    window: int,
) -> tuple[Log, list[pa.Table], list[Count]]:
    """Read and code both logs as of `time`.

    It is int64 microseconds. Nothing at or after it is used.
    """
    click_log, click_rejects, click_counts = read_log(stage, clicks)
    order_log, order_rejects, order_counts = read_log(stage, orders)
    outcomes = Outcomes("clicks", click_counts), Outcomes("orders", order_counts)
    order_frame = usable_orders(order_log, item_ids, time - 1, outcomes[1])
    click_frame = usable_clicks(click_log, item_ids, time - 1, outcomes[0])
    click_counts.append(Count("clicks", "out", len(click_frame)))
    order_counts.append(Count("orders", "out", len(order_frame)))
    n = len(click_frame)

    def codes(name: str) -> tuple[Ints, pd.Index]:
        of_clicks, of_orders, values = share_codes(click_log, order_log, name)
        # Only users and stores of usable events get a code.
        code, met = pd.factorize(np.concatenate([of_clicks[click_frame[name]], of_orders[order_frame[name]]]))
        return code.astype(np.int64), pd.Index(values.take(pa.array(met)).to_pandas(), dtype=object)

    (user, users), (store, stores) = codes("user_id"), codes("store_id")
    click_item, order_item = click_frame["item"].to_numpy(np.int64), order_frame["item"].to_numpy(np.int64)
    clicked_at, ordered_at = click_frame["clicked_at"].to_numpy(np.int64), order_frame["ordered_at"].to_numpy(np.int64)
    size = np.int64(max(attributes.size, 1))
    _, converted_at = attribute_orders(
        user[:n] * size + click_item, clicked_at, user[n:] * size + order_item, ordered_at, window
    )
    events = Events(
        click_user=user[:n],
        click_item=click_item,
        click_store=store[:n],
        clicked_at=clicked_at,
        converted_at=converted_at,
        order_user=user[n:],
        order_item=order_item,
        order_store=store[n:],
        ordered_at=ordered_at,
    )
    seen = pd.DataFrame({"user": user, "store": store, "at": np.concatenate([clicked_at, ordered_at])}).sort_values(
        ["at", "user", "store"]
    )
    last = seen.drop_duplicates("user", keep="last")
    last_seen = pd.DataFrame(
        {"user_id": users[last["user"]], "store_id": stores[last["store"]], "at": last["at"].to_numpy()}
    )
    log = Log(
        events=events,
        users=users,
        stores=stores,
        attributes=attributes,
        time=time,
        last_seen=last_seen,
    )
    return log, [*click_rejects, *order_rejects], [*click_counts, *order_counts]


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """Pair-side features at one time."""

    items: dict[str, Floats]
    store_item: Sparse
    pair: Sparse
    user_subcategory: Sparse
    user_brand: Sparse

    @classmethod
    def build(cls, log: Log) -> "Snapshot":
        """Compute every pair and item feature at the log's time.

        These are all of `ITEM_COUNTS` and `PAIR_COUNTS`.
        """
        e, n_items = log.events, log.attributes.size
        n_stores = max(1, len(log.stores))

        def queries(user: Ints, item: Ints, store: Ints) -> Queries:
            return Queries(user=user, item=item, store=store, time=np.full(len(item), log.time))

        def of_items(asked: Queries) -> dict[str, Floats]:
            happened = e.converted_at != NEVER
            return item_features(
                click_item=e.click_item,
                click_store=e.click_store,
                clicked_at=e.clicked_at,
                conversion_item=e.click_item[happened],
                converted_at=e.converted_at[happened],
                order_item=e.order_item,
                order_store=e.order_store,
                ordered_at=e.ordered_at,
                queries=asked,
                listed_at=log.attributes.listed_at[asked.item],
                n_stores=n_stores,
            )

        everything = np.arange(n_items)
        dense = of_items(queries(everything, everything, np.zeros(n_items, dtype=np.int64)))
        store, item = _distinct(
            np.concatenate([e.click_store, e.order_store]), np.concatenate([e.click_item, e.order_item])
        )
        at_store = of_items(queries(item, item, store))
        user, bought = _distinct(
            np.concatenate([e.click_user, e.order_user]), np.concatenate([e.click_item, e.order_item])
        )
        pairs = pair_features(e, queries(user, bought, np.zeros_like(user)), log.attributes)

        def grouped(codes: Ints, names: tuple[str, ...]) -> Sparse:
            group = codes[bought]
            known = group >= 0
            key_user, key_group = user[known], group[known]
            size = int(codes.max(initial=0)) + 1
            _, first = np.unique(key_user * np.int64(size) + key_group, return_index=True)
            return Sparse.build(
                key_user[first], key_group[first], size, {name: pairs[name][known][first] for name in names}
            )

        return cls(
            items={name: dense[name] for name in ITEM},
            store_item=Sparse.build(store, item, n_items, {name: at_store[name] for name in STORE_ITEM}),
            pair=Sparse.build(user, bought, n_items, {name: pairs[name] for name in PAIR}),
            user_subcategory=grouped(log.attributes.subcategory, USER_SUBCATEGORY),
            user_brand=grouped(log.attributes.brand, USER_BRAND),
        )

    @staticmethod
    def size(log: Log) -> int:
        """Compute the bytes of a log's snapshot, without building it."""
        e, attributes = log.events, log.attributes
        _, item = _distinct(
            np.concatenate([e.click_store, e.order_store]), np.concatenate([e.click_item, e.order_item])
        )
        user, bought = _distinct(
            np.concatenate([e.click_user, e.order_user]), np.concatenate([e.click_item, e.order_item])
        )

        def groups(codes: Ints) -> int:
            known = codes[bought] >= 0
            return len(_distinct(user[known], codes[bought][known])[0])

        rows = (
            (len(item), STORE_ITEM),
            (len(user), PAIR),
            (groups(attributes.subcategory), USER_SUBCATEGORY),
            (groups(attributes.brand), USER_BRAND),
        )
        # A key is int64, a feature float32.
        return 4 * len(ITEM) * attributes.size + sum(count * (8 + 4 * len(names)) for count, names in rows)

    def write(self, directory: str) -> None:
        """Write five small Parquet files."""
        files.write_parquet(files.join(directory, "items.parquet"), pa.table(dict(self.items)))
        for name in ("store_item", "pair", "user_subcategory", "user_brand"):
            files.write_parquet(files.join(directory, f"{name}.parquet"), getattr(self, name).table())

    @classmethod
    def read(cls, directory: str) -> "Snapshot":
        """Read what `write` wrote."""

        def table(name: str) -> pa.Table:
            with files.open_read(files.join(directory, f"{name}.parquet")) as handle:
                return pq.read_table(handle)

        items = table("items")
        sparse = {
            name: Sparse.from_table(table(name)) for name in ("store_item", "pair", "user_subcategory", "user_brand")
        }
        return cls(items={name: items[name].to_numpy() for name in ITEM}, **sparse)

    def tile(self, users: Ints, stores: Ints, rows: Ints, subcategory: Ints, brand: Ints) -> dict[str, Floats]:
        """Return columns for S audience rows × I listings.

        Each is [I], [S, I] or [1, I], to be broadcast to [S, I].

        Args:
            users: codes of the audience rows' users, -1 = nobody, or never seen.
            stores: codes of the audience rows' stores, -1 = never seen.
            rows: item rows.
            subcategory: codes of the item rows' subcategories.
            brand: codes of the item rows' brands.
        """
        columns: dict[str, Floats] = {name: self.items[name][rows][None, :] for name in ITEM}
        distinct, place = np.unique(stores, return_inverse=True)
        columns |= {name: values[place] for name, values in self.store_item.dense(distinct, rows).items()}
        # Rows without a user are identical: one row represents them.
        who, back = np.unique(users, return_inverse=True)
        for sparse, keys in ((self.pair, rows), (self.user_subcategory, subcategory), (self.user_brand, brand)):
            columns |= {
                name: values[back] if len(who) > 1 else values for name, values in sparse.dense(who, keys).items()
            }
        return columns


def _distinct(left: Ints, right: Ints) -> tuple[Ints, Ints]:
    pairs = np.unique(np.stack([left, right], axis=1), axis=0) if len(left) else np.zeros((0, 2), dtype=np.int64)
    return pairs[:, 0], pairs[:, 1]


def audience_features(
    log: Log, users: Ints, length: int
) -> tuple[dict[str, Floats], NDArray[np.int32], NDArray[np.int8], Floats]:
    """Compute audience rows' features at the log's time.

    Returns (columns of `AUDIENCE_COUNTS` [S], history item rows [S, length], kinds, hours) of
    audience rows at the log's time.
    """
    time = np.full(len(users), log.time)
    counts = user_features(log.events, users, time)
    history = user_history(log.events, users, time, length)
    return {column.name: counts[column.name] for column in AUDIENCE_COUNTS}, history.item, history.kind, history.hours


def recent_activity(log: Log) -> dict[str, Ints]:
    """Count each listing's recent clicks and orders, int64 [N].

    `clicks` are those of the 28 days before the log's time. `orders` are those credited to them by
    then.
    """
    events = log.events
    recent = events.clicked_at >= log.time - ACTIVE_DAYS * DAY_US
    bought = recent & (events.converted_at < log.time)
    size = log.attributes.size
    return {
        "clicks": np.bincount(events.click_item[recent], minlength=size).astype(np.int64),
        "orders": np.bincount(events.click_item[bought], minlength=size).astype(np.int64),
    }


def active_users(log: Log) -> pd.DataFrame:
    """Return users with an event in the last 28 days.

    These are the 28 days before the log's time. Columns are user_id, store_id, at.
    """
    return log.last_seen[log.last_seen["at"] >= log.time - ACTIVE_DAYS * DAY_US].sort_values(
        "user_id", ignore_index=True
    )
