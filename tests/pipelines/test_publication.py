"""Publishing earlier runs, rolling back, and removing what nobody reads."""

import datetime
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import files, publication
from pipelines.cli import main
from pipelines.manifest import (
    Manifest,
    add_files,
    point_to,
    publications,
    publish,
    read_latest,
    read_run,
    write_manifest,
)
from pipelines.tables import FileRecord
from schemas.contract import InputError

HOUR = datetime.timedelta(hours=1)
NOW = datetime.datetime.now(datetime.UTC)


def write(path: Path, rows: int = 3) -> FileRecord:
    table = pa.table({"value": list(range(rows))})
    return FileRecord("scores", str(path), rows, files.write_parquet(str(path), table))


def make_run(
    root: Path,
    run: str,
    records: list[FileRecord] | None = None,
    *,
    gates: list[dict[str, Any]] | None = None,
    show: bool = True,
) -> Manifest:
    """A run with a file of its own, and maybe some of others'."""
    own = write(root / "runs" / run / "scores" / "part-0.parquet")
    manifest = Manifest(stage="score", run=run, gates=gates or [])
    add_files(manifest, {"scores": ""}, [own, *(records or [])])
    (publish if show else write_manifest)(str(root), manifest)
    return manifest


def age(path: Path, hours: float) -> None:
    """Make a file, or all files of a directory, old."""
    for file in [path] if path.is_file() else path.rglob("*"):
        if file.is_file():
            then = (NOW - hours * HOUR).timestamp()
            os.utime(file, (then, then))


def published(root: Path) -> str:
    latest = read_latest(str(root))
    assert latest is not None
    return latest.run


def test_publications_are_kept_in_order_whatever_the_clock_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for run in ("c", "a", "b"):
        make_run(tmp_path, run)
    assert [entry["run"] for entry in publications(str(tmp_path))] == ["c", "a", "b"]
    assert [entry["run"] for entry in publications(str(tmp_path), last=2)] == ["a", "b"]
    assert published(tmp_path) == "b"


def test_rolling_back_twice_goes_back_by_two(tmp_path: Path) -> None:
    for run in ("a", "b", "c"):
        make_run(tmp_path, run)
    found = publication.rollback(str(tmp_path), "photos of last week")
    assert (found["run"], found["before"], published(tmp_path)) == ("b", "c", "b")
    assert publications(str(tmp_path))[-1]["reason"] == "photos of last week"
    assert publication.rollback(str(tmp_path), None)["run"] == "a"
    with pytest.raises(InputError, match="nothing was published before run a"):
        publication.rollback(str(tmp_path), None)
    make_run(tmp_path, "d")
    assert publication.rollback(str(tmp_path), None)["run"] == "a"


def test_a_publication_that_was_cut_off_does_not_count(tmp_path: Path) -> None:
    for run in ("a", "b"):
        make_run(tmp_path, run)
    latest = (tmp_path / "latest.json").read_text()
    make_run(tmp_path, "c")
    # Killed between the entry and the pointer.
    (tmp_path / "latest.json").write_text(latest)
    assert publication.rollback(str(tmp_path), None)["run"] == "a"


def test_rolling_back_past_a_publication_that_was_cut_off_goes_on_back(tmp_path: Path) -> None:
    """The entry that never was published stands between the runs, and must not be taken for the one before."""
    for run in ("z", "a", "b"):
        make_run(tmp_path, run)
    latest = (tmp_path / "latest.json").read_text()
    make_run(tmp_path, "c")
    (tmp_path / "latest.json").write_text(latest)
    assert [publication.rollback(str(tmp_path), None)["run"] for _ in range(2)] == ["a", "z"]
    with pytest.raises(InputError, match="nothing was published before run z"):
        publication.rollback(str(tmp_path), None)


def test_nights_to_be_held_against_are_the_latest_ones_oldest_first(tmp_path: Path) -> None:
    for run in ("a", "b", "c", "d"):
        make_run(tmp_path, run)

    def nights(last: int) -> list[str]:
        return [manifest.run for manifest in publication.published_manifests(str(tmp_path), last)]

    assert nights(3) == ["b", "c", "d"] and nights(9) == ["a", "b", "c", "d"]
    publication.rollback(str(tmp_path), None)
    assert nights(2) == ["b", "c"]
    # One that is published again counts once, where it is now.
    publication.republish(f"{tmp_path}/runs/a", force=False, reason=None)
    assert nights(9) == ["b", "c", "a"]
    assert publication.published_manifests(str(tmp_path / "empty"), 3) == []


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["publish", "rollback"]), max_size=30))
def test_rollback_is_a_stack(actions: list[str]) -> None:
    """Against a plain stack of publications."""
    history: list[dict[str, str]] = []
    stack: list[str] = []
    for number, action in enumerate(actions):
        if action == "publish":
            history.append({"run": f"r{number}"})
            stack.append(f"r{number}")
        elif stack:
            expected = stack[-2] if len(stack) > 1 else None
            assert publication._before(history, stack[-1]) == expected
            if expected is not None:
                history.append({"run": expected, "rolled_back_from": stack.pop()})


