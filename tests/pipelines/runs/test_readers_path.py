"""The path that readers of scores open: it leads to the published run, and never changes."""

import os
import shutil
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from pipelines.cli import main
from pipelines.io import files
from pipelines.io.tables import FileRecord
from pipelines.runs import readers_path
from pipelines.runs.context import Request, open_run
from pipelines.runs.garbage import collect
from pipelines.runs.listing import list_runs
from pipelines.runs.manifest import Manifest, add_files, published_files, read_latest
from pipelines.runs.outputs import find_foreign
from pipelines.runs.publication import publish, republish, rollback
from schemas.errors import InputError

RUNS = ("20260101T000000-aaaaaa", "20260102T000000-bbbbbb", "20260103T000000-cccccc")


def publish_night(root: str, number: int, tables: tuple[str, ...] = ("scores", "listing_quality")) -> Manifest:
    """Publish a run of two files a table, whose `night` says of which run they are."""
    manifest = Manifest(stage="score", run=RUNS[number])
    for name in tables:
        records = []
        for part in range(2):
            rows = pa.table({"item_id": [f"i{part}{row}" for row in range(5)], "night": np.full(5, number)})
            folder = files.join(root, "runs", manifest.run, name, f"score_date=2026-01-0{number + 1}")
            path = files.join(folder, f"part-{part:032x}.parquet")
            records.append(FileRecord.of(name, path, 5, files.write_parquet(path, rows, row_group_size=2)))
        add_files(manifest, {name: ""}, records)
    publish(root, manifest)
    return manifest


def nights_seen(root: Path, table: str = "scores") -> set[int]:
    """Read the path as pandas, pyarrow and DuckDB do; returns the nights that they see."""
    path = root / "published" / table
    frame = pd.read_parquet(path)
    dataset = ds.dataset(str(path), partitioning="hive").to_table()
    duck = duckdb.execute(f"SELECT * FROM read_parquet('{path}/**/*.parquet')").df()
    assert len(frame) == dataset.num_rows == len(duck) == 10
    columns = {"item_id", "night", "score_date"}
    assert set(frame.columns) == set(dataset.column_names) == set(duck.columns) == columns
    seen = [set(found) for found in (frame["night"], dataset["night"].to_pylist(), duck["night"])]
    assert seen[0] == seen[1] == seen[2]
    return {int(night) for night in seen[0]}


def run_at(root: Path) -> list[str | None]:
    return [readers_path.run_at(path) for path in readers_path.reader_paths(str(root), "score").values()]


def test_it_follows_every_publication(tmp_path: Path) -> None:
    root = str(tmp_path)
    publish_night(root, 0)
    assert nights_seen(tmp_path) == nights_seen(tmp_path, "listing_quality") == {0}
    assert os.readlink(tmp_path / "published" / "scores") == f"../runs/{RUNS[0]}/scores"
    publish_night(root, 1)
    assert nights_seen(tmp_path) == {1}
    rollback(root, None)
    assert nights_seen(tmp_path) == {0}
    republish(str(tmp_path / "runs" / RUNS[1]), force=False, reason=None)
    assert nights_seen(tmp_path) == {1}
    listed = list_runs(root)
    assert listed["readers"] == {name: f"{root}/published/{name}" for name in ("scores", "listing_quality")}
    # What else looks into `published/` does not stumble over it.
    assert [number for number, _ in published_files(root)] == [1, 2, 3, 4]
    assert find_foreign(root) == []
    files.mark_own(root)
    (tmp_path / ".lock").touch()
    assert collect(root, 1, None, dry_run=False)["files_not_ours"] == 0
    assert nights_seen(tmp_path) == {1}
    assert main(["fsck", "--out", root]) == 0
    # It is relative: a moved output is as good.
    (tmp_path / "moved").mkdir()
    for name in ("published", "runs"):
        shutil.move(tmp_path / name, tmp_path / "moved" / name)
    assert nights_seen(tmp_path / "moved") == {1}


