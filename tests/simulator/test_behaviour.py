"""Sessions, clicks and orders."""

from dataclasses import replace

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from simulator.behaviour import sessions_per_day, simulate_day
from simulator.catalog import make_catalog
from simulator.classes import make_classes
from simulator.config import PRESETS
from simulator.people import make_users
from tests.simulator.conftest import City


def test_sessions_per_day_sum_to_the_sessions() -> None:
    config = PRESETS["demo"]
    assert sessions_per_day(config).sum() == config.sessions


def test_simulate_day_is_the_same_alone_and_in_small_blocks(city: City, monkeypatch: pytest.MonkeyPatch) -> None:
    users = make_users(city.catalog.stores, city.config)
    first = simulate_day(city.catalog, users, city.config, 3, 200)
    again = simulate_day(city.catalog, users, city.config, 3, 200)
    assert (first.clicks.p_order == again.clicks.p_order).all()
    monkeypatch.setattr("simulator.behaviour._MATRIX_CELLS", 500)
    blocks = simulate_day(city.catalog, users, city.config, 3, 200)
    assert blocks.exposures == first.exposures
    assert len(blocks.clicks) == pytest.approx(len(first.clicks), rel=0.5)


def test_clicks_come_after_the_listing_appears_and_in_its_store(city: City) -> None:
    truth = pq.read_table(city.path / "truth" / "clicks.parquet")
    listings = pq.read_table(city.path / "truth" / "listings.parquet")
    clicks = pq.read_table(city.path / "clicks.parquet")
    row = pc.index_in(clicks["item_id"], listings["item_id"])
    assert row.null_count == 0
    assert (listings["first_day"].take(row).to_numpy() <= truth["day"].to_numpy()).all()
    assert clicks["store_id"].equals(listings["store_id"].take(row))


def test_clicks_of_a_session_go_down_the_page(city: City) -> None:
    clicks = pq.read_table(city.path / "clicks.parquet").to_pandas()
    clicks = clicks.sort_values(["session_id", "clicked_at"])
    assert clicks.groupby("session_id")["position"].apply(lambda p: p.is_monotonic_increasing).all()
    assert (clicks.groupby("session_id")["user_id"].nunique() == 1).all()
    assert clicks.groupby("session_id").size().max() > 1
    assert clicks["position"].between(0, city.config.shown - 1).all()


def test_realised_orders_agree_with_the_true_probabilities(city: City) -> None:
    truth = pq.read_table(city.path / "truth" / "clicks.parquet")
    p = truth["p_order"].to_numpy()
    error = np.sqrt((p * (1 - p)).sum()) / len(p)
    assert abs(truth["ordered"].to_numpy().mean() - p.mean()) < 4 * error


def test_most_true_orders_are_attributable_within_a_day(city: City) -> None:
    truth = pq.read_table(city.path / "truth" / "clicks.parquet", columns=["exposure_id", "ordered", "day"]).to_pandas()
    clicks = pq.read_table(city.path / "clicks.parquet").to_pandas().merge(truth, on="exposure_id")
    orders = pq.read_table(city.path / "orders.parquet").to_pandas()
    clicks = clicks[clicks["ordered"] & (clicks["day"] < city.config.days - 2)]
    pairs = clicks.merge(orders[orders["quantity"] > 0], on=["user_id", "item_id"])
    hours = (pairs["ordered_at"] - pairs["clicked_at"]).dt.total_seconds() / 3600
    hit = pairs[(hours >= 0) & (hours < 24)]["exposure_id"].nunique()
    assert hit / len(clicks) > 0.98


def test_orders_include_some_without_a_click_and_lines_that_share_an_order(city: City) -> None:
    orders = pq.read_table(city.path / "orders.parquet").to_pandas()
    clicked = pq.read_table(city.path / "truth" / "clicks.parquet")["ordered"].to_numpy().sum()
    assert len(orders) > 0.95 * clicked
    assert not orders.duplicated(["order_id", "item_id"]).any()
    assert orders["order_id"].nunique() < len(orders)
    clicks = pq.read_table(city.path / "clicks.parquet").to_pandas()
    pairs = orders.merge(clicks, on=["user_id", "item_id"], how="left")
    last = pairs[pairs["clicked_at"].isna() | (pairs["ordered_at"] - pairs["clicked_at"]).dt.days.ge(1)]
    assert len(last) > 0


def test_uniform_share_one_makes_every_session_uniform() -> None:
    config = replace(PRESETS["tiny"], uniform_share=1.0)
    catalog = make_catalog(make_classes(config), config)
    day = simulate_day(catalog, make_users(catalog.stores, config), config, 0, 300)
    assert day.clicks.uniform.all()


def test_content_weight_zero_makes_content_worth_nothing() -> None:
    config = replace(PRESETS["tiny"], content_weight=0.0)
    catalog = make_catalog(make_classes(config), config)
    day = simulate_day(catalog, make_users(catalog.stores, config), config, 0, 300)
    assert (day.clicks.visual_term == 0).all()
    assert (day.clicks.text_term == 0).all()
