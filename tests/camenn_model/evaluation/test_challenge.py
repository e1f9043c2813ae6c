"""Models on unseen days: calibration and comparison of champion and challenger, against figures computed row by row."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors import safe_open

from camenn_model.data.contents import Contents
from camenn_model.data.item_table import ItemTable
from camenn_model.data.shard_set import ShardSet, date_of
from camenn_model.evaluation import challenge
from camenn_model.evaluation.challenge import (
    Calibration,
    ModelComparison,
    compare_with_champion,
    judge_calibration,
    latest_closed_days,
)
from camenn_model.package import Package, open_package
from camenn_model.training.corpus import TrainOptions, open_corpus
from pipelines.runner.exit_codes import run_main
from pipelines.runs.manifest import read_latest
from pipelines.runs.publication import publications
from pipelines.score import command as score_command
from pipelines.shards import command as shards_command
from pipelines.train import command as train_command
from schemas.errors import InputError
from tests.support.small_city import catalog_table, random_city, write_data, write_store


@pytest.fixture(scope="module")
def city(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shard set of some 900 clicks, and a model trained on it."""
    root = tmp_path_factory.mktemp("challenge")
    clicks, orders = random_city(7, 900, 500)
    write_store(root / "store", catalog_table())
    write_data(root / "data", clicks, orders)
    shards = ["--data", str(root / "data"), "--store", str(root / "store"), "--out", str(root / "shards")]
    assert run_main(shards_command.main, [*shards, "--max_reject_rate", "1", "--attribution_hours", "6"]) == 0
    assert train(root) == 0
    return root


def train(root: Path, *flags: str) -> int:
    return run_main(
        train_command.main,
        ["--shards", str(root / "shards"), "--out", str(root / "model"), "--batch_size", "64", *flags],
    )


def by_hand(package: Package, shards: ShardSet) -> tuple[np.ndarray, np.ndarray]:
    """Labels and calibrated probabilities of the latest closed days, click by click."""
    from camenn_model.data.batching import collate
    from camenn_model.data.examples import ExampleReader

    days = latest_closed_days(shards)
    assert days is not None
    table = ItemTable(shards.items, shards.images, shards.titles).encode(package.space)
    config = package.config
    reader = ExampleReader(package.space, table, shards.users, config.history_length, config.position_size)
    model = package.model()
    labels, probability = [], []
    for path, _ in shards.examples("test"):
        if days.first <= date_of(path) <= days.last:
            rows = reader.read(path)
            for place in range(len(rows)):
                one = collate(rows.take(np.array([place])), table)
                one.pairs.position.zero_()
                logit = model(one).logits.item()
                labels.append(float(rows.label[place]))
                probability.append(float(package.calibration(np.array([logit]))[0]))
    return np.array(labels), np.array(probability)


def test_calibration_and_duel_are_those_worked_out_click_by_click(city: Path) -> None:
    shards, package = ShardSet(str(city / "shards")), open_package(str(city / "model"))
    labels, p = by_hand(package, shards)
    assert len(labels) > 30 and 0 < labels.sum() < len(labels)
    found = judge_calibration(package, shards)
    assert found is not None and (found.examples, found.orders) == (len(labels), int(labels.sum()))
    assert found.pcoc == pytest.approx(p.sum() / labels.sum(), rel=1e-5)
    calibrated_on = package.calibration.positives
    assert calibrated_on > 5
    errors = np.sqrt((p * (1 - p)).sum()) / labels.sum(), found.pcoc / np.sqrt(calibrated_on)
    assert found.standard_error == pytest.approx(np.hypot(*errors), rel=1e-5)
    loss = -(labels * np.log(p) + (1 - labels) * np.log(1 - p))
    assert found.log_loss == pytest.approx(loss.mean(), rel=1e-5)
    comparison = compare_with_champion(package, package, shards)
    assert comparison is not None and comparison.passed and comparison.standard_error == 0
    assert comparison.champion_log_loss == comparison.challenger_log_loss == pytest.approx(loss.mean(), rel=1e-5)


