import base64
import csv
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from camenn_model.evaluation.distribution import decile_shares, population_stability_index
from pipelines.embed.command import build_parser as embed_parser
from pipelines.report.command import build_parser, main
from pipelines.report.data import Item, read_items, read_work
from pipelines.report.labels import duration, number, percent, shown
from pipelines.report.listing_details import read_details, store_figures
from pipelines.report.page import render, trend_plots
from pipelines.report.photos import Photo, Photos, thumbnail
from pipelines.report.plots import plot_reliability
from pipelines.report.scores import ScoreDigest, compare_nights, digest_scores, top_by_store
from pipelines.report.section_accounting import click_funnel, table_accounting
from pipelines.report.section_listings import Card, flagged_cards, read_flagged
from pipelines.report.section_model import quality
from pipelines.report.section_nights import gate_rows, night_rows, published_nights
from pipelines.report.section_runs import REPEAT_FLAGS, encoders, repeat_command, timings
from pipelines.runs.manifest import Manifest
from pipelines.runs.night_record import StageRecord, new_night
from pipelines.runs.publication import publish
from pipelines.score.command import build_parser as score_parser
from pipelines.shards.command import build_parser as shards_parser
from pipelines.train.command import build_parser as train_parser
from schemas.errors import InputError
from tests.support.documents import edit_document
from tests.support.work_directory import EVIL_TITLE, make_work

