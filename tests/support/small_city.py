"""Small, nasty data directories, and a store without encoders.

They have ties in time, skewed clocks, copies, unknown listings and several zones. The store is an
embedding store.
"""

import hashlib
import random
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

from camenn_model.hashing import normalise_title
from pipelines.features.as_of import ATTRIBUTES, item_attributes
from pipelines.features.time_index import HOUR_US
from pipelines.io.tables import FileRecord, write_table
from pipelines.runs.manifest import Manifest, add_files
from pipelines.runs.publication import publish
from pipelines.runs.store import IMAGES, TITLES, commit_part, generation
from pipelines.shards.examples import build_item_features, build_user_examples, finish_examples
from schemas.catalog import CATALOG
from schemas.contract import Contract
from schemas.embeddings import EMBEDDED_ITEMS, image_embeddings, title_embeddings
from schemas.events import CLICKS, ORDERS
from schemas.training import ITEMS as ITEMS_TABLE
from tests.support.shard_reference import Row, Settings

START = 1_700_000_000_000_000
"""2023-11-14 22:13:20 UTC, microseconds."""
STEP = 3 * HOUR_US
ZONES = {"s0": "Asia/Shanghai", "s1": "America/New_York"}
USERS = ("u0", "u1", "ünï 2")
STORES = ("s0", "s1", "s2")
ITEMS = ("i0", "i1", "i10", "i2", "i9")
CATALOG_ROWS: list[Row] = [
    {"item_id": "i0", "subcategory": "apples", "brand": "b0", "listed_at": START - 40 * STEP},
    {"item_id": "i1", "subcategory": "apples", "brand": "b1", "listed_at": None},
    {"item_id": "i10", "subcategory": "milk", "brand": None, "listed_at": START + 8 * STEP},
    {"item_id": "i2", "subcategory": None, "brand": "b1", "listed_at": START + 20 * STEP + 1},
    {"item_id": "i9", "subcategory": None, "brand": None, "listed_at": None},
]

_moments = st.builds(
    lambda step, jitter: START + step * STEP + jitter,
    st.integers(0, 30),
    st.sampled_from((0, 0, 0, 0, -1, 1, 17 * 60_000_000)),
)
_items = st.sampled_from((*ITEMS, "gone"))
_clicks = st.fixed_dictionaries(
    {
        "session_id": st.sampled_from(("a", "b", "c")),
        "user_id": st.sampled_from(USERS),
        "store_id": st.sampled_from(STORES),
        "item_id": _items,
        "clicked_at": _moments,
        "position": st.sampled_from((None, 0, 1, 7)),
    }
)
_orders = st.fixed_dictionaries(
    {
        "order_id": st.sampled_from(("o0", "o1", "o2", "o3")),
        "user_id": st.sampled_from(USERS),
        "store_id": st.sampled_from(STORES),
        "item_id": _items,
        "ordered_at": _moments,
        "quantity": st.sampled_from((1.0, 1.0, 2.0, 0.5, 0.0, -1.0)),
    }
)


@st.composite
def cities(draw: st.DrawFn, conflicts: bool = True) -> tuple[list[Row], list[Row], Settings]:
    """Draw (clicks, orders, settings) in no order.

    There are copies of rows and, by default, ids on two different clicks.
    """
    clicks = draw(st.lists(_clicks, min_size=1, max_size=25))
    orders = draw(st.lists(_orders, max_size=12))
    window = draw(st.sampled_from((24, 24, 6, 3))) * HOUR_US
    lags = st.sampled_from((0, 1, -1, HOUR_US, window, window + 1))
    for click, lag in draw(st.lists(st.tuples(st.sampled_from(clicks), lags), max_size=12)):
        bought = {name: click[name] for name in ("user_id", "store_id", "item_id")}
        orders.append(
            {"order_id": f"c{len(orders)}", **bought, "ordered_at": click["clicked_at"] + lag, "quantity": 1.0}
        )
    numbers = draw(st.permutations(range(len(clicks))))
    clicks = [{"exposure_id": f"e{number}", **click} for number, click in zip(numbers, clicks, strict=True)]
    if conflicts and draw(st.booleans()):
        clicks.append({**draw(_clicks), "exposure_id": draw(st.sampled_from(clicks))["exposure_id"]})
    clicks += [dict(click) for click in draw(st.lists(st.sampled_from(clicks), max_size=3))]
    if orders:
        orders += [dict(order) for order in draw(st.lists(st.sampled_from(orders), max_size=3))]
    settings = Settings(
        as_of=START + draw(st.integers(0, 45)) * STEP,
        window=window,
        history=draw(st.integers(1, 6)),
        timezones=draw(st.sampled_from((ZONES, {}))),
        timezone=draw(st.sampled_from(("UTC", "Asia/Kathmandu"))),
    )
    return draw(st.permutations(clicks)), draw(st.permutations(orders)), settings