def test_an_earlier_run_is_published_again(tmp_path: Path) -> None:
    for run in ("a", "b"):
        make_run(tmp_path, run)
    found = publication.republish(f"{tmp_path}/runs/a/", force=False, reason=None)
    assert found["published"] and published(tmp_path) == "a"
    assert not publication.republish(f"{tmp_path}/runs/a", force=False, reason=None)["published"]
    assert len(publications(str(tmp_path))) == 3


def test_a_run_whose_gates_failed_needs_force_and_a_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path, "a")
    gates = [
        {"name": "coverage", "passed": True, "words": "fine"},
        {"name": "mean", "passed": False, "words": "mean CVR rose by 40 %"},
    ]
    make_run(tmp_path, "b", gates=gates, show=False)
    run = f"{tmp_path}/runs/b"
    assert main(["publish", run]) == 2
    assert "mean CVR rose by 40 %" in capsys.readouterr().err
    assert main(["publish", run, "--force"]) == 2
    assert "--reason" in capsys.readouterr().err
    assert published(tmp_path) == "a"
    assert main(["publish", run, "--force", "--reason", "a feast", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["gates_overridden"] == 1
    entry = publications(str(tmp_path))[-1]
    assert published(tmp_path) == "b"
    assert entry["reason"] == "a feast" and entry["forced"] == "mean CVR rose by 40 %"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("{root}", "give the run's directory"),
        ("{root}/runs/none", "never finished"),
        ("{root}/runs/a/scores", "give the run's"),
    ],
)
def test_what_is_no_run_is_refused(tmp_path: Path, path: str, message: str) -> None:
    make_run(tmp_path, "a")
    with pytest.raises(InputError, match=message):
        publication.republish(path.format(root=tmp_path), force=False, reason=None)


def test_a_run_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    for run in ("a", "b", "c"):
        make_run(tmp_path, run)
    (tmp_path / "runs/b/scores/part-0.parquet").unlink()
    with pytest.raises(InputError, match="lacks .*part-0.parquet"):
        publication.rollback(str(tmp_path), None)
    write(tmp_path / "runs/a/scores/part-0.parquet", rows=1_000)
    with pytest.raises(InputError, match="bytes, its manifest says"):
        publication.republish(f"{tmp_path}/runs/a", force=False, reason=None)
    assert published(tmp_path) == "c"


def test_somebody_who_writes_there_is_waited_for(tmp_path: Path) -> None:
    make_run(tmp_path, "a")
    make_run(tmp_path, "b")
    with files.single_writer(str(tmp_path)):
        for work in (
            lambda: publication.rollback(str(tmp_path), None),
            lambda: publication.republish(f"{tmp_path}/runs/a", force=False, reason=None),
            lambda: publication.collect(str(tmp_path), 1, None, dry_run=False),
        ):
            with pytest.raises(InputError, match="another camenn process"):
                work()


def remaining(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file() and path.name != ".lock"}


def test_gc_keeps_what_kept_runs_name_and_what_is_young(tmp_path: Path) -> None:
    old = make_run(tmp_path, "a")
    shared = write(tmp_path / "runs/a/contents/part-1.parquet")
    make_run(tmp_path, "b", [shared])
    make_run(tmp_path, "c", [shared])
    # A run that was killed, one that is being written, and what is not ours.
    for name in (
        "runs/killed/scores/part-9.parquet",
        "runs/young/scores/part-9.parquet",
        "notes/part.parquet",
        "nan-step-3-0.json",
    ):
        write(tmp_path / name)
    age(tmp_path, 72)
    age(tmp_path / "runs/young", 1)
    before = remaining(tmp_path)
    found = publication.collect(str(tmp_path), 1, None, dry_run=True)
    assert (found["files_found"], found["files_removed"]) == (3, 0) and remaining(tmp_path) == before
    found = publication.collect(str(tmp_path), 1, None, dry_run=False)
    gone = {"runs/a/scores/part-0.parquet", "runs/b/scores/part-0.parquet", "runs/killed/scores/part-9.parquet"}
    assert before - remaining(tmp_path) == gone
    assert found["files_removed"] == 3 and found["runs_kept"] == 1
    assert not (tmp_path / "runs/killed").exists()
    latest = read_latest(str(tmp_path))
    assert latest is not None
    publication.check_whole(str(tmp_path), latest)
    # What is left of a run that was not kept tells its figures.
    assert read_run(str(tmp_path), "a").created_at == old.created_at
    assert publication.collect(str(tmp_path), 1, None, dry_run=False)["files_found"] == 0