def test_a_publication_that_was_cut_off_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    root = str(tmp_path)

    def behind() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(readers_path, "update", lambda root, manifest: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                publish_night(root, 1)
        assert nights_seen(tmp_path) == {0} and read_latest(root).run == RUNS[1]  # type: ignore[union-attr]

    publish_night(root, 0)
    behind()
    assert list_runs(root)["readers"] == {}
    request = Request(stage="score", out=root, inputs={}, options={})
    with open_run(request, started=0.0):
        assert nights_seen(tmp_path) == {1}
    assert f"leads to run {RUNS[1]} again" in caplog.text
    rollback(root, None)
    behind()
    assert main(["fsck", "--out", root]) == 2
    assert main(["fsck", "--out", root, "--repair"]) == 2
    assert nights_seen(tmp_path) == {1} and main(["fsck", "--out", root]) == 0
    rollback(root, None)
    behind()
    assert not republish(str(tmp_path / "runs" / RUNS[1]), force=False, reason=None)["published"]
    assert nights_seen(tmp_path) == {1}


def test_what_repair_publishes_is_seen(tmp_path: Path) -> None:
    for number in range(2):
        publish_night(str(tmp_path), number)
    (tmp_path / "latest.json").write_bytes(b"{")
    shutil.rmtree(tmp_path / "runs" / RUNS[1])
    assert main(["fsck", "--out", str(tmp_path), "--repair"]) == 2
    assert nights_seen(tmp_path) == {0}


def test_rows_of_a_repeated_attempt_are_not_seen(tmp_path: Path) -> None:
    manifest = publish_night(str(tmp_path), 0)
    publish_night(str(tmp_path), 1)
    listed = Path(manifest.listed("scores")[0])
    left = listed.with_name(f"part-{'f' * 32}.parquet")
    shutil.copy(listed, left)
    own = left.with_name("own.parquet")
    own.touch()
    rollback(str(tmp_path), None)
    assert not left.exists() and listed.exists()
    assert own.exists()


def test_a_run_without_rows_has_no_path(tmp_path: Path) -> None:
    publish_night(str(tmp_path), 0)
    publish_night(str(tmp_path), 1, tables=("listing_quality",))
    assert run_at(tmp_path) == [None, RUNS[1]]
    publish(str(tmp_path / "store"), Manifest(stage="embed", run=RUNS[0]))
    assert sorted(os.listdir(tmp_path / "store" / "published")) == ["00000001.json"]


def test_a_copy_that_followed_the_links_is_put_right(tmp_path: Path) -> None:
    publish_night(str(tmp_path / "out"), 0)
    shutil.copytree(tmp_path / "out", tmp_path / "copy")
    copy = tmp_path / "copy"
    assert run_at(copy) == ["", ""] and nights_seen(copy) == {0}
    assert main(["fsck", "--out", str(copy)]) == 2
    publish_night(str(copy), 1)
    assert nights_seen(copy) == {1} and run_at(copy) == [RUNS[1], RUNS[1]]


def test_what_others_put_there_stays(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    mine = tmp_path / "published" / "scores" / "mine.csv"
    mine.parent.mkdir(parents=True)
    mine.touch()
    with pytest.raises(InputError, match="mine.csv: camenn did not write this"):
        publish_night(str(tmp_path), 0)
    with open_run(Request(stage="score", out=str(tmp_path), inputs={}, options={}), started=0.0) as context:
        assert context.latest is not None
    assert mine.exists() and "mine.csv" in caplog.text


def test_a_file_system_without_links_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "symlink", refuse)
    publish_night(str(tmp_path), 0)
    assert read_latest(str(tmp_path)) is not None and run_at(tmp_path) == [None, None]
    assert "has no symbolic links" in caplog.text


def test_an_object_has_the_columns_of_a_directory(tmp_path: Path) -> None:
    """What is written to object stores has the rows, columns and types that pandas reads from a local disk."""
    manifest = publish_night(str(tmp_path), 0)
    directory = str(tmp_path / "runs" / RUNS[0] / "scores")
    with files.atomic_write(str(tmp_path / "one.parquet")) as sink:
        readers_path._copy(sink, manifest, directory, manifest.listed("scores"))
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "one.parquet"), pd.read_parquet(directory))
    whole = pq.ParquetFile(tmp_path / "one.parquet")
    assert whole.metadata.metadata[b"camenn.run"] == RUNS[0].encode() and whole.num_row_groups == 6
