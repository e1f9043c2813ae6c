"""The whole way, once, on a tiny city.

It runs the real encoders, Beam and CameNN. Then it checks the view of a consumer, and a second run.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from pipelines import cli
from pipelines.runs.manifest import read_latest
from tests.support.documents import vouch_for
from tests.support.encoder_sources import minilm


class City:
    """A tiny city and a working directory, with one method per command. Each returns the command's closing table."""

    def __init__(self, root: Path) -> None:
        self.data, self.work = root / "data", root / "work"
        self.text_encoder = minilm()

    def run(self, capfd: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
        assert cli.main([*argv, "--json"]) == 0
        table: dict[str, Any] = json.loads(capfd.readouterr().out.strip().splitlines()[-1])
        assert {"rows_in", "rows_out", "rejected", "encoded_images", "encoded_titles", "seconds", "out"} <= set(table)
        return table

    def embed(self, capfd: pytest.CaptureFixture[str]) -> dict[str, Any]:
        flags = [
            "--image_weights",
            "random:0",
            "--text_encoder",
            str(self.text_encoder),
            "--grid",
            "2",
            "--max_tokens",
            "16",
        ]
        return self.run(capfd, "embed", "--data", str(self.data), "--store", str(self.work / "store"), *flags)

    def shards(self, capfd: pytest.CaptureFixture[str], *extra: str) -> dict[str, Any]:
        return self.run(
            capfd,
            "shards",
            "--data",
            str(self.data),
            "--store",
            str(self.work / "store"),
            "--out",
            str(self.work / "shards"),
            *extra,
        )

    def train(self, capfd: pytest.CaptureFixture[str], *extra: str) -> dict[str, Any]:
        return self.run(
            capfd,
            "train",
            "--shards",
            str(self.work / "shards"),
            "--out",
            str(self.work / "model"),
            "--batch_size",
            "128",
            *extra,
        )

    def score_flags(self, out: str) -> list[str]:
        return [
            "--data",
            str(self.data),
            "--store",
            str(self.work / "store"),
            "--model",
            str(self.work / "model"),
            "--out",
            str(self.work / out),
            "--top_k",
            "10",
        ]

    def score(self, capfd: pytest.CaptureFixture[str], *extra: str, out: str = "scores") -> dict[str, Any]:
        return self.run(capfd, "score", *self.score_flags(out), *extra)


@pytest.fixture(scope="module")
def city(tmp_path_factory: pytest.TempPathFactory) -> City:
    return City(tmp_path_factory.mktemp("city"))


def table(root: Path, name: str) -> pd.DataFrame:
    """A published table, ordered, without what differs by run."""
    manifest = read_latest(str(root))
    assert manifest is not None
    tables = [pq.ParquetFile(path).read() for path in manifest.paths(name)]
    frame = pa.concat_tables(tables).to_pandas()
    keys = [
        column
        for column in ("audience_id", "user_id", "session_id", "item_id", "image_key", "title_key")
        if column in frame
    ]
    return frame.sort_values(keys, ignore_index=True)


def assert_rows_reconcile(root: Path) -> None:
    manifest = read_latest(str(root))
    assert manifest is not None and manifest.counts
    for name, row in manifest.counts.items():
        assert row["in"] == sum(rows for where, rows in row.items() if where != "in"), (name, row)


def test_whole_way_once(city: City, capfd: pytest.CaptureFixture[str]) -> None:
    made = city.run(capfd, "simulate", "--out", str(city.data), "--preset", "tiny")
    assert made["listings"] == 120

    embedded = city.embed(capfd)
    catalog = pq.read_table(city.data / "catalog.parquet").to_pandas()
    assert embedded["rows_in"] == embedded["rows_out"] == len(catalog)
    assert embedded["encoded_titles"] == catalog["title"].nunique()
    assert 0 < embedded["encoded_images"] <= catalog["image_uri"].nunique()
    assert_rows_reconcile(city.work / "store")

    sharded = city.shards(capfd)
    assert sharded["rows_in"] == len(pq.read_table(city.data / "clicks.parquet"))
    assert sharded["rows_out"] == sum(sharded["examples"].values())
    assert_rows_reconcile(city.work / "shards")
    # Each distinct photo and title in use stands in contents once.
    assert sharded["contents_copied"] == embedded["encoded_images"] + embedded["encoded_titles"]

    trained = city.train(capfd)
    assert 0 < trained["test_log_loss"] < 1
    package = next((city.work / "model" / "runs").iterdir())
    files = [path for path in package.iterdir() if path.name != ".camenn"]
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".csv"}

    scored = city.score(capfd)
    assert scored["rows_out"] == scored["rows_in"] * 10
    assert_rows_reconcile(city.work / "scores")


