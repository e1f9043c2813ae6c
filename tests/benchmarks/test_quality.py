"""The quality benchmark.

Its statistics are compared with slow references, its variants are tested one by one, and a small
run covers everything.
"""

import json
import math
import os
import signal
import subprocess
import sys
import threading
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.spatial.distance import cdist

from benchmarks.quality import __main__ as command
from benchmarks.quality import baselines, figures, judge, plan, representation
from benchmarks.quality import job as quality_job
from benchmarks.quality.job import Job, held_out, latest_part, run
from benchmarks.quality.publish import BEGIN, END, publish
from benchmarks.quality.summary import summarize
from benchmarks.quality.variants import VARIANTS, hide, make_trainer, shuffle_images
from benchmarks.quality.worlds import Truth, World, read_keys, read_truth
from benchmarks.support.processes import Children
from benchmarks.support.stage_process import Job as StageJob
from benchmarks.support.stage_process import run_stage
from camenn_model.data.batching import concat_rows
from camenn_model.evaluation import metrics
from camenn_model.evaluation.predictions import Predictions, predict
from camenn_model.training.corpus import Corpus, TrainOptions, open_corpus
from schemas.errors import InputError
from simulator.truth import expected_auc

CITY = {"clicks": 3_000}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A tiny city, with stub embeddings (they are meaningless: these tests are about the benchmark)."""
    found = World(name="quick", work=str(tmp_path_factory.mktemp("quality")), preset="tiny", city=CITY)
    found.directory.mkdir(parents=True)
    from simulator.config import preset_config
    from simulator.generate import generate_city

    generate_city(found.data, preset_config("tiny", CITY))
    for stage, name in (("embed", "store"), ("shards", "shards")):
        run_stage(
            StageJob(
                stage=stage,
                work=str(found.directory),
                out=str(found.directory / name),
                beam_flags=("--direct_num_workers=1",),
                image_shape=(4, 24),
                text_shape=(8, 16),
            )
        )
    return found


@pytest.fixture(scope="module")
def corpus(world: World) -> Corpus:
    return open_corpus(TrainOptions(shards=world.shards, out=""))


def options(world: World, tmp_path: Path, **values: Any) -> TrainOptions:
    return TrainOptions(shards=world.shards, out=str(tmp_path), **({"batch_size": 64} | values))


def steps(world: World, corpus: Corpus, name: str, tmp_path: Path, count: int = 3) -> tuple[Any, Corpus]:
    """A trainer of the variant after some steps, and the corpus of its test part."""
    variant = VARIANTS[name]
    trainer, test = make_trainer(corpus, variant, replace(options(world, tmp_path), **variant.options), world)
    for number, share in enumerate(trainer.stream()):
        trainer.step(share)
        if number + 1 == count:
            break
    trainer.model.eval()
    return trainer, test


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_every_variant_trains(world: World, corpus: Corpus, tmp_path: Path, name: str) -> None:
    trainer, test = steps(world, corpus, name, tmp_path)
    assert all(np.isfinite(row["total"]) for row in trainer.state.curves)
    # Steps without alignment have no figure.
    aligned = np.nansum([row["ita"] + row["tia"] for row in trainer.state.curves])
    assert (aligned > 0) == VARIANTS[name].options.get("alignment", True)
    found = predict(trainer.model, test.reader, test.table, test.blocks("test"))
    assert np.isfinite(found.logits).all()


@pytest.mark.parametrize(("name", "hidden"), [("no_content", True), ("no_images", True), ("full", False)])
def test_hidden_photos_change_nothing(world: World, corpus: Corpus, tmp_path: Path, name: str, hidden: bool) -> None:
    trainer, test = steps(world, corpus, name, tmp_path)
    before = predict(trainer.model, test.reader, test.table, test.blocks("test")).logits
    # The same hidden again, of items that have each other's photos.
    other = shuffle_images(corpus.table, corpus.space, 0)
    if hidden:
        other = hide(other, corpus.space, images=True, titles="titles" in VARIANTS[name].hides)
    after = predict(trainer.model, test.reader, other, test.blocks("test")).logits
    assert np.array_equal(before, after) == hidden


def test_what_is_hidden_is_hidden(world: World, corpus: Corpus, tmp_path: Path) -> None:
    table = hide(corpus.table, corpus.space, images=True, titles=True)
    batch = table.batch(np.arange(len(table)))
    assert not batch.has_image.any() and not batch.has_text.any() and not batch.text_mask.any()
    # Price stays, quality goes: columns are price, price_relative, price_alike (no listing is
    # similar any more), then the five of quality and agreement.
    assert (batch.buckets[:, 2:] == 0).all() and (batch.buckets[:, :2] > 0).any()
    assert (corpus.table.buckets[:, 2:] > 0).any(), "the corpus itself is as before"
    trainer, test = steps(world, corpus, "no_ids", tmp_path)
    rows = test.reader.read(test.files("test")[0][0])
    assert (rows.audience_cats[:, 0] == 0).all() and (test.table.cats[:, 3] == 0).all()
    assert (corpus.table.cats[:, 3] > 0).any(), "the corpus itself is as before"


def test_gate_without_content_reads_no_content(world: World, corpus: Corpus, tmp_path: Path) -> None:
    trainer, _ = steps(world, corpus, "gate_without_content", tmp_path)
    width = trainer.model.config.width
    weight = trainer.model.cvr_gate.weights[0].weight
    assert (weight[:, width:] == 0).all() and (weight[:, :width] != 0).any()
    usual, _ = steps(world, corpus, "full", tmp_path)
    assert (usual.model.cvr_gate.weights[0].weight[:, width:] != 0).any()


def test_displayed_attributes_are_the_truths(world: World, corpus: Corpus, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    _, test = make_trainer(corpus, VARIANTS["displayed"], options(world, tmp_path, alignment=False), world)
    assert world.truth is not None
    listings = {row["item_id"]: row for row in pq.read_table(world.truth / "listings.parquet").to_pylist()}
    batch = test.table.batch(np.arange(len(test.table)))
    for place, item in enumerate(test.table.ids.to_pylist()):
        listing = listings[item]
        assert batch.patches[place, 0, 0] == (listing["image_corruption"] == "clean")
        assert batch.text[place, 0, 0] == (listing["text_corruption"] == "clean")
        if listing["text_corruption"] == "clean":
            assert batch.text[place, 0, 1] == listing["organic"]
        if listing["image_corruption"] == "clean":
            assert batch.patches[place, 0, 1] == np.float16(listing["freshness"])
    # It has the agreement of these, in buckets of its own: values are not clipped to the range of
    # the embeddings' agreement.
    reported = test.table.judge(test.space.agreement).agreement
    number = test.space.numbers["agreement"]
    known = reported[np.isfinite(reported)]
    assert (
        number != corpus.space.numbers["agreement"] and number.lowest <= known.min() and number.highest >= known.max()
    )
    assert test.config.fields == test.space.fields
    mismatched = np.array([listings[item]["mismatched"] for item in test.table.ids.to_pylist()])
    assert metrics.mismatch_auc(mismatched, reported) > 0.9


def test_gates_are_compared_on_the_same_listings(world: World, corpus: Corpus, tmp_path: Path) -> None:
    # Without layers orders have no gate.
    plain, test = make_trainer(corpus, VARIANTS["full"], options(world, tmp_path), world)
    assert set(quality_job.gate_use(plain.model.eval(), test, 0)["gates"]) == {"ita", "tia"}
    trainer, test = make_trainer(corpus, VARIANTS["layers"], options(world, tmp_path), world)
    model = trainer.model.eval()
    rows = concat_rows([test.reader.read(path) for path, _ in test.files("test")])
    users_of: dict[int, set[int]] = defaultdict(set)
    for item, user in zip(rows.item, rows.user, strict=True):
        if test.table.with_content()[item]:
            users_of[int(item)].add(int(user))
    begun = quality_job.gate_use(model, test, 0)["gates_apart"]
    # Gates start at 0: each sends everything to the same experts. Of two clicks of a listing, the
    # first and the last in random order, most are of two users.
    assert begun["cvr_ita"] == begun["ita_tia"] == begun["cvr_users"] == 0
    assert 0 < begun["listings"] <= sum(len(users) > 1 for users in users_of.values())
    with torch.no_grad():
        of_items = model.ita_gate.weights[0]
        assert isinstance(of_items, torch.nn.Linear)
        of_items.weight.normal_(0, 1, generator=torch.Generator().manual_seed(0))
    apart = quality_job.gate_use(model, test, 0)["gates_apart"]
    assert 0.1 < apart["cvr_ita"] <= 1 and apart["cvr_ita"] == apart["ita_tia"] and apart["cvr_users"] == 0


def test_permuted_labels_are_those_of_training_alone(world: World, corpus: Corpus, tmp_path: Path) -> None:
    trainer, test = make_trainer(corpus, VARIANTS["permuted_labels"], options(world, tmp_path), world)
    path = corpus.files("train")[0][0]
    plain, given = corpus.reader.read(path), trainer.corpus.reader.read(path)
    assert given.label.sum() == plain.label.sum() and not np.array_equal(given.label, plain.label)
    assert np.array_equal(given.item, plain.item)
    assert np.array_equal(test.reader.read(path).label, plain.label)


def test_shuffled_alignment_alone_is_taught_other_photos(world: World, corpus: Corpus, tmp_path: Path) -> None:
    trainer, test = make_trainer(corpus, VARIANTS["shuffled_alignment"], options(world, tmp_path), world)
    assert trainer.sampler is not None
    taught, own = trainer.sampler.table.image_row, corpus.table.image_row
    assert (taught != own).mean() > 0.5 and np.array_equal(np.sort(taught), np.sort(own))
    for table in (trainer.corpus.table, test.table):
        assert np.array_equal(table.image_row, own)
    usual, _ = make_trainer(corpus, VARIANTS["no_agreement"], options(world, tmp_path), world)
    assert usual.sampler is not None and np.array_equal(usual.sampler.table.image_row, own)


def test_truth_is_that_of_the_examples(world: World, corpus: Corpus) -> None:
    files = corpus.files("test")
    keys = read_keys(files)
    truth = read_truth(world, keys)
    assert len(truth.p_order) == sum(rows for _, rows in files)
    labels = np.concatenate([corpus.reader.read(path).label for path, _ in files])
    # Orders are drawn with these probabilities.
    assert labels.mean() == pytest.approx(truth.p_order.mean(), abs=4 * np.sqrt(truth.p_order.mean() / len(labels)))
    assert metrics.auc(labels, truth.p_order) > 0.65
    with pytest.raises(ValueError, match="not among the simulator's clicks"):
        read_truth(world, keys.assign(item_id="nobody knows"))


def test_expected_ece_by_hand() -> None:
    p = np.array([0.1, 0.3, 0.5, 0.9])
    # Two bins: of mean 0.2 against 0.3, and 0.7 against 0.6.
    assert judge.expected_ece(p, np.array([0.25, 0.35, 0.55, 0.65]), bins=2) == pytest.approx(0.1)
    assert judge.expected_ece(p, p) == 0


def test_strata_by_hand() -> None:
    """Warm and cold, each whole, with a spoilt photo, and clicked by this user before."""
    flags = np.array([[cold, spoilt, met] for cold in (0, 1) for spoilt in (0, 1) for met in (0, 1)], dtype=bool)
    cold, spoilt, met = flags.T
    truth = Truth(
        p_order=np.full(8, 0.5),
        uniform=cold,
        cold=cold,
        image_ok=~spoilt,
        text_ok=~np.zeros(8, bool),
        mismatched=spoilt & met,
        ladder={},
    )
    prior = judge.Prior(np.array([0.0, 1, 5, 10, 11, 12, 0, 30]), met.astype(float), np.zeros(8), ~spoilt)
    found = judge.strata(truth, prior)
    assert {name: np.flatnonzero(rows).tolist() for name, rows in found.items()} == {
        "uniform_sessions": [4, 5, 6, 7],
        "cold_start": [4, 5, 6, 7],
        "warm": [0, 1, 2, 3],
        "no_prior_click": [0, 6],
        "few_prior_clicks": [1, 2, 3],
        "more_prior_clicks": [4, 5, 7],
        "uncorrupted": [0, 1, 4, 5],
        "corrupted": [2, 3, 6, 7],
        "mismatched": [3, 7],
        "cold_start_uncorrupted": [4, 5],
        "cold_start_corrupted": [6, 7],
        "warm_uncorrupted": [0, 1],
        "warm_corrupted": [2, 3],
        "cold_start_first_click": [4, 6],
        "warm_first_click": [0, 2],
    }


def test_strata_of_what_is_known_by_hand() -> None:
    # Ordered with clicks and without known clicks, clicked, and neither; each with a photo and without.
    orders, clicks = np.repeat([[2.0, 3], [1, 0], [0, 4], [0, 0]], 2, axis=0).T
    prior = judge.Prior(np.full(8, 9.0), clicks, orders, np.arange(8) % 2 == 0)
    rows = {name: np.flatnonzero(rows).tolist() for name, rows in judge.known_strata(prior).items()}
    assert rows == {
        "pair_ordered_before": [0, 1, 2, 3],
        "pair_clicked_before": [4, 5],
        "pair_first_click": [6, 7],
        "with_photo": [0, 2, 4, 6],
        "without_photo": [1, 3, 5, 7],
    }
    # Those who ordered before are ranked the right way round, the others the wrong way; too few and
    # one class have no AUC.
    n = 300
    labels = np.tile([1.0, 0], n // 2)
    ordered, clicked = np.arange(n) < 100, (np.arange(n) >= 100) & (np.arange(n) < 199)
    scores = np.where(ordered, labels, -labels)
    prior = judge.Prior(np.ones(n), clicked.astype(float), ordered.astype(float), labels == 1)
    found = judge.as_observed(Predictions(scores, labels, np.arange(n), np.arange(n)), prior)
    assert found["pair_ordered_before"] == {"rows": 100, "orders": 50, "auc": 1.0}
    assert found["pair_clicked_before"] == {"rows": 99, "orders": 50, "auc": None}
    assert found["pair_first_click"] == {"rows": 101, "orders": 50, "auc": 0.0}
    assert found["with_photo"] == {"rows": 150, "orders": 150, "auc": None}


def test_share_of_a_gap_that_is_none() -> None:
    assert judge.attainable_share(0.7, 0.6, 0.8) == pytest.approx(0.5)
    assert judge.attainable_share(0.7, 0.6, 0.6) is None, "content that is worth nothing"


def test_draws_of_users_are_those_of_a_plain_bootstrap() -> None:
    rng = np.random.default_rng(0)
    users = rng.integers(0, 60, 1_500)
    sessions = 5 * users + rng.integers(0, 5, 1_500)
    labels = (rng.random(1_500) < 0.3).astype(float)
    scores = np.round(labels + rng.normal(size=1_500), 1)
    ours = judge.of_draws(Predictions(scores, labels, users, sessions), draws=30)
    again = np.random.default_rng(0)
    plain: dict[str, list[float]] = {"auc_of_draws": [], "session_auc_of_draws": []}
    for _ in range(30):
        chosen = again.integers(0, 60, 60)
        rows = np.concatenate([np.flatnonzero(users == u) for u in chosen])
        # A user drawn twice is two users here, with sessions of their own.
        whose = np.repeat(np.arange(60), [np.count_nonzero(users == u) for u in chosen])
        apart = 1_000 * whose + sessions[rows]
        plain["auc_of_draws"].append(metrics.auc(labels[rows], scores[rows]))
        plain["session_auc_of_draws"].append(metrics.gauc(labels[rows], scores[rows], apart).value)
    for name, values in plain.items():
        np.testing.assert_allclose(ours[name], values, rtol=1e-12)


def test_p_values_by_hand() -> None:
    # With one degree of freedom t is Cauchy's, with two its distribution is algebraic.
    t = 0.01 / 0.004
    assert figures.p_value([0.006, 0.014]) == pytest.approx(1 - 2 / math.pi * math.atan(t))
    values = [0.011, 0.017, 0.004]
    t = float(np.mean(values) / (np.std(values, ddof=1) / math.sqrt(3)))
    assert figures.p_value(values) == pytest.approx(1 - t / math.sqrt(2 + t**2))
    assert math.isnan(figures.p_value([0.01])) and figures.p_value([0.0, 0.0]) == 1
    given = {"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}
    assert judge.holm(given) == {
        "d": pytest.approx(0.02),
        "a": pytest.approx(0.03),
        "c": pytest.approx(0.06),
        "b": pytest.approx(0.06),
    }
    assert figures.surely_above([0.02, 0.021, 0.019]) and not figures.surely_above([0.02, -0.001, 0.03])


def test_maps_against_sklearn() -> None:
    from sklearn.cross_decomposition import CCA
    from sklearn.linear_model import Ridge

    rng = np.random.default_rng(1)
    hidden = rng.normal(size=(400, 3))
    images = hidden @ rng.normal(size=(3, 12)) + 0.3 * rng.normal(size=(400, 12))
    titles = hidden @ rng.normal(size=(3, 8)) + 0.3 * rng.normal(size=(400, 8))
    images, titles = ((v - v.mean(axis=0)) / v.std(axis=0) for v in (images, titles))
    gram = images.T @ images
    expected = Ridge(alpha=0.1 * np.trace(gram) / 12, fit_intercept=False).fit(images, titles).coef_.T
    assert representation.ridge(images, titles, 0.1) == pytest.approx(expected, abs=1e-8)
    of_images, of_titles = representation.cca(images, titles, 1e-9, 3)
    ours = [abs(np.corrcoef(images @ of_images[:, i], titles @ of_titles[:, i])[0, 1]) for i in range(3)]
    peer = CCA(n_components=3, scale=False, max_iter=5_000).fit(images, titles)
    a, b = peer.transform(images, titles)
    assert ours == pytest.approx([abs(np.corrcoef(a[:, i], b[:, i])[0, 1]) for i in range(3)], abs=1e-3)


def test_figures_of_representation_by_hand() -> None:
    held = representation.Held(
        np.arange(4), np.array([0, 0, 1, 1]), np.array([False, False, False, True]), np.array([False] * 3 + [True])
    )
    vectors = np.array([[1.0, 0], [0.9, 0.1], [0, 1], [0.2, 0.8]])
    similarities = -cdist(vectors, vectors)
    belongs = np.array([0.9, 0.8, 0.7, 0.1])
    found = representation.figures(similarities, belongs, np.array([0.2, 0.3]), held)
    assert found["image_to_text"]["r_at_1"] == found["text_to_image"]["r_at_1"] == 1.0
    assert found["mismatch_auc"] == found["swap_auc"] == 1.0
    photos, titles = representation.swapped_pairs(held, 0)
    assert all(held.classes[a] != held.classes[b] for a, b in zip(photos, titles, strict=True))
    assert not {3} & {*photos.tolist(), *titles.tolist()}, "the listing that is wrong itself"


@pytest.mark.parametrize("model", ["popularity", "frozen", "lightgbm", "lightgbm_content", "mmoe"])
def test_baselines(world: World, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(world=world, model=model, seed=0, trials=2)
    assert not job.done()
    judged = []

    def recorded(found: Any, *given: Any) -> Any:
        judged.append(found.logits)
        return judge.judge(found, *given)

    monkeypatch.setattr(quality_job, "judge", recorded)
    result = run(job)
    assert job.done() and not replace(job, trials=3).done()
    assert Job.from_json(json.dumps(plan_dict(job))) == job
    if model == "frozen":
        assert 0 <= result["representation"]["ridge"]["image_to_text"]["r_at_1"] <= 1
        return
    assert 0.4 < result["expected"]["auc"] < result["expected"]["auc_of_truth"]
    files = open_corpus(TrainOptions(shards=world.shards, out="")).files("test")
    p = read_truth(world, read_keys(files)).p_order
    assert expected_auc(p, judged[0]) == pytest.approx(result["expected"]["auc"])
    if model != "popularity":
        losses = [trial["early_stop_log_loss"] for trial in result["trials"]]
        assert len(losses) == 2 and result["early_stop_log_loss"] == min(losses)
        again = replace(job, seed=1)
        assert run(again)["settings"] == json.loads(json.dumps(result["settings"])), "what was found on seed 0"
        with pytest.raises(InputError, match="Let seed 0 be tuned first"):
            run(replace(again, results=str(tmp_path)))


def test_the_plain_baseline_is_not_tuned(world: World) -> None:
    result = run(Job(world=world, model="lightgbm_plain", seed=0, trials=30))
    assert len(result["trials"]) == 1
    assert 0.4 < result["expected"]["auc"] < result["expected"]["auc_of_truth"]


def test_a_part_of_a_log_is_its_latest_files(world: World, corpus: Corpus) -> None:
    every = corpus.shards.examples("train")
    rows = [count for _, count in every]
    for part in (2, 3, 4):
        shards = latest_part(Job(world=world, model="full", seed=0, part=part))
        assert shards is not None
        kept = shards.examples("train")
        assert kept == every[-len(kept) :]
        assert sum(rows[-len(kept) :]) >= sum(rows) / part > sum(rows[len(rows) - len(kept) + 1 :])
        assert shards.examples("test") == corpus.shards.examples("test")


def test_jobs_of_parts_have_names_and_settings_of_their_own(world: World) -> None:
    whole = Job(world=world, model="lightgbm", seed=0)
    part = replace(whole, part=4)
    assert whole.tuned_by is None and part.tuned_by == whole.name != part.name
    # Results from before there were parts stay valid.
    assert {"part", "tuned_on"}.isdisjoint(whole.asked()) and part.asked()["part"] == 4


def test_a_silenced_model_is_its_direct_parts(world: World, corpus: Corpus, tmp_path: Path) -> None:
    trainer, test = steps(world, corpus, "direct_parts", tmp_path)
    model = trainer.model
    found = predict(model, test.reader, test.table, test.blocks("test")).logits
    with torch.no_grad():
        for weight in [*model.pair_tokens.parameters(), *model.target_attention.parameters()]:
            weight.normal_()
        for weight in [*model.shared.parameters(), *model.mixture.parameters()]:
            weight.normal_()
    assert np.array_equal(found, predict(model, test.reader, test.table, test.blocks("test")).logits)


def test_a_killed_tuning_goes_on(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(world=world, model="lightgbm", seed=0, trials=4, results=str(tmp_path / "whole"))
    whole = run(job)
    try_one = baselines.TRY["lightgbm"]
    tried: list[dict[str, Any]] = []

    def recorded(*arguments: Any) -> Any:
        tried.append(arguments[2])
        return try_one(*arguments)

    def killed(*arguments: Any) -> Any:
        if len(tried) == 2:
            raise KeyboardInterrupt
        return recorded(*arguments)

    job = replace(job, results=str(tmp_path / "killed"))
    monkeypatch.setitem(baselines.TRY, "lightgbm", killed)
    with pytest.raises(KeyboardInterrupt):
        run(job)
    monkeypatch.setitem(baselines.TRY, "lightgbm", recorded)
    again = run(job)
    assert 4 <= len(tried) <= 5, "four trials, and the best once more where another process had made it"
    timeless = [{key: value for key, value in trial.items() if key != "seconds"} for trial in again["trials"]]
    assert timeless == [{key: value for key, value in trial.items() if key != "seconds"} for trial in whole["trials"]]
    assert again["test"] == whole["test"] and again["settings"] == whole["settings"]


def plan_dict(job: Job) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(job)


def test_held_out_classes_are_the_truths(world: World, corpus: Corpus) -> None:
    train, classes, held = held_out(world, corpus)
    assert len(train) == len(classes) and not {*train.tolist()} & {*held.rows.tolist()}
    assert held.mismatched is not None and held.corrupted is not None
    assert (held.corrupted | ~held.mismatched).all(), "a mismatch is a corruption"


def test_a_small_run_of_all_of_it(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--quick` in one process: jobs run here, and the world is the tests' own; its claims are about a bigger city."""
    monkeypatch.setattr(plan, "world", lambda arguments, name, city, preset="default": world)
    monkeypatch.setattr(plan, "QUICK_TRIALS", 2)
    ran = []

    def run_here(job: Job, _: Children) -> str:
        ran.append(job.model)
        run(replace(job, epochs=1))
        # The result is that of fewer epochs.
        path = job.result()
        path.write_text(json.dumps(json.loads(path.read_text()) | {"asked": job.asked()}))
        return "done"

    monkeypatch.setattr(command, "run_job", run_here)
    # The fixture made it, with stubs.
    monkeypatch.setattr(command, "prepare_world", lambda *_: "done")
    arguments = ["--quick", "--work", world.work, "--text_encoder", "none", "--jobs", "1"]
    threads = torch.get_num_threads()
    code = command.main(arguments)
    printed = capsys.readouterr()
    found = json.loads(printed.out.splitlines()[-1])
    assert set(found["expected_auc"]) == set(plan.QUICK_MODELS)
    assert found["beats_lightgbm"] is None
    broken = [claim for claim, holds in found["claims"].items() if not holds]
    assert code == (1 if broken else 0)
    assert all(claim in printed.err for claim in broken)
    assert "full" in ran
    ran.clear()
    assert command.main(arguments) == code
    assert not ran, "what is done is not done again"
    torch.set_num_threads(threads)


