"""Removal of unused files: only those that camenn wrote, only old ones, and never those of a kept run."""

import datetime
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipelines.cli import main
from pipelines.io import clock, files
from pipelines.io.tables import FileRecord
from pipelines.runs import garbage, publication
from pipelines.runs.manifest import Manifest, add_files, read_latest, read_run
from pipelines.runs.part_keys import files_of_part
from pipelines.runs.publication import point_to, publish
from pipelines.runs.store import commit_part
from schemas.embeddings import image_embeddings
from tests.support.documents import edit_document

HOUR = datetime.timedelta(hours=1)
NOW = datetime.datetime.now(datetime.UTC)
A, B, C, KILLED, LIVE = (f"20260131T02000{n}-00000{n}" for n in range(5))
GENERATION, OTHER = "0123456789abcdef", "fedcba9876543210"


def part(number: int, end: str = "parquet") -> str:
    """Name of a part as camenn gives it."""
    return f"part-{number:032x}.{end}"


def write(path: Path, rows: int = 3) -> FileRecord:
    table = pa.table({"value": list(range(rows))})
    return FileRecord.of("scores", str(path), rows, files.write_parquet(str(path), table))


def make_run(root: Path, run: str, records: list[FileRecord] | None = None) -> Manifest:
    """A published run with a file of its own, and maybe some of others'."""
    files.make_directory(str(root / "runs" / run))
    files.mark_own(str(root / "runs" / run))
    own = write(root / "runs" / run / "scores" / part(0))
    found = [own, *(records or [])]
    manifest = Manifest(stage="score", run=run)
    add_files(manifest, {record.table: "" for record in found}, found)
    publish(str(root), manifest)
    return manifest


def begin_run(root: Path, run: str) -> Path:
    """A run that was not finished, with one file."""
    directory = root / "runs" / run
    files.make_directory(str(directory))
    files.mark_own(str(directory))
    write(directory / "scores" / part(9))
    return directory


def age(path: Path, hours: float) -> None:
    """Make a file, or all files of a directory but the output's own documents, old."""
    for file in [path] if path.is_file() else path.rglob("*"):
        if file.is_file() and file.parent.name != "published" and file.name != "latest.json":
            then = (NOW - hours * HOUR).timestamp()
            os.utime(file, (then, then))


def remaining(root: Path) -> set[str]:
    hidden = (".lock", ".reading", ".camenn")
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file() and path.name not in hidden}


def collect(root: Path, keep: int = 1) -> dict[str, Any]:
    return garbage.collect(str(root), keep, None, dry_run=False)


def test_kept_runs_and_young_files_stay(tmp_path: Path) -> None:
    old = make_run(tmp_path, A)
    shared = write(tmp_path / "runs" / A / "contents" / part(1))
    make_run(tmp_path, B, [shared])
    make_run(tmp_path, C, [shared])
    # A run that was killed, and one that is being written.
    begin_run(tmp_path, KILLED)
    begin_run(tmp_path, LIVE)
    age(tmp_path, 72)
    age(tmp_path / "runs" / LIVE, 1)
    before = remaining(tmp_path)
    found = garbage.collect(str(tmp_path), 1, None, dry_run=True)
    # Two runs' parts, the killed run's part and record.
    assert found["files_found"] == 6 and found["files_removed"] == 0 and remaining(tmp_path) == before
    found = collect(tmp_path)
    assert before - remaining(tmp_path) == {f"runs/{run}/scores/{part(n)}" for run, n in ((A, 0), (B, 0), (KILLED, 9))}
    assert found["files_removed"] == 6 and found["runs_kept"] == 1
    assert not (tmp_path / "runs" / KILLED).exists()
    latest = read_latest(str(tmp_path))
    assert latest is not None
    publication.check_whole(str(tmp_path), latest)
    # The remaining manifest of a run that was not kept has its figures.
    assert read_run(str(tmp_path), A).created_at == old.created_at
    assert collect(tmp_path)["files_found"] == 0


FOREIGN = (
    "images/1.jpg",
    "images/fruit/2.jpg",
    "images/0123456789abcdef/3.jpg",
    f"images/{OTHER}/{part(7)}",
    "titles/titles.csv",
    "contents/a.parquet",
    "contents/images/x/b.parquet",
    f"contents/images/{OTHER}/{part(8, 'arrow')}",
    "runs/2026/report.parquet",
    "runs/notes.txt",
    f"runs/{A}/notes.txt",
    f"runs/20250101T000000-abcdef/scores/{part(5)}",
    "catalog.parquet",
    "published/notes.json",
)
"""Files of users, other programs and other cities in a directory of these names"""