PARSERS = {"embed": embed_parser, "shards": shards_parser, "train": train_parser, "score": score_parser}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_work(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def page(work: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("out")
    assert main(["--run", str(work), "--out", str(out)]) == 0
    return (out / "index.html").read_text()


class Outline(HTMLParser):
    """Ids, addresses and the nesting of a page."""

    VOID = ("meta", "link", "img", "br", "path", "rect", "circle", "use", "line")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.scripts = 0
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if found.get("id"):
            self.ids.append(str(found["id"]))
        self.addresses += [
            str(found[name]) for name in ("src", "href", "xlink:href", "srcset", "action") if found.get(name)
        ]
        self.scripts += tag == "script"
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_page_is_one_self_contained_well_formed_file(page: str) -> None:
    outline = Outline(page)
    assert outline.open == []
    assert len(outline.ids) == len(set(outline.ids))
    assert all(address.startswith(("data:", "#")) for address in outline.addresses)
    targets = {address[1:] for address in outline.addresses if address.startswith("#")}
    assert targets <= set(outline.ids)
    assert "@import" not in page and "url(http" not in page


def test_page_escapes_titles_and_details(page: str) -> None:
    assert EVIL_TITLE not in page
    assert "&lt;script&gt;document.title" in page
    assert "<b>Give</b>" not in page
    assert Outline(page).scripts == 1


def test_page_has_every_section_with_its_figures(page: str) -> None:
    for text in (
        "0.6712",
        "100,000",
        "−15,000",
        "77,000",
        "LightGBM",
        "5,655",
        "null user id",
        "missing image",
        "file not found",
        "random:7",
        "Compared with run 20240311T020000-bbbbbb",
    ):
        assert text in page, text
    # Six, and the four that follow the nights.
    assert page.count("<svg role=") == 10


def test_page_warns_of_untrained_weights(work: Path, page: str) -> None:
    assert "The photo encoder has random weights" in page
    manifest = read_work(str(work)).manifests["embed"]
    assert manifest.options["image"]["source"].startswith("random:")


def test_empty_directory_says_what_is_missing_and_which_command_makes_it(tmp_path: Path) -> None:
    assert main(["--run", str(tmp_path)]) == 0
    text = (tmp_path / "report" / "index.html").read_text()
    for command in ("camenn embed --data DATA", "camenn shards", "camenn train", "camenn score"):
        assert command in text, command
    assert "<img" not in text


def test_json_summary_names_page_and_missing_sections(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--run", str(tmp_path), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["page"] == str(tmp_path / "report" / "index.html")
    assert "drift" in summary["missing"] and "quality" in summary["missing"]


def test_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere: no such directory"):
        main(["--run", str(tmp_path / "nowhere")])


def test_broken_metrics_are_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text("{")
    with pytest.raises(InputError, match=r"metrics\.json: it is not JSON"):
        main(["--run", str(tmp_path)])


def test_flags_are_the_documented_ones() -> None:
    flags = {flag for action in build_parser()._actions for flag in action.option_strings}
    assert flags == {"-h", "--help", "--run", "--out", "--json"}


def test_metrics_fall_back_to_the_models_own(tmp_path: Path) -> None:
    work = make_work(tmp_path, items=12, stores=2, nights=1)
    metrics = json.loads((work / "metrics.json").read_text())
    (work / "metrics.json").unlink()
    assert read_work(str(work)).metrics is None
    own = work / "model" / "runs" / "20240311T010000-aaaaaa" / "metrics.json"
    own.write_text(
        json.dumps(metrics | {"representation": None, "baselines": {"popularity": metrics["baselines"]["popularity"]}})
    )
    found = read_work(str(work))
    assert found.metrics_path == str(own)
    assert main(["--run", str(work)]) == 0
    text = (work / "report" / "index.html").read_text()
    assert "LightGBM on the same features has not been trained yet" in text and "python -m benchmarks.baselines" in text
    assert "This is the first night" in text


def test_gates_are_told_in_words_and_those_that_were_overridden_first(tmp_path: Path) -> None:
    work = make_work(tmp_path, items=12, stores=2, nights=1)
    (manifest,) = (work / "scores" / "runs").glob("*/manifest.json")
    gates = [
        {"name": "audience_met", "passed": True, "words": "12 of 12 audience rows meet a listing"},
        {"name": "known_user_age_group", "passed": False, "words": "<b>2</b> of 12 are known"},
    ]
    edit_document(manifest, lambda value: value.update(gates=gates))
    rows = gate_rows(read_work(str(work)))
    assert [(row.title, row.passed) for row in rows] == [
        ("Users' age group that the model knows", False),
        ("Audience rows that meet a listing", True),
    ]
    assert main(["--run", str(work)]) == 0
    text = (work / "report" / "index.html").read_text()
    assert "1 of 2 gates passed before publication" in text and "12 of 12 audience rows meet a listing" in text
    assert "overridden" in text and "&lt;b&gt;2&lt;/b&gt; of 12 are known" in text and "<b>2</b>" not in text


def test_run_without_alignment_and_early_stop_renders(tmp_path: Path) -> None:
    work = make_work(tmp_path, items=12, stores=2, nights=1)
    run = work / "model" / "runs" / "20240311T010000-aaaaaa"
    rows = list(csv.DictReader((run / "curves.csv").open()))
    for row in rows:
        row |= {"ita": "0", "tia": "0", "contrastive": "0", "early_stop_log_loss": "", "expert_3": "0"}
    with (run / "curves.csv").open("w", newline="") as handle:
        writer = csv.DictWriter(handle, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows[:1])
    (run / "retrieval.json").write_text('{"queries": []}')
    assert main(["--run", str(work)]) == 0
    text = (work / "report" / "index.html").read_text()
    assert "hardly used at the end: expert 3" in text
    assert "run holds no examples" in text


def test_books_and_funnel_balance(work: Path) -> None:
    found = read_work(str(work))
    assert all(account.balances for account in table_accounting(found))
    steps = click_funnel(found)
    assert steps is not None
    assert sum(step.rows for step in steps[:-1]) == steps[-1].rows == 77_000
    assert steps[-2].offset == pytest.approx(0.77)
    found.manifests["shards"].counts["clicks"]["out"] -= 1
    assert [account.table for account in table_accounting(found) if not account.balances] == ["clicks"]


def test_quality_marks_the_better_value_by_each_metrics_direction(work: Path) -> None:
    found = read_work(str(work))
    result = quality(found)
    assert result is not None
    best = {row.metric.name: result["titles"][row.best] for row in result["rows"]}
    assert best == {
        "auc": "CameNN",
        "gauc": "LightGBM",
        "session_auc": "CameNN",
        "ndcg_at_10": "CameNN",
        "hr_at_10": "CameNN",
        "log_loss": "CameNN",
        "ne": "CameNN",
        "ece": "Popularity",
        "pcoc": "Popularity",
    }
    assert result["words"][1] == "It has the best value in 6 of 9 measures."


def test_quality_prefers_none_of_values_that_look_alike(work: Path) -> None:
    found = read_work(str(work))
    assert found.metrics is not None
    test, baselines = found.metrics["test"], found.metrics["baselines"]
    for pcoc, words in ((1.00021, "as many purchases as"), (0.96, "4.0% fewer purchases than")):
        test["pcoc"] = pcoc
        for column in baselines.values():
            column["pcoc"] = pcoc + 1e-6
        result = quality(found)
        assert result is not None and result["words"][-1] == f"In all, it predicts {words} there were."
        assert [row.best for row in result["rows"] if row.metric.name == "pcoc"] == [None]


def test_quality_without_baselines_marks_nothing(work: Path) -> None:
    found = read_work(str(work))
    assert found.metrics is not None
    found.metrics["baselines"] = {}
    result = quality(found)
    assert result is not None and all(row.best is None for row in result["rows"])


def test_flagged_listings_come_by_lost_orders_with_flag_counts(work: Path) -> None:
    found = read_flagged(read_work(str(work)))
    assert found is not None
    frame, flags, listings = found
    assert listings == 90
    assert flags["no_image"] == 18
    assert frame["lost_orders"].is_monotonic_decreasing and frame["lost_orders"].nunique() > 1
    for _, alike in frame.groupby("lost_orders"):
        assert alike["mismatch"].is_monotonic_decreasing
    # A missing photo is known to whoever left it out, so it is not listed.
    assert all("mismatch" in flags for flags in frame["flags"])
    cards = flagged_cards(
        frame, lambda item_id, note, good: Card(item=Item(item_id=item_id), photo=Photo(), note=note, good=good)
    )
    assert cards[0].note == "−6.0 orders" and cards[0].reasons[0].startswith("photo and title do not belong together (")
    assert "clicks in 28 days" in cards[0].activity


def test_trends_are_what_was_published_night_after_night(tmp_path: Path) -> None:
    root = str(tmp_path / "scores")
    figures = [("r1", "old", 0.2, 100), ("r2", "old", 0.21, 101), ("r3", "new", 0.25, 102)]
    for run, model, mean, listings in figures:
        summary = {
            "mean_cvr": mean,
            "score_date": f"2026-01-0{run[1]}",
            "model_version": model,
            "listings": listings,
            "rows_out": 7,
            "flagged_mismatch": 5,
            "calibration": {"pcoc": 1.1} if model == "new" else None,
        }
        publish(root, Manifest(stage="score", run=run, summary=summary))
    nights = published_nights(read_work(str(tmp_path)))
    assert [(n.run, n.model, n.mean_cvr, n.listings) for n in nights] == figures
    assert [n.new_model for n in nights] == [False, False, True] and [n.pcoc for n in nights] == [None, None, 1.1]
    plots = trend_plots(nights)
    assert len(plots) == 4 and all(plot["plot"].startswith("<svg") for plot in plots)
    assert "2026-01-03" not in plots[0]["plot"] and "tonight" in plots[0]["plot"]
    assert trend_plots(nights[:1]) == []


def test_nights_that_failed_or_were_cut_off_are_shown_as_such(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for code, message in ((0, ""), (2, "shards: table 'orders' is missing"), (None, "")):
        night, _ = new_night(str(tmp_path), {})
        night.stages.append(StageRecord("embed", "done", seconds=2.0))
        night.exit_code, night.message = code, message
        night.write()
    rows = night_rows(read_work(str(tmp_path)))
    assert [(row.number, row.exit_code) for row in rows] == [(3, None), (2, 2), (1, 0)]
    assert rows[0].words == "running, or cut off" and rows[1].message == "shards: table 'orders' is missing"
    assert rows[2].stages == "embed done" and rows[2].seconds == 2.0


def test_top_by_store_equals_plain_mean(work: Path) -> None:
    manifest = read_work(str(work)).manifests["score"]
    best = top_by_store(digest_scores(manifest, with_stores=True), 3)
    plain = pd.concat(pd.read_parquet(path) for path in manifest.paths("scores"))
    plain["store_id"] = plain["audience_id"].str.split("@").str[0]
    expected = (
        plain.groupby(["store_id", "item_id"], observed=True)["cvr"]
        .mean()
        .reset_index()
        .sort_values(["store_id", "cvr"], ascending=[True, False])
    )
    expected = expected.groupby("store_id").head(3)
    assert best["item_id"].tolist() == expected["item_id"].tolist()
    np.testing.assert_allclose(best["cvr"], expected["cvr"], rtol=1e-6)


def make_digest(logit_mean: float, top: list[tuple[str, str]]) -> ScoreDigest:
    bins = np.clip(np.random.default_rng(1).normal(1400 + logit_mean, 100, 50_000).astype(int), 0, 2801)
    return ScoreDigest(
        rows=50_000,
        mean=0.1,
        histogram=np.bincount(bins, minlength=2802),
        stores=pd.DataFrame(),
        top=pd.DataFrame(top, columns=["audience_id", "item_id"]),
    )


def test_drift_is_nothing_between_equal_nights_and_large_after_a_shift() -> None:
    before = make_digest(0, [("a", "x"), ("a", "y"), ("gone", "x")])
    same = compare_nights(before, before)
    assert same.psi == pytest.approx(0, abs=1e-9) and same.changed == 0 and same.mean_change == 0
    moved = compare_nights(make_digest(100, [("a", "x"), ("a", "z"), ("new", "x")]), before)
    assert moved.psi > 0.5
    assert (moved.changed, moved.compared) == (1, 2)


def test_decile_shares_are_near_a_tenth_without_drift() -> None:
    histogram = make_digest(0, []).histogram
    np.testing.assert_allclose(decile_shares(histogram, histogram), 0.1, atol=0.01)


def test_psi_equals_its_formula() -> None:
    q, p = np.array([0.3, 0.7]), np.array([0.5, 0.5])
    assert population_stability_index(q, p) == pytest.approx(-0.2 * np.log(0.6) + 0.2 * np.log(1.4))


def test_drift_section_compares_with_the_run_before(tmp_path: Path) -> None:
    work = make_work(tmp_path, items=24, stores=2, nights=2)
    found = read_work(str(work))
    assert found.previous_scores is not None and found.previous_scores.run < found.manifests["score"].run
    drift = compare_nights(
        digest_scores(found.manifests["score"], with_stores=False),
        digest_scores(found.previous_scores, with_stores=False),
    )
    assert drift.mean == pytest.approx(drift.previous_mean, rel=0.1)
    assert drift.shares.sum() == pytest.approx(1)


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        (None, "no photo"),
        ("photos/none.jpg", "file not found"),
        ("../secret.jpg", "outside root"),
        ("https://x/y.jpg", "unsupported scheme"),
        ("gs://b/y.jpg", "outside root"),
        ("note.jpg", "not an image"),
        ("folder", "not a file"),
    ],
)
def test_photo_that_cannot_be_shown_has_a_reason(tmp_path: Path, uri: str | None, reason: str) -> None:
    (tmp_path / "note.jpg").write_text("not a photo")
    (tmp_path / "folder").mkdir()
    photo = Photos(str(tmp_path), allow_absolute=False).find(uri)
    assert (photo.source, photo.reason) == ("", reason)


def test_thumbnail_is_small_upright_and_keeps_its_aspect(tmp_path: Path) -> None:
    image = Image.new("RGB", (600, 300), "red")
    exif = Image.Exif()
    exif[274] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    source = thumbnail((tmp_path / "turned.jpg").read_bytes())
    with Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))) as small:
        assert small.size == (84, 168)
    assert len(source) < 20_000


