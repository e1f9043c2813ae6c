"""The examples of `camenn shards`, written in Polars.

They are written as an expert would write them, as the reference for the speed of `camenn shards`.

The rows, columns and values are the same, from the same tables, as one Parquet file for each day.
There is one process with all cores, and there are no rejects (the logs of the benchmark have none)
and no embeddings. `python -m benchmarks.peers.polars_shards DATA OUT ENGINE` prints one JSON line.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import polars as pl

from pipelines.features.as_of import PRIOR_CLICKS, PRIOR_CVR
from pipelines.features.history import CLICKS_OF_HISTORY
from schemas.training import EXAMPLES

WINDOW = pl.duration(hours=24)
HISTORY = 20
SESSIONS_AT_ONCE = 500_000
DAY_US = 86_400_000_000
HOUR_US = 3_600_000_000


def read_events(data: Path, engine: Any) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    """Read (clicks, orders, items), cleaned.

    Ids that are only compared are read as codes.
    """
    items = (
        pl.scan_parquet(data / "catalog.parquet")
        .select("item_id", "subcategory", "brand", "listed_at")
        .sort("item_id")
        .with_row_index("item")
        .with_columns(
            pl.col("item").cast(pl.Int32),
            *(pl.col(name).cast(pl.Categorical).to_physical().cast(pl.Int32) for name in ("subcategory", "brand")),
        )
        .collect()
    )
    clicks = pl.scan_parquet(data / "clicks" / "*.parquet").unique()
    orders = pl.scan_parquet(data / "orders" / "*.parquet").unique()
    clicked, ordered = pl.collect_all(
        [clicks.select(pl.col("clicked_at").max()), orders.select(pl.col("ordered_at").max())], engine=engine
    )
    as_of = min(clicked.item(), ordered.item())
    lazy_items = items.lazy()
    clicks = (
        clicks.filter(pl.col("clicked_at") <= as_of)
        .with_columns(session_start=pl.col("clicked_at").min().over("user_id", "session_id"))
        .join(lazy_items, on="item_id")
        .drop("item_id")
        .sort("clicked_at", "exposure_id")
        .with_columns(as_of=pl.lit(as_of, pl.Datetime("us")))
        .drop("exposure_id")
    )
    orders = (
        orders.filter((pl.col("ordered_at") <= as_of) & (pl.col("quantity") > 0))
        .join(lazy_items, on="item_id")
        .select("user_id", "store_id", "item", "subcategory", "brand", "ordered_at")
        .sort("ordered_at")
    )
    found = pl.collect_all([clicks, orders], engine=engine)
    return found[0], found[1], items


def attribute(clicks: pl.DataFrame, orders: pl.DataFrame) -> pl.DataFrame:
    """Add the time of the first credited order to clicks."""
    clicks = clicks.with_row_index("click")
    first = (
        orders.join_asof(
            clicks.select("click", "user_id", "item", "clicked_at"),
            left_on="ordered_at",
            right_on="clicked_at",
            by=["user_id", "item"],
            tolerance="24h",
            check_sortedness=False,
        )
        .drop_nulls("click")
        .group_by("click")
        .agg(converted_at=pl.col("ordered_at").min())
    )
    return clicks.join(first, on="click", how="left", maintain_order="left")


def before(
    queries: pl.DataFrame, events: pl.DataFrame, time: str, by: list[str], count: str, days: str | None = None
) -> pl.DataFrame:
    """Count the earlier events of each query's key.

    Returns `queries` (sorted by session_start) with the number of earlier `events` under the same
    key, and the days since the last.
    """
    counted = (
        events.select(*by, time)
        .drop_nulls()
        .sort(time)
        .with_columns((pl.int_range(pl.len()) + 1).over(by).alias(count))
    )
    found = queries.join_asof(
        counted.rename({time: "_last"}),
        left_on="session_start",
        right_on="_last",
        by=by,
        allow_exact_matches=False,
        coalesce=False,
        check_sortedness=False,
    )
    columns = [pl.col(count).fill_null(0).cast(pl.Float32)]
    if days is not None:
        since = (pl.col("session_start") - pl.col("_last")).dt.total_microseconds()
        columns.append((since / DAY_US).cast(pl.Float32).alias(days))
    return found.with_columns(columns).drop("_last")


def smoothed(conversions: str, clicks: str) -> pl.Expr:
    """Smooth a rate like `pipelines.features.as_of.smoothed_cvr`."""
    prior, weight = pl.lit(PRIOR_CVR * PRIOR_CLICKS, pl.Float32), pl.lit(PRIOR_CLICKS, pl.Float32)
    return (pl.col(conversions) + prior) / (pl.col(clicks) + weight)


def _histories(sessions: pl.DataFrame, events: pl.DataFrame, bought: pl.DataFrame, known: pl.DataFrame) -> pl.DataFrame:
    """Return the last entries of sessions, as lists by session."""
    last = pl.col("event").cast(pl.Int64)
    back = (
        sessions.select(
            "session",
            "session_start",
            event=pl.int_ranges(last, pl.max_horizontal(last - 2 * HISTORY, pl.col("first").cast(pl.Int64) - 1), -1),
        )
        .drop_nulls("event")
        .explode("event")
        .drop_nulls("event")
    )
    columns = ("item", "converted_at", "when", "kind")
    picked = events.select(columns)[back["event"]]
    recent = (
        pl.concat([back.drop("event"), picked], how="horizontal")
        .filter(pl.col("converted_at").is_null() | (pl.col("converted_at") >= pl.col("session_start")))
        .filter(pl.int_range(pl.len()).over("session") < HISTORY)
        .with_columns(click=(pl.col("kind") == 1).cum_sum().over("session"))
    )
    before = sessions.select("session", "session_start", "user_id").join_asof(
        bought.select("user_id", "when", "purchase").sort("when"),
        left_on="session_start",
        right_on="when",
        by="user_id",
        allow_exact_matches=False,
        check_sortedness=False,
    )
    per_session = (
        recent.group_by("session")
        .agg(clicks=(pl.col("kind") == 1).sum().cast(pl.Int64), listed=(pl.col("kind") == 2).sum().cast(pl.Int64))
        .join(before.drop("when"), on="session")
        .join(known, on="user_id", how="left")
        .with_columns(end=pl.col("purchase").cast(pl.Int64) + 1 - pl.col("listed"))
        .with_columns(
            yields=pl.min_horizontal(
                pl.max_horizontal(pl.col("clicks") - HISTORY // CLICKS_OF_HISTORY, 0),
                (pl.col("end") - pl.col("first_purchase").cast(pl.Int64)).fill_null(0),
            )
        )
    )
    older = (
        per_session.filter(pl.col("yields") > 0)
        .select(
            "session",
            "session_start",
            purchase=pl.int_ranges(pl.col("end") - 1, pl.col("end") - 1 - pl.col("yields"), -1),
        )
        .explode("purchase")
    )
    taken = bought.select(columns)[older["purchase"]]
    kept = (
        recent.join(per_session.select("session", "clicks", "yields"), on="session", how="left", maintain_order="left")
        .filter((pl.col("kind") == 2) | (pl.col("click") <= pl.col("clicks") - pl.col("yields")))
        .select("session", "session_start", *columns)
    )
    return (
        pl.concat([kept, pl.concat([older.drop("purchase"), taken], how="horizontal")])
        .with_columns(
            history_item=pl.col("item"),
            history_hours=((pl.col("session_start") - pl.col("when")).dt.total_microseconds() / HOUR_US).cast(
                pl.Float32
            ),
        )
        .group_by("session", maintain_order=True)
        .agg("history_item", pl.col("kind").alias("history_kind"), "history_hours")
    )


def add_histories(sessions: pl.DataFrame, clicks: pl.DataFrame, orders: pl.DataFrame) -> pl.DataFrame:
    """Add the last entries of their users to sessions.

    The latest entry comes first.
    """
    events = (
        pl.concat(
            [
                clicks.select("user_id", "item", "converted_at", when="clicked_at", kind=pl.lit(1, pl.Int8)),
                orders.select(
                    "user_id",
                    "item",
                    converted_at=pl.lit(None, pl.Datetime("us")),
                    when="ordered_at",
                    kind=pl.lit(2, pl.Int8),
                ),
            ]
        )
        .sort("user_id", "when", "kind", "item", descending=[False, False, False, True])
        .with_row_index("event")
    )
    reach = events.group_by("user_id").agg(first=pl.col("event").min())
    ends = events.select("user_id", "when", "event").sort("when")
    sessions = (
        sessions.sort("session_start")
        .with_row_index("session")
        .join_asof(
            ends,
            left_on="session_start",
            right_on="when",
            by="user_id",
            allow_exact_matches=False,
            check_sortedness=False,
        )
        .drop("when")
        .join(reach, on="user_id", how="left", maintain_order="left")
    )
    # Clicks beyond the latest quarter yield their places, oldest first, to purchases before all of these.
    bought = events.filter(pl.col("kind") == 2).with_row_index("purchase")
    known = bought.group_by("user_id").agg(first_purchase=pl.col("purchase").min())
    # Sessions are processed in blocks: forty events of every session at once take more memory than everything else.
    history = pl.concat([_histories(part, events, bought, known) for part in sessions.iter_slices(SESSIONS_AT_ONCE)])
    return sessions.join(history, on="session", how="left", maintain_order="left").drop("session", "event", "first")


def build(data: Path, engine: Any) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Return (all examples, the items).

    Columns of the examples are as in `EXAMPLES`, but histories are numbers of items.
    """
    clicks, orders, items = read_events(data, engine)
    clicks = attribute(clicks, orders)
    conversions = clicks.filter(pl.col("converted_at").is_not_null())
    examples = (
        clicks.filter(pl.col("clicked_at") + WINDOW <= pl.col("as_of"))
        .group_by("user_id", "session_id", "item", maintain_order=True)
        .agg(
            pl.col("store_id", "session_start", "clicked_at", "position", "subcategory", "brand", "listed_at").first(),
            label=pl.col("converted_at").is_not_null().any().cast(pl.Int8),
        )
        .sort("session_start")
    )
    sessions = examples.select("user_id", "session_start").unique(maintain_order=True)
    for events, when, by, count, days in (
        (clicks, "clicked_at", ["user_id"], "_user_clicks", None),
        (orders, "ordered_at", ["user_id"], "_user_orders", "user_days_since_order"),
        (conversions, "converted_at", ["user_id"], "_user_conversions", None),
    ):
        sessions = before(sessions, events, when, by, count, days)
    seen = pl.concat([clicks.select("user_id", at="clicked_at"), orders.select("user_id", at="ordered_at")])
    since = pl.min_horizontal("_seen", "session_start")
    known_days = 1 + (pl.col("session_start") - since).dt.total_microseconds() / DAY_US
    sessions = sessions.join(
        seen.group_by("user_id").agg(_seen=pl.col("at").min()), on="user_id", how="left", maintain_order="left"
    ).with_columns(
        (pl.col(f"_user_{what}") / known_days).cast(pl.Float32).alias(f"user_{what}_per_day")
        for what in ("clicks", "orders")
    )
    sessions = add_histories(sessions, clicks, orders)
    for events, when, by, count, days in (
        (clicks, "clicked_at", ["item"], "item_clicks", None),
        (orders, "ordered_at", ["item"], "item_orders", "item_days_since_order"),
        (conversions, "converted_at", ["item"], "_item_conversions", None),
        (clicks, "clicked_at", ["item", "store_id"], "store_item_clicks", None),
        (orders, "ordered_at", ["item", "store_id"], "store_item_orders", None),
        (clicks, "clicked_at", ["user_id", "item"], "pair_clicks", "pair_days_since_click"),
        (orders, "ordered_at", ["user_id", "item"], "pair_orders", "pair_days_since_order"),
        (clicks, "clicked_at", ["user_id", "subcategory"], "user_subcategory_clicks", None),
        (orders, "ordered_at", ["user_id", "subcategory"], "user_subcategory_orders", None),
        (orders, "ordered_at", ["user_id", "brand"], "user_brand_orders", None),
    ):
        examples = before(examples, events, when, by, count, days)
    first = clicks.group_by("item").agg(_first=pl.col("clicked_at").min())
    examples = examples.join(first, on="item", how="left", maintain_order="left").with_columns(
        pl.when(pl.col(name) < pl.col("session_start"))
        .then(((pl.col("session_start") - pl.col(name)).dt.total_microseconds() / DAY_US).cast(pl.Float32))
        .alias(column)
        for name, column in (("listed_at", "item_days_since_listed"), ("_first", "item_days_since_first_click"))
    )
    stores = pl.read_parquet(data / "stores.parquet")
    empty = pl.lit([], pl.List(pl.Float32))
    examples = (
        examples.join(sessions, on=["user_id", "session_start"], how="left", maintain_order="left")
        .join(stores, on="store_id", how="left", maintain_order="left")
        .with_columns(
            smoothed("_user_conversions", "_user_clicks").alias("user_cvr"),
            smoothed("_item_conversions", "item_clicks").alias("item_cvr"),
            pl.col("history_item").fill_null(empty.cast(pl.List(pl.Int32))),
            pl.col("history_kind").fill_null(empty.cast(pl.List(pl.Int8))),
            pl.col("history_hours").fill_null(empty),
        )
    )
    local = pl.concat(
        [
            part.with_columns(
                local=pl.col("session_start").dt.replace_time_zone("UTC").dt.convert_time_zone(zone or "UTC")
            )
            .with_columns(hour=pl.col("local").dt.hour(), weekday=(pl.col("local").dt.weekday() - 1).cast(pl.Int8))
            .drop("local")
            for (zone,), part in examples.group_by("timezone", maintain_order=True)
        ]
    )
    examples = (
        local.with_columns(item_id=items["item_id"].gather(local["item"]))
        .select(EXAMPLES.names)
        .sort("session_start", "user_id", "session_id", "item_id")
    )
    return examples, items


def write_days(examples: pl.DataFrame, items: pl.DataFrame, out: Path) -> None:
    """Write one file a day.

    Histories get their ids a day at a time, as those of all days at once would not fit into memory.
    """
    for (date,), day in examples.with_columns(_date=pl.col("session_start").dt.date()).group_by("_date"):
        directory = out / f"date={date}"
        directory.mkdir(parents=True)
        named = day.drop("_date").with_columns(
            history_item=pl.col("history_item").list.eval(
                pl.element().replace_strict(items["item"], items["item_id"], return_dtype=pl.String)
            )
        )
        named.write_parquet(directory / "part-0.parquet", compression="zstd", row_group_size=8_192)


def main(argv: list[str] | None = None) -> int:
    """Build, write, and print the seconds it took."""
    data, out, engine = sys.argv[1:] if argv is None else argv
    started = time.monotonic()
    examples, items = build(Path(data), engine)
    write_days(examples, items, Path(out))
    print(json.dumps({"seconds": time.monotonic() - started, "rows": examples.height}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