def test_only_what_camenn_wrote_is_removed(tmp_path: Path) -> None:
    for run in (A, B):
        make_run(tmp_path, run)
    for name in FOREIGN:
        write(tmp_path / name)
    elsewhere = tmp_path.parent / f"{tmp_path.name}-elsewhere"
    write(elsewhere / "sub" / part(6))
    for name in ("runs/link", f"runs/{A}/link", f"contents/images/{GENERATION}"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to(elsewhere)
    age(tmp_path, 100)
    age(elsewhere, 100)
    before = remaining(tmp_path)
    found = collect(tmp_path)
    assert before - remaining(tmp_path) == {f"runs/{A}/scores/{part(0)}"}
    assert found["files_not_ours"] >= len(FOREIGN) - 4
    assert (elsewhere / "sub" / part(6)).exists()


def test_every_file_of_a_killed_run_has_a_name_that_is_known(tmp_path: Path) -> None:
    """Files that each stage writes into its run, and leftovers of a killed writer."""
    make_run(tmp_path, B)
    directory = begin_run(tmp_path, KILLED)
    code = f"{1:032x}"
    for name in (
        "items/part-0.parquet",
        "examples/date=2026-01-31/part-3-0.parquet",
        "examples/date=2026-01-31/part-kept-1-0.parquet",
        f"kept_clicks/bucket-3-{code}.arrows",
        f"shuffle/{code}.arrows",
        "wanted/images-0.arrows",
        "snapshot/store_item.parquet",
        "finished.json",
        "model.safetensors",
        "curves.csv",
        f"scores/score_date=2026-01-31/part-{code}.parquet.{code}.tmp",
        f"manifest.json.{code}.tmp",
        "model.safetensors.tmp",
    ):
        write(directory / name)
    age(tmp_path, 72)
    collect(tmp_path)
    assert not directory.exists()


def test_a_store_loses_parts_with_their_markers(tmp_path: Path) -> None:
    """Parts of an older generation go, and parts that a killed run committed, once they are old."""
    contract = image_embeddings(2, 4)
    row = {"embedding": [bytes(16)], "blur": [0.0], "luminance": [0.5], "width": [3], "height": [3]}
    parts = {}
    for generation, number in ((OTHER, 1), (GENERATION, 2), (GENERATION, 3), (GENERATION, 4)):
        table = pa.table({"image_key": [str(number)], **row}, schema=contract.schema)
        directory = str(tmp_path / "images" / generation)
        parts[number] = commit_part(directory, contract, (2, 4), f"{number:032x}", table, kernels="k")
    used = FileRecord("image_embeddings", parts[2].path, 1, parts[2].bytes, sha256=parts[2].sha256)
    make_run(tmp_path, A, [used])
    age(tmp_path, 72)
    for path in files_of_part(parts[3].path):
        age(Path(path), 2)
    collect(tmp_path)
    left = {path for path in remaining(tmp_path) if path.startswith("images")}
    assert left == {
        f"images/{GENERATION}/{part(n, end)}" for n in (2, 3) for end in ("parquet", "keys.parquet", "json")
    }


def test_a_removal_that_was_cut_off_is_finished_by_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files that identify a directory as camenn's are removed last."""
    make_run(tmp_path, A)
    begin_run(tmp_path, KILLED)
    contract = image_embeddings(2, 4)
    row = {"image_key": ["a"], "embedding": [bytes(16)], "blur": [0.0], "luminance": [0.5], "width": [3], "height": [3]}
    directory = tmp_path / "images" / GENERATION
    commit_part(str(directory), contract, (2, 4), f"{1:032x}", pa.table(row, schema=contract.schema), kernels="k")
    age(tmp_path, 72)
    delete = files.delete
    for left in (4, 3, 2, 1, 0):
        # Each attempt removes one file, and is then killed.
        with monkeypatch.context() as patch:
            patch.setattr(files, "delete", lambda paths: delete(paths[:1]))
            collect(tmp_path)
        old = [path for path in remaining(tmp_path) if KILLED in path or path.startswith("images")]
        hidden = list((tmp_path / "runs" / KILLED).glob(".camenn"))
        assert len(old) + len(hidden) == left
    assert not (tmp_path / "runs" / KILLED).exists()


def test_contents_that_no_kept_run_uses_go(tmp_path: Path) -> None:
    """Contents of other encoders, or of killed runs, go too.

    Copies of embeddings are the largest files of shards and scores.
    """
    paths = {name: tmp_path / "contents" / "images" / name for name in (GENERATION, OTHER)}
    used, unused = (write(path / part(0, "arrow")) for path in paths.values())
    files.mark_own(str(paths[OTHER]))
    make_run(tmp_path, A, [used])
    age(tmp_path, 72)
    assert collect(tmp_path, 3)["files_removed"] == 1
    assert Path(used.path).exists() and not Path(unused.path).exists()


@pytest.mark.parametrize("years", [14, -14])
def test_a_clock_that_is_wrong_ages_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, years: int) -> None:
    """A wrong clock removes no run that is being written.

    By this machine's clock all files would be fourteen years old. A run that was begun an hour
    before the newest file is not.
    """
    make_run(tmp_path, A)
    begin_run(tmp_path, LIVE)
    age(tmp_path / "runs" / LIVE, 1)
    monkeypatch.setattr(clock, "utc_now", lambda: NOW + years * 365 * 24 * HOUR)
    assert collect(tmp_path)["files_found"] == 0
    assert (tmp_path / "runs" / LIVE / "scores" / part(9)).exists()


