"""A catalog of listings with their own photos and titles.

Every listing has a photo and a title of its own for `embed`. There are no clicks or stores.
"""

import itertools
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.io.files import write_json
from schemas.catalog import CATALOG
from schemas.contract import conform
from simulator import tables
from simulator.catalog import make_catalog
from simulator.classes import make_classes
from simulator.config import MAX_PHOTOS, CityConfig
from simulator.photos import write_photos

MADE = "listings.json"
"""Written last: a directory without it is incomplete and is made again."""


def make_listings(directory: Path, items: int, photos: Path | None) -> None:
    """Write `catalog.parquet` and `photos/` of some listings.

    Existing equal listings are reused.

    `photos` is a folder of real JPEGs. With None the simulator draws some. Where there are fewer of
    them than listings, they are repeated with a few bytes after the end of the picture, which
    decoders skip: another content key, the same work.
    """
    asked = {"items": items, "photos": str(photos) if photos else None}
    record = directory / MADE
    if record.exists() and json.loads(record.read_text()) == asked:
        return
    shutil.rmtree(directory, ignore_errors=True)
    (directory / "photos").mkdir(parents=True)
    config = CityConfig(listings=items, photos=min(max(items, 500), MAX_PHOTOS), stores=max(2, items // 100))
    catalog = make_catalog(make_classes(config), config)
    if photos is None:
        write_photos(catalog.bank, make_classes(config), config, directory / "drawn")
        photos = directory / "drawn"
    table = conform(tables.catalog_table(catalog, config), CATALOG, "catalog").to_pylist()
    for row, data in zip(table, endless_photos(photos), strict=False):
        row["image_uri"] = f"photos/{row['item_id']}.jpg"
        # The simulator's titles repeat. An article number makes each unique.
        row["title"] = f"{row['title']} {row['item_id'][-6:]}"
        (directory / row["image_uri"]).write_bytes(data)
    write_catalog(directory, table)
    write_json(str(record), asked)


def endless_photos(folder: Path) -> Iterator[bytes]:
    """Yield the folder's JPEGs, then again with appended bytes.

    Raises:
        FileNotFoundError: there are none.
    """
    paths = sorted(folder.rglob("*.jpg"))
    if not paths:
        raise FileNotFoundError(f"{folder}: no .jpg in it")
    for turn in itertools.count():
        for path in paths:
            yield path.read_bytes() + (f"{turn}".encode() if turn else b"")


def first_listing(directory: Path, target: Path) -> None:
    """Make `target` a catalog of the first listing alone."""
    shutil.rmtree(target, ignore_errors=True)
    row = pq.read_table(directory / "catalog.parquet").slice(0, 1).to_pylist()[0]
    (target / row["image_uri"]).parent.mkdir(parents=True)
    shutil.copy(directory / row["image_uri"], target / row["image_uri"])
    write_catalog(target, [row])


def change_listings(directory: Path, target: Path, share: float) -> int:
    """Make `target` the same listings, some of them changed.

    A share of them, spread evenly, has a new photo and a new title. Returns how many. Photos are
    linked, not copied.
    """
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(directory / "photos", target / "photos", copy_function=os.link)
    rows = pq.read_table(directory / "catalog.parquet").to_pylist()
    changed = rows[:: round(1 / share)]
    for row in changed:
        path = target / row["image_uri"]
        data = path.read_bytes()
        path.unlink()
        path.write_bytes(data + b"changed")
        row["title"] += " new"
    write_catalog(target, rows)
    return len(changed)


def make_small_photos(directory: Path, items: int) -> None:
    """Write `items` listings with tiny stub photos.

    The photos are some unique bytes, which only stub encoders take. They are for measuring memory.
    """
    shutil.rmtree(directory, ignore_errors=True)
    (directory / "photos").mkdir(parents=True)
    rows = []
    for number in range(items):
        uri = f"photos/{number // 1000}/item-{number:08d}.jpg"
        path = directory / uri
        if number % 1000 == 0:
            path.parent.mkdir()
        path.write_bytes(f"photo {number}".encode())
        rows.append(
            {
                "item_id": f"item-{number:08d}",
                "title": f"crisp red apples from the orchard, {number} g bag",
                "category": "fruit",
                "subcategory": "apples",
                "brand": "orchard",
                "price": 3.5,
                "image_uri": uri,
            }
        )
    write_catalog(directory, rows)


def write_catalog(directory: Path, rows: list[dict[str, object]]) -> None:
    """Write `catalog.parquet` in row groups of 8,192."""
    names = [name for name in CATALOG.names if any(row.get(name) is not None for row in rows)]
    columns = {name: pa.array([row.get(name) for row in rows], CATALOG.schema.field(name).type) for name in names}
    pq.write_table(pa.table(columns), directory / "catalog.parquet", compression="zstd", row_group_size=8_192)
