"""The gates before publication.

They are tested here by hand, and over whole nights with the real stage in
tests/end_to_end/test_whole_way.py.
"""

import dataclasses
import json
from typing import Any

import numpy as np
import pytest

from camenn_model.evaluation.challenge import Calibration
from camenn_model.evaluation.distribution import decile_shares, histogram, population_stability_index
from pipelines.runs.gate import Gate, hold_photos
from pipelines.runs.manifest import Manifest
from pipelines.score.gates import Coverage, Night, check_night


def make_night(seed: int = 0, shift: float = 0.0, **values: Any) -> Night:
    logits = np.random.default_rng(seed).normal(-2 + shift, 1, 20_000)
    cvr = 1 / (1 + np.exp(-logits))
    counts = histogram(cvr)
    night = Night(
        listings=1_000,
        audience_rows=60,
        rows=len(cvr),
        mean_cvr=float(cvr.mean()),
        histogram=tuple((int(place), int(counts[place])) for place in np.flatnonzero(counts)),
    )
    return dataclasses.replace(night, **values)


def failed(now: Night, before: list[Night]) -> set[str]:
    return {gate.name for gate in check_night(now, before) if not gate.passed}


def test_the_first_night_has_nothing_to_be_held_against() -> None:
    assert check_night(make_night(), []) == []


def test_nights_alike_pass() -> None:
    before = [make_night(seed) for seed in range(7)]
    gates = check_night(make_night(9), before)
    assert [gate.name for gate in gates] == ["coverage_listings", "coverage_audience_rows", "mean_cvr", "psi"]
    assert all(gate.passed for gate in gates)
    assert "the median of 7 published nights" in gates[0].words
    assert "the night published last" in check_night(make_night(9), before[:1])[0].words


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ({"listings": 980}, set()),
        ({"listings": 979}, {"coverage_listings"}),
        ({"audience_rows": 58}, {"coverage_audience_rows"}),
        ({"listings": 5_000}, set()),
    ],
)
def test_coverage(values: dict[str, Any], names: set[str]) -> None:
    assert failed(make_night(9, **values), [make_night(seed) for seed in range(7)]) == names


def test_one_odd_night_among_seven_moves_no_bar() -> None:
    before = [make_night(seed) for seed in range(6)] + [make_night(6, shift=3, listings=1)]
    assert failed(make_night(9), before) == set()


def test_only_the_last_seven_nights_count() -> None:
    before = [make_night(seed, shift=2) for seed in range(20)] + [make_night(seed) for seed in range(7)]
    assert failed(make_night(9), before) == set()


def test_mean_and_distribution() -> None:
    before = [make_night(seed) for seed in range(3)]
    assert failed(make_night(9, shift=0.1), before) == set()
    assert failed(make_night(9, shift=1.0), before) == {"mean_cvr", "psi"}
    # The same mean, but no longer spread: every listing gets the same score.
    flat = make_night(9)
    everything = histogram(np.full(flat.rows, flat.mean_cvr))
    flat = dataclasses.replace(flat, histogram=tuple((int(p), int(everything[p])) for p in np.flatnonzero(everything)))
    assert failed(flat, before) == {"psi"}


def test_psi_is_that_of_the_values_deciles() -> None:
    """Against PSI from the values themselves."""
    rng = np.random.default_rng(0)
    before, now = (1 / (1 + np.exp(-rng.normal(-2 + shift, 1, 50_000))) for shift in (0, 0.3))
    edges = np.quantile(before, np.linspace(0, 1, 11)[1:-1])
    p, q = (np.bincount(np.searchsorted(edges, v), minlength=10) / len(v) for v in (before, now))
    expected = float(np.sum((q - p) * np.log(q / p)))
    a, b = histogram(before), histogram(now)
    assert population_stability_index(decile_shares(b, a), decile_shares(a, a)) == pytest.approx(expected, rel=0.05)


def test_nights_survive_a_manifest() -> None:
    night = make_night()
    assert Night.from_json(json.loads(json.dumps(dataclasses.asdict(night)))) == night


def test_nights_without_a_common_bin_have_a_distribution_too() -> None:
    nights = [dataclasses.replace(make_night(), histogram=((place, 100),)) for place in (900, 1_000, 1_100)]
    assert {gate.name for gate in check_night(nights[1], nights)} >= {"psi"}


