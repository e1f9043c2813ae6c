"""When a night trains: by the days of the log, by drift, and not again for what was trained on already."""

from pathlib import Path
from typing import Any

import pytest

from camenn_model import package
from camenn_model.evaluation import challenge
from camenn_model.evaluation.challenge import Calibration
from pipelines.nightly.config import NightlyConfig, Retrain
from pipelines.nightly.retraining import decide
from pipelines.runs.manifest import Manifest, write_manifest
from pipelines.runs.publication import publish
from schemas.errors import InputError


def config(root: Path, **retrain: Any) -> NightlyConfig:
    return NightlyConfig(path="city.toml", data=str(root / "data"), work=str(root), retrain=Retrain(**retrain))


def shards(root: Path, day: int, request: str = "") -> None:
    """The shard set as of a day of January."""
    as_of = f"2026-01-{day:02d}T23:59:00.000000"
    manifest = Manifest(stage="shards", run=f"s{day}", request=request or f"r{day}", summary={"as_of": as_of})
    publish(str(root / "shards"), manifest)


def training(root: Path, day: int, *, held: bool = False, **summary: Any) -> None:
    summary = {"shards_as_of": f"2026-01-{day:02d}T23:59:30.000000"} | summary
    manifest = Manifest(stage="train", run=f"m{day}", inputs={"shards": f"r{day}"}, summary=summary)
    (write_manifest if held else publish)(str(root / "model"), manifest)


@pytest.fixture(autouse=True)
def model(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A fake of the published model's calibration."""
    found: dict[str, Any] = {"reads": True, "calibration": Calibration("a", "b", 3_000, 500, 1.02, 0.02, 0.4)}
    monkeypatch.setattr(package, "read_package", lambda directory: None)
    monkeypatch.setattr(challenge, "reads_embeddings_of", lambda package, shard_set: found["reads"])
    monkeypatch.setattr(challenge, "judge_calibration", lambda package, shard_set: found["calibration"])
    return found


def test_the_first_night_trains(tmp_path: Path) -> None:
    shards(tmp_path, 10)
    assert decide(config(tmp_path)).due


@pytest.mark.parametrize(
    ("every", "day", "due"), [(7, 16, False), (7, 17, True), (7, 30, True), (0, 30, False), (0.5, 11, True)]
)
def test_the_schedule_is_in_days_of_the_log(tmp_path: Path, every: float, day: int, due: bool) -> None:
    training(tmp_path, 10)
    shards(tmp_path, day)
    decision = decide(config(tmp_path, every_days=every))
    assert decision.due is due
    # The training read half a minute more of its day.
    assert f"{day - 10:.1f} days" in decision.words


def test_nothing_is_trained_twice_and_a_log_set_back_is_not_due(tmp_path: Path) -> None:
    training(tmp_path, 10)
    shards(tmp_path, 20, request="r10")
    assert not decide(config(tmp_path)).due
    shards(tmp_path, 5)
    assert not decide(config(tmp_path, on_drift=False)).due


def test_a_challenger_that_lost_counts_as_a_training(tmp_path: Path) -> None:
    training(tmp_path, 10)
    training(tmp_path, 17, held=True)
    shards(tmp_path, 18)
    assert not decide(config(tmp_path)).due
    shards(tmp_path, 24)
    assert decide(config(tmp_path)).due


def test_drift_trains_once_a_day(tmp_path: Path, model: dict[str, Any]) -> None:
    training(tmp_path, 10)
    shards(tmp_path, 12)
    assert not decide(config(tmp_path)).due
    # 1.2 is 0.16 from 1 beyond two standard errors.
    model["calibration"] = Calibration("a", "b", 3_000, 500, 1.2, 0.02, 0.4)
    assert decide(config(tmp_path)).due and "1.200" in decide(config(tmp_path)).words
    assert not decide(config(tmp_path, drift=0.17)).due
    assert not decide(config(tmp_path, on_drift=False)).due
    training(tmp_path, 12, held=True)
    shards(tmp_path, 12, request="other")
    assert "once a day" in decide(config(tmp_path)).words and not decide(config(tmp_path)).due
    model["calibration"] = None
    shards(tmp_path, 14)
    assert not decide(config(tmp_path)).due


def test_other_encoders_and_unknown_days_train(tmp_path: Path, model: dict[str, Any]) -> None:
    training(tmp_path, 10)
    shards(tmp_path, 11)
    model["reads"] = False
    assert "other encoders" in decide(config(tmp_path)).words and decide(config(tmp_path)).due
    other = tmp_path / "other"
    publish(str(other / "model"), Manifest(stage="train", run="m"))
    shards(other, 11)
    assert decide(config(other)).due


def test_a_model_that_cannot_be_read_any_more_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without this, after an upgrade no night could score until a manual training."""

    def refuse(root: str) -> None:
        raise InputError("another version of camenn trained this model")

    monkeypatch.setattr(package, "read_package", refuse)
    training(tmp_path, 10)
    # The very shards that it was trained on.
    shards(tmp_path, 10)
    decision = decide(config(tmp_path, every_days=0))
    assert decision.due and "another version" in decision.words


def test_missing_orders_start_no_training(tmp_path: Path, model: dict[str, Any]) -> None:
    """A log without its orders would train a model that predicts no orders."""
    model["calibration"] = Calibration("a", "b", 3_000, 0, None, None, 0.4, expected=500.0, expected_error=25.0)
    training(tmp_path, 10)
    shards(tmp_path, 12)
    decision = decide(config(tmp_path))
    assert not decision.due and "lacks its orders" in decision.words
    # No orders where almost none are expected is no fault, and no drift.
    model["calibration"] = Calibration("a", "b", 30, 0, None, None, 0.4, expected=1.5, expected_error=1.2)
    assert "lacks" not in (words := decide(config(tmp_path)).words) and "nothing was ordered" in words