def test_gc_keeps_the_published_run_whatever_else_was_published(tmp_path: Path) -> None:
    for run in ("a", "b", "c"):
        make_run(tmp_path, run)
    publication.republish(f"{tmp_path}/runs/a", force=False, reason=None)
    for run in ("b", "c"):
        point_to(str(tmp_path), read_run(str(tmp_path), run))
    publication.republish(f"{tmp_path}/runs/a", force=False, reason=None)
    age(tmp_path, 72)
    publication.collect(str(tmp_path), 1, None, dry_run=False)
    assert {p.parent.parent.name for p in (tmp_path / "runs").rglob("*.parquet")} == {"a"}


def test_gc_keeps_no_run_beyond_its_retention_but_the_published_one(tmp_path: Path) -> None:
    for run in ("a", "b", "c"):
        make_run(tmp_path, run)
    for number, days in ((1, 40), (2, 10), (3, 50)):
        path = tmp_path / "published" / f"{number:08d}.json"
        then = (NOW - datetime.timedelta(days=days)).isoformat(timespec="seconds")
        path.write_text(json.dumps(json.loads(path.read_text()) | {"at": then}))
    age(tmp_path, 72)
    found = publication.collect(str(tmp_path), 7, 30, dry_run=False)
    assert found["runs_kept"] == 2
    assert {p.parent.parent.name for p in (tmp_path / "runs").rglob("*.parquet")} == {"b", "c"}


def test_gc_of_a_store_takes_parts_with_their_markers(tmp_path: Path) -> None:
    """Parts of an older generation go, and parts that a killed run committed, once they are old."""
    parts = {}
    for name in ("images/old/part-a", "images/new/part-b", "titles/new/part-c", "images/new/part-d"):
        parts[name] = write(tmp_path / f"{name}.parquet")
        (tmp_path / f"{name}.json").write_text("{}")
    make_run(tmp_path, "a", [parts["images/new/part-b"], parts["titles/new/part-c"]])
    age(tmp_path, 72)
    age(tmp_path / "images/new/part-d.parquet", 2)
    age(tmp_path / "images/new/part-d.json", 2)
    publication.collect(str(tmp_path), 3, None, dry_run=False)
    left = {path for path in remaining(tmp_path) if path.startswith(("images", "titles"))}
    assert left == {f"{name}{end}" for name in list(parts)[1:] for end in (".parquet", ".json")}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--keep", "0"], "at least 1"),
        (["--retention_days", "-1"], "must not be negative"),
        ([], "nothing is published there"),
    ],
)
def test_gc_refuses_what_makes_no_sense(tmp_path: Path, flags: list[str], message: str, capsys: Any) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "precious.txt").write_text("not ours")
    age(tmp_path, 1_000)
    assert main(["gc", "--out", str(tmp_path), *flags]) == 2
    assert message in capsys.readouterr().err
    assert (tmp_path / "runs" / "precious.txt").exists()


def test_gc_removes_contents_that_no_kept_run_uses(tmp_path: Path) -> None:
    """Copies of embeddings are the largest files of shards and scores: those of other encoders, or of killed runs, go too."""
    used, unused = (write(tmp_path / f"contents/images/{name}/part-0.parquet") for name in ("used", "unused"))
    make_run(tmp_path, "a", [used])
    age(tmp_path, 72)
    found = publication.collect(str(tmp_path), 3, None, dry_run=False)
    assert found["files_removed"] == 1
    assert Path(used.path).exists() and not Path(unused.path).exists()


def test_gc_of_an_output_with_brackets_leaves_others_alone(tmp_path: Path) -> None:
    for name in ("st1", "st[1]"):
        make_run(tmp_path / name, "a")
        write(tmp_path / name / "runs" / "killed" / "part-0.parquet")
        age(tmp_path / name, 72)
    before = remaining(tmp_path / "st1")
    assert publication.collect(str(tmp_path / "st[1]"), 3, None, dry_run=False)["files_removed"] == 1
    assert remaining(tmp_path / "st1") == before