def test_a_clock_that_jumps_while_files_are_written_ages_nothing(tmp_path: Path) -> None:
    """The machine's own clock jumps.

    Its file system's clock jumps with it, and only the files show that little time has passed.
    """
    make_run(tmp_path, A)
    begin_run(tmp_path, LIVE)
    for path in tmp_path.rglob("*"):
        then = (NOW - 14 * 365 * 24 * HOUR).timestamp()
        os.utime(path, (then, then))
    assert collect(tmp_path)["files_found"] == 0


def test_a_future_file_ages_nothing_more_than_the_clock(tmp_path: Path) -> None:
    make_run(tmp_path, A)
    begin_run(tmp_path, LIVE)
    age(tmp_path / "runs" / LIVE, 1)
    future = (NOW + 1000 * HOUR).timestamp()
    os.utime(tmp_path / "latest.json", (future, future))
    assert collect(tmp_path)["files_found"] == 0


def test_what_is_being_read_is_waited_for(tmp_path: Path) -> None:
    """A training reads a shard set for hours without writing into it."""
    make_run(tmp_path, A)
    code = (
        "import sys; from pipelines.io import files\n"
        f"with files.shared_reader({str(tmp_path)!r}): print('reads', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as reader:
        assert reader.stdout is not None and reader.stdout.readline() == "reads\n"
        with pytest.raises(files.InUseError, match="is reading it"):
            collect(tmp_path)
        # Readers do not block each other.
        with files.shared_reader(str(tmp_path)):
            pass
        reader.communicate("")
    assert collect(tmp_path)["files_found"] == 0


def test_the_published_run_stays_whatever_else_was_published(tmp_path: Path) -> None:
    for run in (A, B, C):
        make_run(tmp_path, run)
    publication.republish(f"{tmp_path}/runs/{A}", force=False, reason=None)
    for run in (B, C):
        point_to(str(tmp_path), read_run(str(tmp_path), run))
    publication.republish(f"{tmp_path}/runs/{A}", force=False, reason=None)
    age(tmp_path, 72)
    collect(tmp_path)
    assert {p.parent.parent.name for p in (tmp_path / "runs").rglob("*.parquet")} == {A}


def test_no_run_beyond_its_retention_is_kept_but_the_published_one(tmp_path: Path) -> None:
    for run in (A, B, C):
        make_run(tmp_path, run)
    for number, days in ((1, 40), (2, 10), (3, 50)):
        then = (NOW - datetime.timedelta(days=days)).isoformat(timespec="seconds")
        edit_document(tmp_path / "published" / f"{number:08d}.json", partial(dict.update, at=then))
    age(tmp_path, 72)
    found = garbage.collect(str(tmp_path), 7, 30, dry_run=False)
    assert found["runs_kept"] == 2
    assert {p.parent.parent.name for p in (tmp_path / "runs").rglob("*.parquet")} == {B, C}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--keep", "0"], "at least 1"),
        (["--retention_days", "-1"], "must not be negative"),
        ([], "nothing is published there"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path: Path, flags: list[str], message: str, capsys: Any) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "precious.txt").write_text("not ours")
    age(tmp_path, 1_000)
    assert main(["gc", "--out", str(tmp_path), *flags]) == 2
    assert message in capsys.readouterr().err
    assert (tmp_path / "runs" / "precious.txt").exists()


def test_an_output_with_brackets_leaves_others_alone(tmp_path: Path) -> None:
    for name in ("st1", "st[1]"):
        make_run(tmp_path / name, A)
        begin_run(tmp_path / name, KILLED)
        age(tmp_path / name, 72)
    before = remaining(tmp_path / "st1")
    assert collect(tmp_path / "st[1]", 3)["files_removed"] == 2
    assert remaining(tmp_path / "st1") == before
