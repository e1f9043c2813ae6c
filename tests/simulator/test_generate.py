"""The data directory as a whole."""

import json
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from schemas.catalog import CATALOG
from schemas.contract import Contract, conform
from schemas.errors import InputError
from schemas.events import CLICKS, ORDERS
from schemas.users import STORES, USERS
from simulator.generate import generate_city
from tests.simulator.conftest import City


@pytest.mark.parametrize(
    ("name", "contract"),
    [("catalog", CATALOG), ("clicks", CLICKS), ("orders", ORDERS), ("users", USERS), ("stores", STORES)],
)
def test_tables_conform_to_their_contracts(city: City, name: str, contract: Contract) -> None:
    table = pq.read_table(city.path / f"{name}.parquet")
    conformed = conform(table, contract, f"{name}.parquet")
    assert conformed.num_rows == table.num_rows > 0
    for column in contract.columns:
        if not (column.nullable or column.optional):
            assert conformed[column.name].null_count == 0
        if column.name in table.column_names:
            assert table.schema.field(column.name).type == column.type
    keys = table.select(list(contract.key)).group_by(list(contract.key)).aggregate([])
    assert keys.num_rows == table.num_rows


def test_catalog_photos_exist_and_no_column_names_the_class(city: City) -> None:
    catalog = pq.read_table(city.path / "catalog.parquet")
    truth = pq.read_table(city.path / "truth" / "listings.parquet")
    for uri in set(catalog["image_uri"].to_pylist()):
        assert (city.path / uri).is_file()
    classes = truth["class_id"].to_pylist()
    for column in ("brand", "category", "store_id"):
        per_value: dict[str, set[int]] = {}
        for value, class_id in zip(catalog[column].to_pylist(), classes, strict=True):
            per_value.setdefault(value, set()).add(class_id)
        assert max(len(found) for found in per_value.values()) > 1
    assert "class_id" not in catalog.column_names


def test_same_seed_gives_the_same_files(city: City, tmp_path: Path) -> None:
    generate_city(tmp_path / "again", city.config)
    names = sorted(p.relative_to(city.path) for p in city.path.rglob("*") if p.is_file())
    assert names == sorted(p.relative_to(tmp_path / "again") for p in (tmp_path / "again").rglob("*") if p.is_file())
    for name in names:
        here, there = city.path / name, tmp_path / "again" / name
        if name.suffix == ".parquet":
            assert pq.read_table(here).equals(pq.read_table(there)), name
        else:
            assert here.read_bytes() == there.read_bytes(), name


def test_another_seed_gives_another_city(city: City, tmp_path: Path) -> None:
    small = replace(city.config, seed=1, clicks=200, photo_pixels=75)
    generate_city(tmp_path / "other", small)
    titles = pq.read_table(tmp_path / "other" / "catalog.parquet")["title"]
    assert titles != pq.read_table(city.path / "catalog.parquet")["title"]


def test_summary_and_ladder_agree_with_the_tables(city: City) -> None:
    clicks = pq.read_metadata(city.path / "clicks.parquet").num_rows
    assert city.summary.clicks == clicks == pq.read_metadata(city.path / "truth" / "clicks.parquet").num_rows
    assert clicks == pytest.approx(city.config.clicks, rel=0.15)
    assert 0.03 < city.summary.ctr < 0.07
    ladder = json.loads((city.path / "truth" / "ladder.json").read_text())
    assert ladder["all"]["class_context"] < ladder["all"]["as_displayed"] < ladder["all"]["true_probability"]
    assert set(ladder) >= {"all", "test"}


def test_generate_city_again_does_nothing(city: City) -> None:
    before = {p: p.stat().st_mtime_ns for p in city.path.rglob("*")}
    summary, made = generate_city(city.path, city.config)
    assert not made
    assert summary == city.summary
    assert before == {p: p.stat().st_mtime_ns for p in city.path.rglob("*")}


def test_generate_city_refuses_another_city_and_names_the_difference(city: City) -> None:
    with pytest.raises(InputError, match="seed is 0, requested 5"):
        generate_city(city.path, replace(city.config, seed=5))


def test_generate_city_refuses_a_folder_with_something_else(city: City, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("keep me")
    with pytest.raises(InputError, match="does not hold a simulated city"):
        generate_city(tmp_path, city.config)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_generate_city_interrupted_leaves_nothing(city: City, tmp_path: Path) -> None:
    def interrupt(what: str, done: int, total: int) -> None:
        if what == "photos" and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate_city(tmp_path / "data", city.config, interrupt)
    assert list(tmp_path.iterdir()) == []


def test_generate_city_from_a_folder_of_photos(city: City, tmp_path: Path) -> None:
    for name, colour in (("red apple", (200, 30, 30)), ("lime", (90, 200, 40)), ("milk", (240, 240, 240))):
        (tmp_path / "photos" / name).mkdir(parents=True)
        Image.new("RGB", (120, 100), colour).save(tmp_path / "photos" / name / "1.png")
    config = replace(
        city.config,
        photo_folder=str(tmp_path / "photos"),
        photos=12,
        photo_pixels=75,
        classes=12,
        products_per_class=12,
        clicks=200,
    )
    summary, _ = generate_city(tmp_path / "data", config)
    assert summary.photos == 12
    assert summary.listings == config.listings
    nouns = pq.read_table(tmp_path / "data" / "truth" / "classes.parquet")["noun"].to_pylist()
    assert nouns == ["lime", "milk", "red apple"]
    Image.new("RGB", (500, 500)).save(tmp_path / "photos" / "lime" / "2.png")
    with pytest.raises(InputError, match="photo_files is"):
        generate_city(tmp_path / "data", config)