def made_up_jobs(tmp_path: Path) -> list[Job]:
    """Two seeds of two logs, one model and one baseline each."""
    return [
        Job(world=World(name=f"{name}{seed}", work=str(tmp_path)), model=model, seed=seed)
        for seed in (0, 1)
        for name in ("big", "small")
        for model in ("full", "lightgbm")
    ]


def test_jobs_run_after_what_they_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reported: list[str] = []
    other_seed = threading.Event()

    def run_job(job: Job, _: Children) -> str:
        # A slow tuning: other seeds' baselines wait for it, other models do not.
        if job.name == "small0-lightgbm-0":
            assert other_seed.wait(60)
        reported.append(job.name)
        if job.name == "big1-full-1":
            other_seed.set()
        return "done"

    def prepare_world(world: World, _: Children) -> str:
        reported.append(world.name)
        return "done"

    monkeypatch.setattr(command, "run_job", run_job)
    monkeypatch.setattr(command, "prepare_world", prepare_world)
    jobs = made_up_jobs(tmp_path)
    assert command.run_jobs(jobs, 2, float("inf")) == []
    assert sorted(reported) == sorted([job.name for job in jobs] + ["big0", "small0", "big1", "small1"])
    for job in jobs:
        needs = [job.world.name, *([job.tuned_by] if job.tuned_by else [])]
        assert all(reported.index(need) < reported.index(job.name) for need in needs)