def random_city(seed: int, clicks: int, orders: int, users: int = 12, days: int = 12) -> tuple[list[Row], list[Row]]:
    """A larger city from one seed, with every exclusion and reject in it."""
    rng = random.Random(seed)
    moments = [START + rng.randrange(days * 24 * 60) * 60_000_000 for _ in range(clicks // 2)]
    names = [f"u{number}" for number in range(users)]

    def event() -> Row:
        item = "gone" if rng.random() < 0.05 else rng.choice(ITEMS)
        return {"user_id": rng.choice(names), "store_id": rng.choice(STORES), "item_id": item}

    click_rows: list[Row] = []
    for number in range(clicks):
        time = rng.choice(moments)
        row = {
            "exposure_id": f"e{number:05d}",
            "session_id": f"v{(time - START) // (12 * HOUR_US)}",
            **event(),
            "clicked_at": time,
        }
        click_rows.append(row | {"position": None if rng.random() < 0.1 else rng.randrange(30)})
    order_rows: list[Row] = []
    for number in range(orders):
        click = rng.choice(click_rows)
        lag = rng.choice((-60_000_000, 0, 5 * 60_000_000, 7 * HOUR_US, 24 * HOUR_US, 24 * HOUR_US + 1))
        base = {name: click[name] for name in ("user_id", "store_id", "item_id")} if rng.random() < 0.8 else event()
        quantity = float(rng.choice((1, 1, 1, 2, 3, 0, -2)))
        order_rows.append(
            {"order_id": f"o{number // 2:05d}", **base, "ordered_at": click["clicked_at"] + lag, "quantity": quantity}
        )
    for rows in (click_rows, order_rows):
        rows += [dict(row) for row in rng.sample(rows, max(1, len(rows) // 30))]
    for row in rng.sample(click_rows, 4):
        click_rows.append({**row, "clicked_at": row["clicked_at"] + rng.randrange(3) * HOUR_US + 1})
    click_rows.append({**click_rows[0], "exposure_id": "null user", "user_id": None})
    order_rows.append({**order_rows[0], "quantity": None})
    rng.shuffle(click_rows)
    rng.shuffle(order_rows)
    return click_rows, order_rows


def event_table(rows: list[Row], contract: Contract) -> pa.Table:
    """Rows as a table of `clicks` or `orders`."""
    arrays = {}
    for field in contract.schema:
        values = pa.array(
            [row[field.name] for row in rows], pa.int64() if pa.types.is_timestamp(field.type) else field.type
        )
        arrays[field.name] = values.cast(field.type)
    return pa.table(arrays)


def items_table(rows: Iterable[Row]) -> pa.Table:
    """The attributes of catalog rows from which features are computed."""
    return pa.Table.from_pylist(
        list(rows), schema=pa.schema([ITEMS_TABLE.schema.field(name) for name in ("item_id", *ATTRIBUTES)])
    )


def build_examples(
    clicks: list[Row], orders: list[Row], catalog: list[Row], settings: Settings, frozen_before: int = 0
) -> tuple[dict[Any, Row], dict[str, Counter[str]]]:
    """Run the code under test without Beam.

    Returns (examples by (user, session, item), row counts by table), in the reference's shape.
    """
    items = items_table(catalog)
    item_ids = items["item_id"].combine_chunks()
    result = build_user_examples(
        event_table(clicks, CLICKS),
        event_table(orders, ORDERS),
        item_ids,
        item_attributes(items),
        stage="shards",
        as_of=settings.as_of,
        window=settings.window,
        history=settings.history,
        timezones=settings.timezones,
        timezone=settings.timezone,
        frozen_before=frozen_before,
    )
    tallies: dict[str, Counter[str]] = {"clicks": Counter(), "orders": Counter()}
    for count in result.counts:
        tallies[count.table][count.where] += count.rows
    counts = build_item_features(result.queries, result.item_events)
    return by_key(finish_examples(result.examples, counts, item_ids)), tallies


def by_key(examples: pa.Table) -> dict[Any, Row]:
    """Rows by (user, session, item), times as microseconds. Fails on a duplicate key."""
    for name in ("session_start", "clicked_at"):
        examples = examples.set_column(examples.column_names.index(name), name, examples[name].cast(pa.int64()))
    rows = {(row["user_id"], row["session_id"], row["item_id"]): row for row in examples.to_pylist()}
    assert len(rows) == examples.num_rows
    return rows


def write_files(
    directory: Path, name: str, table: pa.Table, *, files: int = 1, row_group_size: int = 1_000_000
) -> None:
    """A table as one file, or cut into several in a directory."""
    if files == 1:
        directory.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, directory / f"{name}.parquet", row_group_size=row_group_size)
        return
    (directory / name).mkdir(parents=True)
    edges = np.linspace(0, table.num_rows, files + 1).astype(int)
    for number, (first, last) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
        pq.write_table(
            table.slice(first, last - first), directory / name / f"part-{number}.parquet", row_group_size=row_group_size
        )


def catalog_table(rows: Iterable[Row] = CATALOG_ROWS) -> pa.Table:
    """Catalog rows with titles, prices and photos; i9 has neither title nor photo."""
    full = [
        {
            "item_id": row["item_id"],
            "title": None if row["item_id"] == "i9" else f"fresh  {row['item_id']}",
            "category": "food",
            "subcategory": row["subcategory"],
            "brand": row["brand"],
            "price": 1.25 * number,
            "image_uri": None if row["item_id"] == "i9" else f"{row['item_id']}.jpg",
            "listed_at": row["listed_at"],
        }
        for number, row in enumerate(rows)
    ]
    schema = pa.schema([CATALOG.schema.field(name) for name in full[0]])
    return pa.Table.from_pylist(full, schema=pa.schema([pa.field(f.name, f.type) for f in schema]))


def write_data(
    directory: Path,
    clicks: list[Row],
    orders: list[Row],
    *,
    catalog: pa.Table | None = None,
    files: int = 1,
    row_group_size: int = 1_000_000,
) -> Path:
    """A data directory with a catalog, both logs and the stores' zones."""
    write_files(
        directory,
        "catalog",
        catalog_table() if catalog is None else catalog,
        files=files,
        row_group_size=row_group_size,
    )
    write_files(directory, "clicks", event_table(clicks, CLICKS), files=files, row_group_size=row_group_size)
    write_files(directory, "orders", event_table(orders, ORDERS), files=files, row_group_size=row_group_size)
    write_files(directory, "stores", pa.table({"store_id": list(ZONES), "timezone": list(ZONES.values())}))
    return directory


def content_key(text: str) -> str:
    """A content hash."""
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def write_store(root: Path, catalog: pa.Table, *, run: str = "20240101T000000-aaaaaa", seed: int = 0) -> Path:
    """Write a published embedding store of `catalog`.

    The embeddings are random, 1 patch × 4 and 3 tokens × 2, in parts of two rows.
    """
    rng = np.random.default_rng(seed)
    rows: dict[str, Row] = {}
    for row in catalog.to_pylist():
        if row["item_id"] is not None:
            rows.setdefault(row["item_id"], row)
    titles = sorted({normalise_title(row["title"]) for row in rows.values()} - {""})
    photos = sorted({row["image_uri"] for row in rows.values()} - {None})
    image_contract, title_contract = image_embeddings(1, 4), title_embeddings(3, 2)
    columns: dict[str, tuple[Contract, tuple[int, int], pa.Table]] = {
        IMAGES: (
            image_contract,
            (1, 4),
            pa.table(
                {
                    "image_key": [content_key(photo) for photo in photos],
                    "embedding": pa.array(
                        [rng.normal(size=4).astype(np.float16).tobytes() for _ in photos], pa.binary(8)
                    ),
                    "blur": pa.array(rng.uniform(size=len(photos)), pa.float32()),
                    "luminance": pa.array(rng.uniform(size=len(photos)), pa.float32()),
                    "width": pa.array([200] * len(photos), pa.int32()),
                    "height": pa.array([100] * len(photos), pa.int32()),
                }
            ),
        ),
        TITLES: (
            title_contract,
            (3, 2),
            pa.table(
                {
                    "title_key": [content_key(title) for title in titles],
                    "embedding": pa.array(
                        [rng.normal(size=6).astype(np.float16).tobytes() for _ in titles], pa.binary(12)
                    ),
                    "tokens": pa.array([3] * len(titles), pa.int32()),
                    "unknown_share": pa.array([0.5] * len(titles), pa.float32()),
                }
            ),
        ),
    }
    records: list[FileRecord] = []
    for kind, (contract, shape, table) in columns.items():
        for first in range(0, table.num_rows, 2):
            part = commit_part(
                generation(str(root), kind, f"fake-{kind}"),
                contract,
                shape,
                f"{kind}{first}",
                table.slice(first, 2),
                kernels="fake",
            )
            records.append(part.record(contract.name))
            # Titles are like those that a version of camenn without keys files wrote.
            records += [part.keys_record("image_keys")] if kind == IMAGES else []
    items = [
        {
            "item_id": row["item_id"],
            "title_key": content_key(normalise_title(row["title"])) if normalise_title(row["title"]) else None,
            "image_key": content_key(row["image_uri"]) if row["image_uri"] else None,
            "image_uri": row["image_uri"],
        }
        for _, row in sorted(rows.items())
    ]
    empty = dict.fromkeys(EMBEDDED_ITEMS.names)
    embedded = pa.Table.from_pylist([empty | row for row in items], schema=EMBEDDED_ITEMS.schema)
    records.append(write_table(str(root / "runs" / run), "items", embedded))
    encoders = {
        "image": {"fingerprint": f"fake-{IMAGES}", "description": "made up photos"},
        "text": {"fingerprint": f"fake-{TITLES}", "description": "made up titles"},
    }
    manifest = Manifest(stage="embed", run=run, options=encoders)
    add_files(manifest, dict.fromkeys(("items", "image_embeddings", "image_keys", "title_embeddings"), ""), records)
    publish(str(root), manifest)
    return root