def test_plot_svg_takes_colours_from_the_page_and_has_own_ids() -> None:
    text = plot_reliability(np.array([0.1, 0.2]), np.array([0.12, 0.19]), np.array([100, 101]))
    assert text.startswith("<svg role=") and text.endswith("</svg>")
    assert "var(--s1)" in text and "#0000" not in text
    assert all(name.startswith("plot-reliability-") for name in re.findall(r'\bid="([^"]*)"', text))
    assert text == plot_reliability(np.array([0.1, 0.2]), np.array([0.12, 0.19]), np.array([100, 101]))


@pytest.mark.parametrize("stage", sorted(REPEAT_FLAGS))
def test_repeat_command_uses_only_flags_that_the_stage_has(stage: str) -> None:
    flags = {flag.removeprefix("--") for action in PARSERS[stage]()._actions for flag in action.option_strings}
    assert set(REPEAT_FLAGS[stage]) <= flags


def test_repeat_command_quotes_and_maps_nested_options() -> None:
    options = {
        "shards": "my shards",
        "alignment": False,
        "optimizer": {"learning_rate": 0.001},
        "loss": {"weighting": "fixed"},
        "seed": 0,
        "patience": 4,
    }
    words = repeat_command("train", Manifest(stage="train", run="r", options=options))
    assert words == [
        "camenn train",
        "--shards 'my shards'",
        "--learning_rate 0.001",
        "--weighting fixed",
        "--no_alignment",
        "--seed 0",
    ]


