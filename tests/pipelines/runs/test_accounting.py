"""Every row has one outcome; shards are equal however the input is cut; publication is atomic."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from camenn_model.data.shard_set import ShardSet
from pipelines.inputs.catalog import read_catalog
from pipelines.io import files
from pipelines.io.tables import Source
from pipelines.runs import accounting, context
from pipelines.shards import planning, sizes
from pipelines.shards import stage as shards_stage
from schemas.catalog import CATALOG
from schemas.errors import InputError
from schemas.manifest import LATEST, MANIFEST
from tests.pipelines.shards.test_examples import shard_options
from tests.support import shard_reference
from tests.support.shard_reference import DAY, HOUR, Row, Settings
from tests.support.small_city import (
    CATALOG_ROWS,
    START,
    ZONES,
    catalog_table,
    content_key,
    random_city,
    write_data,
    write_store,
)

AS_OF = "2023-11-24T12:00:00"
SETTINGS = Settings(
    as_of=1_700_827_200_000_000, window=24 * HOUR, history=5, timezones=ZONES, timezone="Asia/Kathmandu"
)


def dirty_catalog() -> pa.Table:
    """Return the small catalog with four dirty rows.

    Two copies, one conflicting row and one without an id come in this order after the clean rows.
    """
    table = catalog_table()
    rows = table.to_pylist()
    rows += [rows[3], rows[0], rows[1] | {"title": "another"}, rows[2] | {"item_id": None}]
    return pa.Table.from_pylist(rows, schema=table.schema)


@dataclass
class City:
    """A city, its store, and its shards as they were built first."""

    root: Path
    clicks: list[Row]
    orders: list[Row]
    summary: dict[str, Any]

    @property
    def out(self) -> Path:
        return self.root / "shards"

    def build(self, data: str, out: str, *, rerun: bool = False) -> dict[str, Any]:
        options = shard_options(
            self.root / data, self.root / "store", self.root / out, as_of=AS_OF, max_reject_rate=0.3
        )
        return shards_stage.run(options, [], rerun=rerun)


@pytest.fixture(scope="module")
def city(tmp_path_factory: pytest.TempPathFactory) -> City:
    root = tmp_path_factory.mktemp("city")
    clicks, orders = random_city(3, 300, 200)
    write_data(root / "data", clicks, orders, catalog=dirty_catalog())
    write_store(root / "store", catalog_table())
    made = City(root, clicks, orders, {})
    made.summary = made.build("data", "shards")
    return made


def read_published(out: Path) -> dict[str, Any]:
    """Everything a reader of a shard set sees, in an order of its own; contents as {key: bytes}."""
    shards = ShardSet(str(out))
    found: dict[str, Any] = {}
    for path, _ in shards.files("examples"):
        table = pq.ParquetFile(path).read()
        found.setdefault(path.split("/examples/")[1].rsplit("/", 1)[0], []).extend(table.to_pylist())
    found["items"], found["users"] = shards.items.to_pylist(), shards.users.to_pylist()
    rejects = [row for path, _ in shards.files("rejects") for row in pq.ParquetFile(path).read().to_pylist()]
    found["rejects"] = sorted((row["key"], row["reason"]) for row in rejects if "row " not in row["key"])
    for kind, contents in (("images", shards.images), ("titles", shards.titles)):
        values = contents.gather(contents.rows_of(contents.keys))
        found[kind] = {key: value.tobytes() for key, value in zip(contents.keys.to_pylist(), values, strict=True)}
        assert len(found[kind]) == len(contents), "a content lies there twice"
    return found


def test_shards_account_for_every_row_with_every_exclusion(city: City) -> None:
    shards = ShardSet(str(city.out))
    counts = shards.manifest["counts"]
    expected = shard_reference.build(city.clicks, city.orders, CATALOG_ROWS, SETTINGS)
    assert counts["clicks"] == {"in": len(city.clicks), **expected.clicks}
    assert counts["orders"] == {"in": len(city.orders), **expected.orders}
    assert counts["catalog"] == {"in": 9, "out": 5, "duplicates": 2, "rejected": 2}
    exclusions = {
        "duplicates",
        "rejected",
        "after_as_of",
        "unknown_item",
        "open_window",
        "repeated_clicks",
        "out",
        "in",
    }
    assert {name for name, rows in counts["clicks"].items() if rows} == exclusions
    assert {name for name, rows in counts["orders"].items() if rows} == {
        "duplicates",
        "rejected",
        "after_as_of",
        "returns",
        "unknown_item",
        "out",
        "in",
    }
    for table in counts.values():
        assert table["in"] == sum(rows for where, rows in table.items() if where != "in")
    assert sum(rows for _, rows in shards.files("examples")) == counts["clicks"]["out"]
    assert (
        sum(rows for _, rows in shards.files("rejects"))
        == sum(table["rejected"] for table in counts.values())
        == city.summary["rejected"]
    )
    rejects = Counter(
        row["reason"] for path, _ in shards.files("rejects") for row in pq.ParquetFile(path).read().to_pylist()
    )
    assert rejects == {
        "duplicate_exposure_id": len(expected.duplicate_exposures),
        "null_user_id": 1,
        "null_quantity": 1,
        "null_item_id": 1,
        "duplicate_item_id": 1,
    }


def test_shards_hold_what_is_in_use_once(city: City) -> None:
    published = read_published(city.out)
    assert set(published["images"]) == {content_key(f"{row['item_id']}.jpg") for row in CATALOG_ROWS[:4]}
    assert set(published["titles"]) == {content_key(f"fresh {row['item_id']}") for row in CATALOG_ROWS[:4]}
    assert [row["item_id"] for row in published["items"]] == ["i0", "i1", "i10", "i2", "i9"]
    bare = published["items"][-1]
    assert {name for name, value in bare.items() if value is None} >= {
        "title",
        "title_key",
        "image_key",
        "blur",
        "megapixels",
        "title_tokens",
    }


@pytest.mark.parametrize("cut", ["files", "groups", "buckets"])
def test_shards_do_not_depend_on_how_the_input_is_cut(city: City, monkeypatch: pytest.MonkeyPatch, cut: str) -> None:
    """The same rows in another order, in several files, in small row groups, in several buckets."""
    clicks, orders = city.clicks[::-1], sorted(city.orders, key=str)
    catalog = dirty_catalog()
    # The order decides which of two conflicting listings is first, so those two keep theirs.
    catalog = catalog.take(pa.array([8, 2, 1, 6, 4, 0, 7, 3, 5]))
    cuts: dict[str, dict[str, int]] = {
        "files": {"files": 3},
        "groups": {"row_group_size": 17},
        "buckets": {"files": 2, "row_group_size": 40},
    }
    write_data(city.root / f"data-{cut}", clicks, orders, catalog=catalog, **cuts[cut])
    if cut == "buckets":
        monkeypatch.setattr(sizes, "ROWS_PER_BUCKET", 61)
    city.build(f"data-{cut}", f"shards-{cut}")
    assert read_published(city.root / f"shards-{cut}") == read_published(city.out)


def test_shards_again_changes_nothing_and_rerun_gives_the_same(city: City) -> None:
    before = read_published(city.out)
    pointer = (city.out / "latest.json").read_bytes()
    contents = {path: path.stat().st_mtime_ns for path in (city.out / "contents").rglob("*.arrow")}
    again = city.build("data", "shards")
    assert again["unchanged"]
    assert (city.out / "latest.json").read_bytes() == pointer
    rerun = city.build("data", "shards", rerun=True)
    assert "unchanged" not in rerun
    assert json.loads((city.out / "latest.json").read_text())["run"] == rerun["run"] != city.summary["run"]
    assert read_published(city.out) == before
    assert {path: path.stat().st_mtime_ns for path in (city.out / "contents").rglob("*.arrow")} == contents
    assert (rerun["contents_copied"], rerun["contents_kept"]) == (0, city.summary["contents_copied"])


def test_new_listings_are_added_to_the_contents(tmp_path: Path) -> None:
    clicks, orders = random_city(4, 60, 40)
    rows = [*CATALOG_ROWS, {"item_id": "j1", "subcategory": "milk", "brand": "b0", "listed_at": None}]
    store = write_store(tmp_path / "store", catalog_table(rows))
    for catalog, copied, kept in ((catalog_table(), 8, 0), (catalog_table(rows), 2, 8)):
        data = write_data(tmp_path / "data", clicks, orders, catalog=catalog)
        summary = shards_stage.run(shard_options(data, store, tmp_path / "shards"), [])
        assert (summary["contents_copied"], summary["contents_kept"]) == (copied, kept)
    published = read_published(tmp_path / "shards")
    assert (len(published["images"]), len(published["titles"])) == (5, 5)


@pytest.mark.parametrize("moment", ["before the manifest", "before latest.json"])
def test_a_killed_run_changes_nothing_that_is_published(
    city: City, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    before = read_published(city.out)
    pointer = (city.out / "latest.json").read_bytes()
    write_document = files.write_document
    victim = MANIFEST if moment == "before the manifest" else LATEST

    def die(path: str, value: Any, **flags: Any) -> None:
        if path.endswith(victim):
            raise KeyboardInterrupt
        write_document(path, value, **flags)

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_document", die)
        with pytest.raises(KeyboardInterrupt):
            city.build("data", "shards", rerun=True)
    assert (city.out / "latest.json").read_bytes() == pointer
    assert read_published(city.out) == before
    (city.out / "runs" / "29990101T000000-leftover" / "examples").mkdir(parents=True, exist_ok=True)
    assert city.build("data", "shards")["unchanged"]
    city.build("data", "shards", rerun=True)
    assert read_published(city.out) == before


def test_a_second_writer_is_turned_away(city: City) -> None:
    with (
        files.single_writer(str(city.out)),
        pytest.raises(InputError, match="another camenn process is writing there. Wait for it to end"),
    ):
        city.build("data", "shards", rerun=True)


def test_books_that_do_not_balance_stop_the_run(city: City, monkeypatch: pytest.MonkeyPatch) -> None:
    pointer = (city.out / "latest.json").read_bytes()
    read_finished = accounting.read_finished

    def lose_a_row(directory: str) -> Any:
        records, counts = read_finished(directory)
        counts["clicks"]["out"] -= 1
        return records, counts

    monkeypatch.setattr(context, "read_finished", lose_a_row)
    with pytest.raises(RuntimeError, match="table 'clicks': .* rows came in, but these went somewhere"):
        city.build("data", "shards", rerun=True)
    assert (city.out / "latest.json").read_bytes() == pointer


def test_read_catalog_accounts_for_every_row(tmp_path: Path) -> None:
    write_data(tmp_path, [], [], catalog=dirty_catalog(), files=3, row_group_size=2)
    rows, rejects, counts = read_catalog("score", Source.find(str(tmp_path), CATALOG))
    assert counts == {"in": 9, "out": 5, "duplicates": 2, "rejected": 2}
    assert (rows.num_rows, rejects.num_rows) == (5, 2)


def test_settings_agree() -> None:
    """The flag and the reference denote the same time."""
    end = np.array([SETTINGS.as_of + DAY])
    assert planning.resolve_as_of(AS_OF, end, end) == SETTINGS.as_of
    assert START + 5 * DAY < SETTINGS.as_of < START + 12 * DAY