def test_scores_open_in_pandas_duckdb_and_pyarrow(city: City) -> None:
    manifest = read_latest(str(city.work / "scores"))
    assert manifest is not None
    directory = manifest.summary["scores"]
    date = manifest.summary["score_date"]
    by_pandas = pd.read_parquet(directory)
    by_arrow = ds.dataset(directory, partitioning="hive").to_table().to_pandas()
    relation = duckdb.sql(f"select * from read_parquet('{directory}/**/*.parquet', hive_partitioning = true)")
    assert relation is not None
    by_duckdb = relation.df()
    assert len(by_pandas) == len(by_arrow) == len(by_duckdb) == manifest.rows("scores")
    for frame in (by_pandas, by_arrow, by_duckdb):
        assert set(frame["score_date"].astype(str).str[:10]) == {date}
        assert frame["cvr"].between(0, 1).all()
        assert np.isclose(frame["cvr"].sum(), by_pandas["cvr"].sum())


def test_scores_ranks_run_from_one_by_falling_cvr(city: City) -> None:
    scores = table(city.work / "scores", "scores")
    for _, row in scores.groupby("audience_id"):
        row = row.sort_values("rank")
        assert row["rank"].tolist() == list(range(1, len(row) + 1))
        assert (np.diff(row["cvr"]) <= 0).all()
        assert row["item_id"].is_unique


def test_scores_meet_only_their_own_store(city: City) -> None:
    scores = table(city.work / "scores", "scores")
    stores = pq.read_table(city.data / "catalog.parquet").to_pandas().set_index("item_id")["store_id"]
    audience = table(city.work / "scores", "audience").set_index("audience_id")["store_id"]
    assert (scores["item_id"].map(stores) == scores["audience_id"].map(audience)).all()


def test_scores_equal_the_plain_forward_pass(city: City) -> None:
    """The published numbers against the model's own forward pass over the same pairs, assembled one by one."""
    import torch

    from camenn_model.batch import Batch, PairBatch
    from camenn_model.data.contents import Contents
    from camenn_model.data.item_table import ItemTable
    from camenn_model.package import open_package
    from pipelines.features.as_of import item_attributes
    from pipelines.score.audience_rows import AudienceRows
    from pipelines.score.snapshot import Snapshot
    from pipelines.score.tiles import encode_tile

    manifest = read_latest(str(city.work / "scores"))
    assert manifest is not None
    run = Path(manifest.paths("items")[0]).parent.parent
    package = open_package(str(city.work / "model"))
    items = pq.ParquetFile(run / "items" / "part-0.parquet").read()
    images, titles = (Contents(manifest.paths(f"contents_{kind}s"), f"{kind}_key") for kind in ("image", "title"))
    items_table = ItemTable(items, images, titles, config=package.config).encode(package.space)
    audience = pq.ParquetFile(run / "audience" / "part-0.parquet").read().to_pandas()
    rows = AudienceRows.read(pq.ParquetFile(run / "audience_features" / "part-0.parquet").read())
    snapshot, attributes = Snapshot.read(str(run / "snapshot")), item_attributes(items)
    scores = table(city.work / "scores", "scores").sample(40, random_state=0)
    item_row = {item: place for place, item in enumerate(items["item_id"].to_pylist())}
    model = package.model()
    for audience_id, item_id, cvr in scores[["audience_id", "item_id", "cvr"]].itertuples(index=False):
        a, i = int(np.flatnonzero(audience["audience_id"] == audience_id)[0]), np.array([item_row[item_id]])
        columns = snapshot.tile(
            rows.user[a : a + 1], rows.store[a : a + 1], i, attributes.subcategory[i], attributes.brand[i]
        )
        values, buckets = encode_tile(package.space.numbers, columns, (1, 1))
        audience_batch, history = rows.batch(slice(a, a + 1))
        zero = torch.zeros(1, dtype=torch.int64)
        pairs = PairBatch(
            item=zero,
            audience=zero,
            values=torch.from_numpy(values[0]),
            buckets=torch.from_numpy(buckets[0]),
            position=zero,
            label=torch.zeros(1),
        )
        with torch.inference_mode():
            logit = model(
                Batch(
                    items=items_table.batch(i),
                    audience=audience_batch,
                    history=items_table.history(history),
                    pairs=pairs,
                )
            ).logits
        assert abs(float(package.calibration(logit.numpy())[0]) - cvr) < 1e-5