def test_encoders_are_named_by_their_models(work: Path) -> None:
    shown_work = read_work(str(work))
    assert [row["title"] for row in encoders(shown_work)] == ["Photos: InceptionV4", "Titles: BERT"]
    image, text = (shown_work.manifests["embed"].options[name] for name in ("image", "text"))
    assert not any("--image_model" in word for word in repeat_command("embed", shown_work.manifests["embed"]))
    image |= {"model": "resnet18", "named_model": "resnet18.a1_in1k"}
    text |= {"model": "xlm-roberta"}
    assert [row["title"] for row in encoders(shown_work)] == ["Photos: resnet18", "Titles: xlm-roberta"]
    assert "--image_model resnet18.a1_in1k" in repeat_command("embed", shown_work.manifests["embed"])


def test_timings_take_each_stages_own_work(work: Path) -> None:
    found = {row["stage"]: row for row in timings(read_work(str(work)))}
    assert (found["train"]["rows"], found["train"]["speed"], found["train"]["unit"]) == (76_800, 121.4, "examples")
    assert found["score"]["unit"] == "pairs" and found["score"]["speed"] == pytest.approx(180 / 31.5)
    assert found["train"]["share"] == 1.0


def test_render_fails_on_a_value_that_the_context_lacks() -> None:
    with pytest.raises(Exception, match="undefined"):
        render({})