def test_what_a_failed_job_was_needed_for_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[str] = []

    def run_job(job: Job, _: Children) -> str:
        ran.append(job.name)
        return "failed" if job.name == "big0-lightgbm-0" else "done"

    monkeypatch.setattr(command, "run_job", run_job)
    monkeypatch.setattr(command, "prepare_world", lambda world, _: "failed" if world.name == "small0" else "done")
    jobs = made_up_jobs(tmp_path)
    assert command.run_jobs(jobs, 2, float("inf")) == ["log small0", "big0-lightgbm-0"]
    # Two of the log that is not there; a baseline of both logs that was not tuned.
    assert {job.name for job in jobs} - {*ran} == {
        "small0-full-0",
        "small0-lightgbm-0",
        "big1-lightgbm-1",
        "small1-lightgbm-1",
    }
    assert capsys.readouterr().err.count("left out") == 4
    ran.clear()
    assert command.run_jobs(jobs, 2, float("-inf")) == []
    assert not ran, "nothing is begun late"


def test_jobs_end_with_their_command(tmp_path: Path) -> None:
    """SIGTERM to the command: its threads' processes end too, and waiting jobs are not started."""
    script = tmp_path / "parent.py"
    script.write_text(
        """
import sys
from concurrent.futures import ThreadPoolExecutor
from benchmarks.support.processes import Children

child = [sys.executable, "-c", "import os, time; os.write(1, b'%d\\\\n' % os.getpid()); time.sleep(60)"]
with ThreadPoolExecutor(2) as pool, Children() as children:
    for future in [pool.submit(children.run, child) for _ in range(3)]:
        future.result()
"""
    )
    parent = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": os.getcwd()}
    )
    assert parent.stdout is not None
    pids = [int(parent.stdout.readline()) for _ in range(2)]
    parent.terminate()
    rest, _ = parent.communicate(timeout=30)
    assert parent.returncode == 128 + signal.SIGTERM
    assert rest == "", "a third one began"
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_summary_of_made_up_results() -> None:
    def result(world: str, model: str, seed: int, auc: float) -> dict[str, Any]:
        test = dict.fromkeys(("session_auc", "gauc", "log_loss", "ne", "pcoc"), 0.5) | {"auc": auc}
        return {"world": world, "model": model, "seed": seed, "test": test}

    found = summarize(
        [
            result("log_a", "full", 0, 0.80),
            result("log_a", "full", 1, 0.82),
            result("log_a", "lightgbm", 0, 0.79),
            result("log_a-latest_16th", "full", 0, 0.7),
            result("log_b", "full", 0, 0.81),
            result("small0", "full", 0, 0.6),
            {"world": "city0", "model": "frozen", "seed": 0},
        ]
    )
    assert found["full_log.seeds"] == 2
    assert (found["full_log.camenn.auc"], found["full_log.camenn.auc_se"]) == (0.81, 0.01)
    assert found["full_log.lightgbm.auc"] == 0.79 and "full_log.lightgbm.auc_se" not in found
    assert found["full_log.16th.camenn.auc"] == 0.7 and found["other_half.camenn.auc"] == 0.81
    assert {name.split(".")[0] for name in found} == {"full_log", "other_half"}