PUBLISHED = (
    ("store", "items"),
    ("shards", "examples"),
    ("shards", "items"),
    ("scores", "scores"),
    ("scores", "listing_quality"),
)


def test_second_run_encodes_nothing_and_changes_no_row(city: City, capfd: pytest.CaptureFixture[str]) -> None:
    before = [table(city.work / root, name) for root, name in PUBLISHED]
    embedded = city.embed(capfd)
    assert embedded["encoded_images"] == embedded["encoded_titles"] == 0
    for again in (city.shards, city.train, city.score):
        assert again(capfd)["unchanged"] is True
    # Actually run again, every stage gives the same rows, and training a bitwise equal model.
    version = city.score(capfd)["model_version"]
    assert city.shards(capfd, "--rerun")["contents_copied"] == 0
    city.train(capfd, "--rerun")
    assert city.score(capfd, "--rerun")["model_version"] == version
    for (root, name), frame in zip(PUBLISHED, before, strict=True):
        pd.testing.assert_frame_equal(table(city.work / root, name), frame)


def test_score_as_of_an_earlier_date_reads_nothing_later(city: City, capfd: pytest.CaptureFixture[str]) -> None:
    """A backfill gives the same rows whether or not the log goes on after its date."""
    clicks = pq.read_table(city.data / "clicks.parquet")
    date = str(np.sort(clicks["clicked_at"].to_numpy())[len(clicks) // 2].astype("datetime64[D]"))
    city.score(capfd, "--score_date", date, out="backfill")
    whole = table(city.work / "backfill", "scores")
    cut = City(city.data.parent)
    cut.data = city.data.parent / "cut"
    cut.data.mkdir()
    for path in city.data.glob("*.parquet"):
        rows = pq.read_table(path)
        for column in ("clicked_at", "ordered_at"):
            if column in rows.column_names:
                rows = rows.filter(pc.less(rows[column], pa.scalar(np.datetime64(date, "us"))))
        pq.write_table(rows, cut.data / path.name)
    cut.score(capfd, "--score_date", date, out="backfill_cut")
    pd.testing.assert_frame_equal(table(city.work / "backfill_cut", "scores"), whole)


def test_drafted_in_bf16_the_best_are_the_same_and_their_cvr_too(city: City, capfd: pytest.CaptureFixture[str]) -> None:
    city.score(capfd, "--precision", "bf16", out="drafted")
    pd.testing.assert_frame_equal(
        table(city.work / "drafted", "scores"), table(city.work / "scores", "scores"), rtol=1e-5
    )
    assert city.run(capfd, "score", *city.score_flags("never"), "--precision", "bf16", "--plan")["score_seconds"] > 0
    assert cli.main(["score", *city.score_flags("never"), "--precision", "bf16", "--top_k", "0"]) == 2
    assert "give --top_k 1 or more" in capfd.readouterr().err


def test_a_night_that_lost_half_of_its_listings_is_gated(city: City, capfd: pytest.CaptureFixture[str]) -> None:
    """Readers keep last night's scores, the exit code is 3, and the message gives the remedy, which then works."""
    scores = city.work / "scores"
    before = read_latest(str(scores))
    assert before is not None
    catalog = pq.read_table(city.data / "catalog.parquet")
    places = [
        "--store",
        str(city.work / "store"),
        "--model",
        str(city.work / "model"),
        "--out",
        str(scores),
        "--top_k",
        "10",
    ]
    # The file itself is restored: a rewritten one would be another input for the tests below.
    aside = (city.data / "catalog.parquet").rename(city.work / "whole_catalog.parquet")
    try:
        pq.write_table(catalog.slice(0, catalog.num_rows // 2), city.data / "catalog.parquet")
        assert cli.main(["score", "--data", str(city.data), *places, "--max_reject_rate", "1"]) == 3
    finally:
        aside.replace(city.data / "catalog.parquet")
    said = capfd.readouterr().err
    assert "camenn: gated: " in said and "60 listings are 0.500 of" in said
    assert read_latest(str(scores)) == before
    run = re.search(r"camenn publish (\S+) --force", said)
    assert run is not None
    assert cli.main(["publish", run[1], "--force", "--reason", "half of the shops closed"]) == 0
    now = read_latest(str(scores))
    assert now is not None and now.rows("listing_quality") == 60
    assert cli.main(["rollback", "--out", str(scores)]) == 0
    assert read_latest(str(scores)) == before


def store_audience(city: City) -> tuple[pa.Table, pa.Table]:
    """(Three audience rows of every store, all pairs of them as candidates)."""
    catalog = pq.read_table(city.data / "catalog.parquet", columns=["item_id", "store_id"]).to_pylist()
    stores = sorted({row["store_id"] for row in catalog})
    rows = [
        {"audience_id": f"{store}@{hour}", "user_id": None, "store_id": store, "hour": hour}
        for store in stores
        for hour in (2, 10, 18)
    ]
    schema = pa.schema(
        [
            (name, pa.int64() if name == "hour" else pa.string())
            for name in ("audience_id", "user_id", "store_id", "hour")
        ]
    )
    pairs = [
        {"audience_id": row["audience_id"], "item_id": listing["item_id"]}
        for row in rows
        for listing in catalog
        if listing["store_id"] == row["store_id"]
    ]
    return pa.Table.from_pylist(rows, schema=schema), pa.Table.from_pylist(pairs)


def test_a_night_that_scored_a_tenth_is_gated_and_moves_no_bar(
    city: City, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Candidates that were cut off, twice; then whole ones again, against the night before the fault."""
    audience, pairs = store_audience(city)
    whole = data_with(city, tmp_path / "whole", audience=audience, candidates=pairs)
    cut = data_with(city, tmp_path / "cut", audience=audience, candidates=pairs.slice(0, pairs.num_rows // 10))
    whole.score(capfd, out="by_candidates")
    before = read_latest(str(city.work / "by_candidates"))
    for _ in range(2):
        assert cli.main(["score", *cut.score_flags("by_candidates")]) == 3
        said = capfd.readouterr().err
        assert "2 of 12 audience rows meet a listing, 0.167 of the night published last" in said
        assert "36 of 36 different rows of table 'candidates' name an audience row and a listing, 0.100 of" in said
        assert read_latest(str(city.work / "by_candidates")) == before
    # By force it is published, and becomes the reference of the overridden gates.
    held = re.search(r"camenn publish (\S+) --force", said)
    assert held is not None and cli.main(["publish", held[1], "--force", "--reason", "a trial"]) == 0
    assert cut.score(capfd, "--rerun", out="by_candidates")["rows_out"] == 16
    manifest = read_latest(str(city.work / "by_candidates"))
    assert manifest is not None and all(gate["passed"] for gate in manifest.gates)


def test_stores_that_are_written_otherwise_are_told(
    city: City, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    audience, _ = store_audience(city)
    catalog = pq.read_table(city.data / "catalog.parquet")
    stores = catalog["store_id"].to_pylist()
    first = min(stores)

    def upper(name: str, which: set[str]) -> City:
        # The catalog stands in the place of the link to the city's own.
        other = data_with(city, tmp_path / name, audience=audience)
        (other.data / "catalog.parquet").unlink()
        column = pa.array([store.upper() if store in which else store for store in stores])
        place = catalog.column_names.index("store_id")
        pq.write_table(catalog.set_column(place, "store_id", column), other.data / "catalog.parquet")
        return other

    data_with(city, tmp_path / "right", audience=audience).score(capfd, out="by_store")
    assert cli.main(["score", *upper("three", set(stores) - {first}).score_flags("by_store")]) == 3
    said = capfd.readouterr().err
    assert "90 of 90 pairs are scored, 0.250 of the night published last" in said
    assert "9 of them would join if upper and lower case made no difference" in said
    # None joins: nothing is scored, on a first night neither.
    assert cli.main(["score", *upper("all", set(stores)).score_flags("never_by_store")]) == 2
    said = capfd.readouterr().err
    assert "audience.parquet: column 'store_id'" in said and "catalog.parquet: column 'store_id'" in said
    assert f"'{first}' here is '{first.upper()}' there" in said and "Nothing was scored" in said
    assert not (city.work / "never_by_store" / "runs").exists()


def test_report_is_written(city: City, capfd: pytest.CaptureFixture[str]) -> None:
    reported = city.run(capfd, "report", "--run", str(city.work))
    page = (city.work / "report" / "index.html").read_text()
    assert "data:image/" in page
    # Self-contained: nothing is fetched from anywhere. (A browser watches the same in test_report_browser.)
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", page)
    assert reported["out"] == str(city.work / "report")


def test_doctor_has_the_common_fields_too(city: City, capfd: pytest.CaptureFixture[str]) -> None:
    assert city.run(capfd, "doctor", "--image_weights", "random:0", "--text_encoder", city.text_encoder)["fail"] == 0


def test_nightly_runs_the_stages_and_changes_nothing_the_second_time(
    city: City, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = tmp_path / "city.toml"
    config.write_text(
        f"""
        data = "{city.data}"
        work = "{city.work}"
        [embed]
        image_weights = "random:0"
        text_encoder = "{city.text_encoder}"
        grid = 2
        max_tokens = 16
        [train]
        batch_size = 128
        [score]
        top_k = 10
        """
    )
    before = table(city.work / "scores", "scores")
    night = city.run(capfd, "nightly", "--config", str(config))
    # Scoring checks the model's calibration now, which it did not by hand; everything else is unchanged.
    assert night["encoded_images"] == 0
    assert night["stages"] == {
        "embed": "done",
        "shards": "unchanged",
        "train": "not due",
        "score": "done",
        "report": "done",
        "gc": "done",
    }
    pd.testing.assert_frame_equal(table(city.work / "scores", "scores"), before)
    again = city.run(capfd, "nightly", "--config", str(config))
    assert again["stages"]["score"] == "unchanged" and again["published"] == night["published"]


def test_score_plan_counts_the_pairs_and_scores_nothing(city: City, capfd: pytest.CaptureFixture[str]) -> None:
    before = read_latest(str(city.work / "scores"))
    scored = city.run(capfd, "score", *city.score_flags("planned"), "--plan")
    assert before is not None and scored["pairs"] == before.summary["pairs"]
    assert scored["rows_out"] == before.rows("scores")
    # Nothing was scored there yet: the time is estimated from a tile.
    assert scored["score_seconds"] > 0 and "tile" in scored["estimated_from"]
    assert not (city.work / "planned").exists()
    known = city.run(capfd, "score", *city.score_flags("scores"), "--plan")
    assert before.run in known["estimated_from"] and known["pairs"] == scored["pairs"]


def data_with(city: City, root: Path, **tables: pa.Table) -> City:
    """The city with further tables beside its own."""
    other = City(root)
    other.data.mkdir(parents=True)
    for path in city.data.iterdir():
        (other.data / path.name).symlink_to(path)
    for name, table in tables.items():
        pq.write_table(table, other.data / f"{name}.parquet")
    other.work = city.work
    return other


def test_every_candidate_and_every_audience_row_has_one_outcome(
    city: City, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    listings = pq.read_table(city.data / "catalog.parquet", columns=["item_id", "store_id"]).to_pandas()
    here, elsewhere = (group["item_id"].tolist() for _, group in list(listings.groupby("store_id"))[:2])
    store = listings.set_index("item_id")["store_id"][here[0]]
    asked = [("a", here[0]), ("a", here[0]), ("a", here[1]), ("a", elsewhere[0]), ("b", here[0]), ("nobody", here[0])]
    audience = {
        "audience_id": ["a", "b"],
        "user_id": [None, "stranger"],
        "store_id": [store, "nowhere"],
        "hour": [9, 10],
    }
    other = data_with(
        city,
        tmp_path / "other",
        audience=pa.table(audience),
        candidates=pa.table({"audience_id": [who for who, _ in asked], "item_id": [item for _, item in asked]}),
    )
    summary = other.score(capfd, out="candidates")
    assert (summary["pairs"], summary["rows_out"]) == (2, 2)
    manifest = read_latest(str(city.work / "candidates"))
    assert manifest is not None
    assert manifest.counts["candidates"] == {"in": 6, "unknown_id": 1, "duplicates": 1, "other_store": 2, "out": 2}
    assert manifest.counts["audience"] == {"in": 2, "out": 1, "no_listing": 1}
    assert_rows_reconcile(city.work / "candidates")
    scores = table(city.work / "candidates", "scores")
    assert set(scores["item_id"]) == {*here[:2]} and set(scores["audience_id"]) == {"a"}


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            {"audience_id": ["nobody"], "item_id": ["nothing"]},
            "none of 1 rows of table 'candidates' is a pair to score: 1 name",
        ),
        (None, "table 'audience' has no row: there is nobody to score for"),
    ],
)
def test_nobody_or_nothing_to_score_is_said(
    city: City, tmp_path: Path, asked: dict[str, list[str]] | None, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = {"audience_id": ["a"], "user_id": ["u"], "store_id": ["s"], "hour": [9]} if asked else {}
    kinds = {"audience_id": pa.string(), "user_id": pa.string(), "store_id": pa.string(), "hour": pa.int64()}
    audience = pa.table({name: pa.array(rows.get(name, []), kind) for name, kind in kinds.items()})
    other = data_with(city, tmp_path / "other", audience=audience, **({"candidates": pa.table(asked)} if asked else {}))
    assert cli.main(["score", *other.score_flags("nobody")]) == 2
    assert message in capfd.readouterr().err


def test_a_model_of_full_attention_is_refused(city: City, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(city.work / "model", tmp_path / "model")
    run = json.loads((tmp_path / "model" / "latest.json").read_text())["run"]
    config = tmp_path / "model" / "runs" / run / "config.json"
    meta = json.loads(config.read_text())
    meta["model"]["attention"] = "full"
    config.write_text(json.dumps(meta))
    vouch_for(config)
    flags = city.score_flags("refused")
    flags[flags.index("--model") + 1] = str(tmp_path / "model")
    assert cli.main(["score", *flags]) == 2
    assert "Train with --attention prefix" in capfd.readouterr().err


def flip(path: Path) -> None:
    """Flip one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


DAMAGES = {
    "a store part": ("store/images/*/part-*[0-9a-f].parquet", "shards", "fsck --repair"),
    "the store's items": ("store/runs/*/items/*", "score", "Run `camenn embed` again"),
    "an example file": ("shards/runs/*/examples/*/*", "train", "shards --rebuild"),
    "the weights": ("model/runs/*/model.safetensors", "score", "camenn train --rerun"),
    "the vocabulary": ("model/runs/*/features.json", "score", "camenn train --rerun"),
    "a pointer": ("shards/latest.json", "train", "fsck --out"),
    "a manifest": ("scores/runs/*/manifest.json", "score", "fsck --out"),
    "published scores": ("scores/runs/*/scores/*/*", "report", "score --rerun"),
}
"""File → the command that reads it, and the command that its message names"""


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_one_line_that_says_what_to_run(
    city: City, tmp_path: Path, capfd: pytest.CaptureFixture[str], damage: str
) -> None:
    pattern, command, remedy = DAMAGES[damage]
    copy = City(tmp_path)
    copy.data = city.data
    shutil.copytree(city.work, copy.work, symlinks=True)
    path = max(copy.work.glob(pattern))
    flip(path)
    flags = {
        "shards": ["--data", str(copy.data), "--store", f"{copy.work}/store", "--out", f"{copy.work}/other"],
        "train": ["--shards", f"{copy.work}/shards", "--out", f"{copy.work}/other"],
        "score": [*copy.score_flags("scores"), "--rerun"],
        "report": ["--run", str(copy.work)],
    }
    capfd.readouterr()
    assert cli.main([command, *flags[command]]) == 2
    error_lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("camenn: error: ")]
    assert len(error_lines) == 1 and path.name in error_lines[0] and remedy in error_lines[0], error_lines
    assert cli.main(["fsck", "--work", str(copy.work)]) == 2
    assert path.name in capfd.readouterr().err


def test_damaged_copies_are_made_again(city: City, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Embeddings that shards and scores keep, and the kept log, are in the store and the logs too."""
    copy = City(tmp_path)
    copy.data = city.data
    shutil.copytree(city.work, copy.work, symlinks=True)
    before = {name: table(copy.work / root, name) for root, name in (("scores", "scores"), ("shards", "examples"))}
    flip(max(copy.work.glob("scores/contents/images/*/part-*")))
    for path in copy.work.glob("scores/contents/titles/*/part-*"):
        path.unlink()
    for pattern in ("shards/contents/titles/*/part-*", "shards/runs/*/kept_clicks/*"):
        flip(max(copy.work.glob(pattern)))
    assert copy.score(capfd, "--rerun")["rows_out"] == len(before["scores"])
    copy.shards(capfd, "--rerun")
    pd.testing.assert_frame_equal(table(copy.work / "scores", "scores"), before["scores"])
    pd.testing.assert_frame_equal(table(copy.work / "shards", "examples"), before["examples"])
    copy.run(capfd, "fsck", "--work", str(copy.work))