def test_another_models_distribution_says_nothing_of_faults() -> None:
    before = [make_night(seed, model="old") for seed in range(6)]
    new = make_night(9, shift=1.0, model="new")
    assert {gate.name for gate in check_night(new, before)} == {"coverage_listings", "coverage_audience_rows"}
    assert failed(make_night(9, shift=1.0, model="new", listings=900), before) == {"coverage_listings"}
    # From its second night on it is compared with itself, not with the previous model.
    later = check_night(make_night(10, shift=1.0, model="new"), [*before, new])
    assert len(later) == 4 and all(gate.passed for gate in later)
    assert failed(make_night(10, model="new"), [*before, new]) == {"mean_cvr", "psi"}
    assert "the night published last by this model" in later[2].words


@pytest.mark.parametrize(
    ("pcoc", "error", "passed"), [(1.19, 0.0, True), (1.35, 0.1, True), (1.35, 0.05, False), (0.7, 0.01, False)]
)
def test_calibration_is_held_to_a_fifth_beyond_chance(pcoc: float, error: float, passed: bool) -> None:
    calibration = Calibration("2026-01-01", "2026-01-02", 3_000, 500, pcoc, error, 0.4)
    for before in ([make_night(1)], [make_night(1, model="old")]):
        gates = {gate.name: gate for gate in check_night(make_night(9), before, calibration)}
        assert gates["calibration"].passed is passed
        assert f"{pcoc:.3f}" in gates["calibration"].words
    assert check_night(make_night(9), [], calibration) == []


@pytest.mark.parametrize(("expected", "error", "passed"), [(500.0, 25.0, False), (1.5, 1.2, True)])
def test_a_night_without_any_order_is_gated_where_some_were_due(expected: float, error: float, passed: bool) -> None:
    calibration = Calibration("2026-01-01", "2026-01-02", 3_000, 0, None, None, 0.4, expected, error)
    gate = next(gate for gate in check_night(make_night(2), [make_night(1)], calibration) if gate.name == "calibration")
    assert gate.passed is passed and f"{expected:,.1f}" in gate.words


def cover(found: int, asked: int = 100, recoded: int = 0, **values: Any) -> Coverage:
    named: dict[str, Any] = {"name": "photos", "counted": "listings have a photo", "least": 0.9, "most_recoded": 0.02}
    return Coverage(**(named | {"found": found, "asked": asked, "recoded": recoded} | values))


def covered(*found: tuple[int, int, int], **values: Any) -> list[Night]:
    return [make_night(seed, coverage={"photos": counts}, **values) for seed, counts in enumerate(found)]


def gate_of(now: Coverage, before: list[Night]) -> Gate:
    (gate,) = [gate for gate in check_night(make_night(9), before, coverage=[now]) if gate.name == now.name]
    return gate


@pytest.mark.parametrize(
    ("now", "before", "passed"),
    [
        (cover(90), [(100, 100, 0)] * 3, True),
        (cover(89), [(100, 100, 0)] * 3, False),
        # More of them are requested, and as many are found as before.
        (cover(100, 200), [(100, 100, 0)] * 3, True),
        (cover(100, 200, by_share=True), [(100, 100, 0)] * 3, False),
        # Half are found each night, of other people each night: 40 of 100 is within two standard errors.
        (cover(40), [(50, 100, 0)] * 3, False),
        (cover(40, chance=True), [(50, 100, 0)] * 3, True),
        (cover(30, chance=True), [(50, 100, 0)] * 3, False),
        (cover(95, chance=True), [(100, 100, 0)] * 3, True),
        (cover(89, chance=True), [(100, 100, 0)] * 3, False),
        # Most nights had none, but the latest had: there is something to lose.
        (cover(0), [(0, 0, 0)] * 4 + [(80, 100, 0)] * 3, False),
        (cover(72), [(0, 0, 0)] * 4 + [(80, 100, 0)] * 3, True),
        # Most had none, and the latest had none: nothing to lose, and nothing to divide by.
        (cover(0), [(80, 100, 0)] + [(0, 100, 0)] * 4, True),
        (cover(10), [(0, 100, 0)] * 4, True),
        # Ids that differ in form only.
        (cover(98, recoded=2), [(100, 100, 0)] * 3, True),
        (cover(97, recoded=3), [(100, 100, 0)] * 3, False),
        (cover(97, recoded=3), [(97, 100, 3)] * 3, True),
        (cover(97, recoded=3), [], False),
        # Nothing was published before.
        (cover(5), [], True),
        (cover(4), [], True),
        (cover(5, plausible=True), [], True),
        (cover(4, plausible=True), [], False),
        (cover(0, 19, plausible=True), [], True),
        (cover(4, plausible=True), [(4, 100, 0)], True),
    ],
)
def test_what_is_found(now: Coverage, before: list[tuple[int, int, int]], passed: bool) -> None:
    gate = gate_of(now, covered(*before))
    assert gate.passed is passed and f"{now.found} of {now.asked} listings have a photo" in gate.words, gate.words