def test_tables_of_made_up_results(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Complete tables from made-up results: `full` is the best by far, so claims hold; then it is not."""

    def expected(auc: float) -> dict[str, Any]:
        strata = {
            name: {"rows": 500, "auc": auc, "auc_of_truth": 0.8}
            for name in (
                *("uniform_sessions", "no_prior_click", "uncorrupted", "corrupted"),
                *(f"{part}{which}" for part in ("cold_start", "warm") for which in ("", "_first_click")),
            )
        }
        return {
            "auc": auc,
            "auc_of_truth": 0.8,
            "attainable_share": 0.5,
            "pcoc": 1.0,
            "ece": 0.005,
            "strata": strata,
            "ladder": {},
        }

    way = {"r_at_1": 0.5, "r_at_5": 0.7, "r_at_10": 0.8}
    weak = {"r_at_1": 0.1, "r_at_5": 0.2, "r_at_10": 0.3}
    learned = {"image_to_text": way, "text_to_image": way, "mismatch_auc": 0.95, "swap_auc": 0.97}
    mapped = {"image_to_text": weak, "text_to_image": weak, "mismatch_auc": 0.7, "swap_auc": 0.8}
    results: list[dict[str, Any]] = []
    rates = {
        "full": 0.75,
        "no_content": 0.65,
        "displayed": 0.78,
        "no_alignment": 0.74,
        "no_ids": 0.74,
        "lightgbm_content": 0.7,
        "mmoe": 0.69,
    }
    test = dict.fromkeys(("auc", "gauc", "session_auc", "log_loss", "ne", "pcoc", "ece"), 0.7)
    for seed in range(3):
        for kind in ("city", "small"):
            for model, auc in rates.items():
                results.append(
                    {
                        "world": f"{kind}{seed}",
                        "model": model,
                        "seed": seed,
                        "test": test,
                        "expected": expected(auc + seed * 1e-3),
                    }
                )
        controls = {
            "small": {"permuted_labels": 0.45, "shuffled_patches": 0.73, "shuffled_alignment": 0.74},
            "worthless": {"full": 0.59, "no_content": 0.6},
            "clean": {"full": 0.75, "no_alignment": 0.75},
        }
        for kind, rates_of in controls.items():
            for model, auc in rates_of.items():
                told_of = {"world": f"{kind}{seed}", "model": model, "seed": seed, "test": test}
                results.append(told_of | {"expected": expected(auc + seed * 1e-3)})
        results.append(
            {
                "world": f"city{seed}",
                "model": "frozen",
                "seed": seed,
                "representation": {"ridge": mapped, "cca": mapped},
            }
        )
        for model, auc in {"full": 0.7, "lightgbm": 0.68, "lightgbm_content": 0.67, "mmoe": 0.69}.items():
            drawn = {f"{name}_of_draws": [auc - 0.001 * (model == "mmoe"), auc] for name in ("auc", "session_auc")}
            on_test: dict[str, Any] = test | {"auc": auc, "session_auc": auc, "rows": 1_000, "positives": 180} | drawn
            if model != "mmoe":
                few = {"rows": 50, "orders": 9, "auc": None}
                on_test["strata"] = {"pair_first_click": {"rows": 900, "orders": 90, "auc": auc}, "with_photo": few}
            results.append({"world": "real", "model": model, "seed": seed, "test": on_test})
            results.append({"world": "log_a", "model": model, "seed": seed, "test": on_test})
            if seed == 0 and model in ("full", "lightgbm"):
                results += [
                    {"world": f"log_a-latest_{part}th", "model": model, "seed": 0, "test": on_test} for part in (4, 16)
                ]
        direct = test | {name: [0.69, 0.695] for name in ("auc_of_draws", "session_auc_of_draws")}
        direct |= {"auc": 0.69 - 0.001 * seed, "session_auc": 0.69, "rows": 1_000, "positives": 180}
        results.append({"world": "log_a", "model": "direct_parts", "seed": seed, "test": direct})
    for result in results:
        if result["model"] == "full":
            result |= {"gates": {"cvr": [0.4, 0.6], "ita": [0.6, 0.4]}, "representation": learned | {"states": learned}}
            result |= {"listing_quality": {"mismatch_auc": 0.95, "worst_twentieth": 0.8}}
            result |= {"gates_apart": {"cvr_ita": 0.5, "ita_tia": 0.4, "cvr_users": 0.1}}
        if result["model"] == "shuffled_alignment":
            result |= {"representation": learned | {"swap_auc": 0.51}}
        if result["model"] == "no_alignment":
            # ITA's and TIA's gates are not trained: as they begin, they choose the first expert.
            result |= {"gates": {"cvr": [0.3, 0.7], "ita": [1.0, 0.0]}, "representation": mapped | {"states": learned}}
        if result["model"] in ("lightgbm_content", "mmoe") and "expected" in result:
            result["expected"]["auc"] += result["seed"] * 1e-3
        if result["model"] == "displayed":
            result["expected"]["attainable_share"] = (0.45, 0.5, 0.6)[result["seed"]]
    small = [
        r
        for r in results
        if not (r["world"].startswith("small") and r["model"] in ("lightgbm_content", "mmoe", "displayed", "no_ids"))
    ]
    publish(small, tmp_path, docs=False)
    reported = json.loads((tmp_path / "claims.json").read_text())
    # States of both are made equal.
    alike = {name for name in reported if name.endswith("states by a fitted map")}
    assert len(reported) >= 34 and all(claim["seeds"] >= 3 for claim in reported.values()), reported
    assert len(alike) == 3 and {name for name, claim in reported.items() if not claim["holds"]} == alike, reported
    # 2 · 0.001 / √2: the seeds' differences are the same.
    assert (
        reported["real log: AUC above mmoe by 2 SE of seeds and users"]["figure"]
        == "0.0100 ± 0.0000, must exceed 0.0014"
    )
    assert (
        reported["no dead expert in any run"]["figure"]
        == "least mean gate weight 0.3000, city0-no_alignment-0 of 29 runs"
    )
    assert "(0.450 to 0.600), 0.5 is required" in reported["content efficiency ≥ 0.65"]["figure"], "by their mean"
    text = (tmp_path / "quality.md").read_text()
    assert "| no_alignment, states by a fitted map | 0.500" in text
    assert "| no_ids | 0.7400 | 0.7410 | 0.7420 |" in text, "seed by seed"
    assert "| AUC by what is known | of the clicks | of the orders | full | lightgbm | lightgbm_content |\n" in text
    assert "| pair first click | 90.0% | 50.0% | 0.7000 ± 0.0000 | 0.6800 ± 0.0000 |" in text
    assert "| with photo | 5.0% | 5.0% | - | - | - |" in text
    assert "| direct_parts | the direct parts alone: linear part, counts, preferences | 0.0110 ± 0.0006, must " in text
    assert "| the latest 16th | 0.7000 | 0.7000 | 0.6800 | 0.6800 |\n| the latest 4th | 0.7000" in text
    assert "0.7510 ± 0.0006" in text and "content efficiency" in text and "listing quality of full" in text
    for result in small:
        if result["model"] == "full" and "expected" in result:
            result["expected"]["auc"] += 0.08 if result["world"].startswith("worthless") else -0.08
        if result["model"] == "shuffled_alignment":
            result["expected"]["auc"] += 0.08
        if (result["world"], result["model"]) == ("small2", "no_alignment"):
            result["gates"]["cvr"] = [0.0, 1.0]
    publish(small, tmp_path, docs=False)
    reported = json.loads((tmp_path / "claims.json").read_text())
    assert (
        not reported["content efficiency ≥ 0.65"]["holds"] and not reported["expected AUC above mmoe by 3 SE"]["holds"]
    )
    dead = reported["no dead expert in any run"]
    assert not dead["holds"] and "small2-no_alignment-2" in dead["figure"]
    broken = {name for name, claim in reported.items() if name.startswith("control") and not claim["holds"]}
    assert broken == {
        "control: content that is worth nothing wins nothing",
        "control: without corruption, alignment adds nothing",
        "control: photos of other listings cost AUC",
        "control: shuffled alignment adds nothing",
    }
    # A picture, as high as there are panels.
    with Image.open(tmp_path / "quality.png") as picture:
        full = picture.size
    city = [result for result in small if result["world"].startswith("city") and result["model"] != "displayed"]
    page = tmp_path / "docs" / "quality.md"
    page.parent.mkdir()
    page.write_text(f"# Quality\n\n{BEGIN}\nold\n{END}\n\n## More\n")
    monkeypatch.setattr(sys.modules[publish.__module__], "DOCS", page.parent)
    publish(city, tmp_path, docs=True)
    assert page.read_text() == f"# Quality\n\n{BEGIN}\n\n{(tmp_path / 'quality.md').read_text()}\n{END}\n\n## More\n"
    assert (page.parent / "quality.png").read_bytes() == (tmp_path / "quality.png").read_bytes()
    reported = json.loads((tmp_path / "claims.json").read_text())
    missing = {name for name, claim in reported.items() if claim["holds"] is None}
    assert {name for name in reported if name.startswith(("control", "real", "alignment:"))} | {
        "content efficiency ≥ 0.65"
    } == missing
    assert "| content efficiency ≥ 0.65 | - | not measured | 0 |" in (tmp_path / "quality.md").read_text()
    with Image.open(tmp_path / "quality.png") as picture:
        assert full[0] == picture.size[0] and full[1] > picture.size[1] > 500