def test_only_closed_days_of_the_test_part_are_looked_at(city: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = ShardSet(str(city / "shards"))
    latest = read_latest(str(city / "shards"))
    assert latest is not None
    monkeypatch.setattr(challenge, "LEAST_EXAMPLES", 1)
    days = latest_closed_days(shards)
    assert days is not None and days.first == days.last < shards.closed_before()
    # Its last click's window was over when the logs ended.
    end = np.datetime64(days.last) + np.timedelta64(1, "D") + np.timedelta64(6, "h")
    assert end <= np.datetime64(int(latest.options["days"]["as_of"]), "us")
    paths = {path for path, _ in shards.examples("test")}
    assert {path for unit in days.units for path, _, _ in unit} <= paths
    monkeypatch.setattr(challenge, "LEAST_EXAMPLES", 10**9)
    every = latest_closed_days(shards)
    assert every is not None and every.first < days.first
    found = {path for unit in every.units for path, _, _ in unit}
    assert found == {path for path in paths if date_of(path) < shards.closed_before()}
    monkeypatch.setattr(challenge, "MOST_EXAMPLES", 1)
    few = latest_closed_days(shards)
    assert few is not None and len(few.units) == 1


def test_chance_alone_is_no_miscalibration() -> None:
    quiet = Calibration("2026-01-01", "2026-01-01", 10, 2, 1.5, 0.4, 0.5)
    assert quiet.off_by() == 0
    loud = Calibration("2026-01-01", "2026-01-01", 10_000, 2_000, 1.5, 0.02, 0.5)
    assert loud.off_by() == pytest.approx(0.46)
    nothing = Calibration("2026-01-01", "2026-01-01", 10, 0, None, None, 0.1)
    assert nothing.off_by() == 0 and "nothing was ordered" in nothing.words()


@pytest.mark.parametrize(("challenger", "passed"), [(0.40, True), (0.4305, True), (0.432, False)])
def test_a_challenger_may_be_worse_by_chance_alone(challenger: float, passed: bool) -> None:
    assert ModelComparison("a", "b", 100, 0.43, challenger, 0.001, 0.6, 0.6).passed is passed


def test_a_challenger_that_is_worse_is_kept_and_not_published(
    city: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = read_latest(str(city / "model"))
    assert before is not None

    def worse(*_: object) -> ModelComparison:
        return ModelComparison("2026-01-01", "2026-01-02", 5_000, 0.43, 0.5, 0.001, 0.66, 0.6)

    monkeypatch.setattr(challenge, "compare_with_champion", worse)
    assert train(city, "--challenge", "--seed", "1") == 3
    assert "0.5000" in capsys.readouterr().err
    now = read_latest(str(city / "model"))
    assert now is not None and now.run == before.run
    monkeypatch.undo()
    # The other way round: a model of the same seed is no worse, so it takes over, and the comparison is recorded.
    assert train(city, "--challenge", "--rerun") == 0
    after = read_latest(str(city / "model"))
    assert after is not None and after.run != before.run
    assert after.gates[0]["name"] == "challenge" and after.gates[0]["passed"]
    assert after.summary["challenge"]["champion_log_loss"] == after.summary["challenge"]["challenger_log_loss"]
    assert [entry["run"] for entry in publications(str(city / "model"))] == [before.run, after.run]


def test_a_city_without_photos_has_shards_and_is_scored_by_a_model_of_before(
    city: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No listing has a readable photo: a model of before still scores it, and one is trained without photos."""
    catalog = catalog_table()
    catalog = catalog.set_column(
        catalog.column_names.index("image_uri"), "image_uri", pa.nulls(len(catalog), pa.string())
    )
    write_store(tmp_path / "store", catalog)
    write_data(tmp_path / "data", *random_city(7, 900, 500), catalog=catalog)
    places = ["--data", str(tmp_path / "data"), "--store", str(tmp_path / "store"), "--max_reject_rate", "1"]
    shards = [*places, "--out", str(tmp_path / "shards"), "--attribution_hours", "6"]
    assert run_main(shards_command.main, shards) == 0
    assert len(ShardSet(str(tmp_path / "shards")).images) == 0
    # Its calibration is judged on shards without photos, too.
    scores = ["--model", str(city / "model"), "--shards", str(tmp_path / "shards"), "--out", str(tmp_path / "scores")]
    assert run_main(score_command.main, [*places, *scores, "--top_k", "0"]) == 0
    latest = read_latest(str(tmp_path / "scores"))
    assert latest is not None and latest.summary["calibration"] is not None
    found, quality = (
        pa.concat_tables([pq.ParquetFile(path).read() for path in latest.paths(name)]).to_pandas()
        for name in ("scores", "listing_quality")
    )
    assert set(found["item_id"]) == set(quality["item_id"]) == set(catalog["item_id"].to_pylist())
    assert found["cvr"].between(0, 1, inclusive="neither").all()
    assert quality["mismatch"].isna().all()

    capsys.readouterr()
    assert train(tmp_path) == 0
    assert "no listing has a photo that could be encoded" in capsys.readouterr().err
    plain = open_package(str(tmp_path / "model"))
    assert not plain.config.reads_images and plain.config.reads_titles
    # Photos that come later were never learned from: they are named, and change nothing.
    places = ["--data", str(city / "data"), "--store", str(city / "store"), "--max_reject_rate", "1"]
    out = tmp_path / "later"
    assert run_main(score_command.main, [*places, "--model", str(tmp_path / "model"), "--out", str(out)]) == 0
    assert "trained without photos" in capsys.readouterr().err
    before = ShardSet(str(city / "shards"))
    bare = before.items
    for name in ("image_key", "blur", "luminance", "megapixels"):
        place = bare.column_names.index(name)
        bare = bare.set_column(place, bare.schema.field(name), pa.nulls(len(bare), bare.schema.field(name).type))
    shown, hidden = (
        ItemTable(items, before.images, before.titles, config=plain.config).encode(plain.space)
        for items in (before.items, bare)
    )
    assert (before.images.rows_of(before.items["image_key"]) >= 0).any()
    for name in ("image_row", "cats", "values", "buckets"):
        np.testing.assert_array_equal(getattr(shown, name), getattr(hidden, name))


def test_a_log_without_photos_and_titles_is_refused(city: Path) -> None:
    shards = ShardSet(str(city / "shards"))
    # Both are properties that are computed once.
    vars(shards).update({name: Contents.none("key") for name in ("images", "titles")})
    with pytest.raises(InputError, match="no listing has a photo or a title that could be encoded"):
        open_corpus(TrainOptions(shards="shards", out=""), shards)


def strings(value: Any) -> Iterator[str]:
    """Every text of a JSON value, names included."""
    if isinstance(value, dict):
        for name, each in value.items():
            yield from (name, *strings(each))
    elif isinstance(value, list):
        for each in value:
            yield from strings(each)
    elif isinstance(value, str):
        yield value


def test_a_package_names_no_user_and_listings_in_one_file(city: Path) -> None:
    """As in docs/explanation/model.md; stores are named among the features."""
    latest = read_latest(str(city / "model"))
    assert latest is not None
    package = city / "model" / "runs" / latest.run
    clicks = pq.read_table(city / "data" / "clicks.parquet")
    ids = {name: set(clicks[f"{name}_id"].to_pylist()) for name in ("user", "item", "store", "session", "exposure")}
    found: dict[str, set[str]] = {}
    for path in package.iterdir():
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as tensors:
                texts = {*tensors.keys(), *(tensors.metadata() or {}).values()}
        elif path.suffix == ".json":
            texts = set(strings(json.loads(path.read_text())))
        else:
            texts = set(re.split(r"[,\s]", path.read_text()))
        for name, known in ids.items():
            if texts & known:
                found.setdefault(name, set()).add(path.name)
    # A model of few listings has no examples of retrieval.
    assert found.pop("item", {"retrieval.json"}) == {"retrieval.json"}
    assert found == {"store": {"features.json"}}