@pytest.mark.parametrize(("seconds", "text"), [(None, "–"), (8.24, "8.2 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")])
def test_duration_reads_as_people_say_it(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


def test_numbers_that_do_not_exist_are_dashes() -> None:
    assert number(None) == number(float("nan")) == percent(None) == "–"
    assert percent(0.00004) == "<0.1%"
    assert shown({"a_b": 1_000, "ok": True}) == "a b 1,000, ok yes"


def test_details_and_store_figures_equal_plain_means(work: Path) -> None:
    found = read_work(str(work))
    manifest = found.manifests["score"]
    scores, audience, quality_rows, items = (
        pd.concat([pd.read_parquet(path, partitioning=None) for path in manifest.paths(table)])
        for table in ("scores", "audience", "listing_quality", "items")
    )
    rows = scores.merge(audience, on="audience_id")
    wanted = {"i000000", "i000024", "i000078", "unheard of"}
    details = read_details(found, wanted)
    assert set(details) == wanted - {"unheard of"}
    for item_id, detail in details.items():
        own = rows[rows["item_id"] == item_id]
        assert (detail.rows, detail.best_rank) == (len(own), own["rank"].min())
        assert detail.mean == pytest.approx(own["cvr"].mean())
        assert [hour.label for hour in detail.hours] == ["9 h", "18 h"]
        for hour in (9, 18):
            shown_hour = detail.hours[(9, 18).index(hour)]
            assert shown_hour.cvr == pytest.approx(own[own["hour"] == hour]["cvr"].mean())
        assert max(hour.share for hour in detail.hours) == 1
        known = quality_rows.set_index("item_id").loc[item_id]
        facts = dict(detail.facts)
        assert facts["title belongs to photo"] == f"{known['ita']:.2f}"
        assert ("to fix" in facts) == (len(known["flags"]) > 0)
    figures = store_figures(found, digest_scores(manifest, with_stores=True), ["s001", "s003"])
    marked = set(quality_rows[quality_rows["flags"].map(len) > 0]["item_id"])
    for store_id, one in figures.items():
        own = rows[rows["store_id"] == store_id]
        assert one.listings == own["item_id"].nunique()
        assert one.mean == pytest.approx(own["cvr"].mean())
        assert one.against_all == pytest.approx(own["cvr"].mean() / rows["cvr"].mean() - 1, abs=1e-5)
        assert one.flagged == len(marked & set(items[items["store_id"] == store_id]["item_id"])) > 0


def test_many_stores_are_bounded_and_listed(tmp_path: Path) -> None:
    work = make_work(tmp_path, items=120, stores=40, nights=1)
    assert main(["--run", str(work)]) == 0
    text = (work / "report" / "index.html").read_text()
    assert text.count('class="store"') == 24
    assert "16 more stores" in text


def test_items_come_from_the_scored_catalog_then_from_the_shards(tmp_path: Path) -> None:
    work = make_work(tmp_path, items=12, stores=2, nights=1)
    found = read_work(str(work))
    assert set(read_items(found, {"i000001", "gone"})) == {"i000001"}
    found.manifests["shards"].tables["items"] = found.manifests["score"].tables.pop("items")
    assert set(read_items(found, {"i000001"})) == {"i000001"}
    found.manifests["shards"].tables.pop("items")
    assert read_items(found, {"i000001"}) == {}


def test_listing_that_no_catalog_has_is_shown_by_its_id(tmp_path: Path) -> None:
    work = make_work(tmp_path, items=12, stores=2, nights=1)
    path = work / "model" / "runs" / "20240311T010000-aaaaaa" / "retrieval.json"
    results = [{"item_id": "gone-7", "cosine": 0.5, "same_product": False}]
    path.write_text(json.dumps({"queries": [{"direction": "image_to_text", "item_id": "i000000", "results": results}]}))
    assert main(["--run", str(work)]) == 0
    text = (work / "report" / "index.html").read_text()
    assert "gone-7" in text and "not in the catalog" in text


def test_quality_marks_no_value_on_a_tie(work: Path) -> None:
    found = read_work(str(work))
    assert found.metrics is not None
    found.metrics["baselines"] = {"popularity": dict(found.metrics["test"])}
    result = quality(found)
    assert result is not None and all(row.best is None for row in result["rows"])