def test_what_nobody_asks_for_has_no_gate() -> None:
    before = covered((0, 0, 0), (0, 0, 0))
    assert "photos" not in {gate.name for gate in check_night(make_night(9), before, coverage=[cover(0, 0)])}
    assert not gate_of(cover(0, 0), covered((80, 100, 0))).passed


def test_what_lacks_is_told_only_of_a_gate_that_failed() -> None:
    before = covered((100, 100, 0))
    assert "the first is i7" in gate_of(cover(50, lacking="the first is i7"), before).words
    assert "the first is i7" not in gate_of(cover(95, lacking="the first is i7"), before).words


def test_a_night_published_by_force_is_what_is_usual_from_then_on() -> None:
    """Half of the shops closed, and the night was forced.

    It need not be forced again. The night's other references stay.
    """
    before = [*(make_night(seed) for seed in range(6)), make_night(6, listings=500, overridden=("coverage_listings",))]
    assert failed(make_night(9, listings=495), before) == set()
    assert failed(make_night(9, listings=480), before) == {"coverage_listings"}
    assert failed(make_night(9, listings=495, audience_rows=30), before) == {"coverage_audience_rows"}
    assert failed(make_night(9, listings=495), before[:-1]) == {"coverage_listings"}
    moved = [*(make_night(seed) for seed in range(6)), make_night(6, shift=1.0, overridden=("mean_cvr", "psi"))]
    assert failed(make_night(9, shift=1.0), moved) == set()
    assert failed(make_night(9), moved) == {"mean_cvr", "psi"}
    photos = [*covered(*[(100, 100, 0)] * 6), *covered((0, 100, 0), overridden=("photos",))]
    assert gate_of(cover(0), photos).passed and not gate_of(cover(0), photos[:-1]).passed


def test_a_table_that_most_nights_had_must_be_there() -> None:
    had = [make_night(seed, tables=("users", "stores")) for seed in range(3)]
    assert failed(make_night(9, tables=("users", "stores")), had) == set()
    assert failed(make_night(9, tables=("stores",)), had) == {"tables"}
    assert failed(make_night(9, tables=("users", "stores", "audience")), had) == set()
    # A table that was there for a single night is not required.
    assert failed(make_night(9), [make_night(1), make_night(2, tables=("audience",)), make_night(3)]) == set()


@pytest.mark.parametrize(("kept", "had", "passed"), [(90, 100, True), (89, 100, False), (0, 5, False), (1, 2, True)])
def test_photos_of_the_run_before_are_kept(kept: int, had: int, passed: bool) -> None:
    gate = hold_photos(kept, had)
    assert gate.passed is passed and f"{kept} of {had} listings that had a photo" in gate.words


def test_a_published_run_tells_its_tables_and_what_was_overridden() -> None:
    night = dataclasses.asdict(make_night())
    for name in ("coverage", "tables", "overridden"):
        # As an earlier version wrote it.
        del night[name]
    gates = [Gate("psi", False, "far off"), Gate("mean_cvr", True, "as ever")]
    manifest = Manifest(
        stage="score",
        run="r",
        inputs={"catalog": "", "users": ""},
        options={"night": night},
        gates=[g.to_json() for g in gates],
    )
    read = Night.of_manifest(manifest)
    assert read is not None and (read.tables, read.overridden, read.coverage) == (("users",), ("psi",), {})
    assert Night.of_manifest(Manifest(stage="score", run="r")) is None
