"""Publishing earlier runs and rolling back."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.cli import main
from pipelines.io import files
from pipelines.io.tables import FileRecord
from pipelines.runs import garbage, publication
from pipelines.runs.manifest import Manifest, add_files, read_latest, write_manifest
from pipelines.runs.publication import publications, publish
from schemas.errors import InputError


def write(path: Path, rows: int = 3) -> FileRecord:
    table = pa.table({"value": list(range(rows))})
    return FileRecord.of("scores", str(path), rows, files.write_parquet(str(path), table))


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
    """The entry that was never published lies between the runs, and must not count as the previous one."""
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
    # A run that is published again counts once, at its latest position.
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
    with pytest.raises(InputError, match="part-0.parquet: this file is gone"):
        publication.rollback(str(tmp_path), None)
    write(tmp_path / "runs/a/scores/part-0.parquet", rows=1_000)
    with pytest.raises(InputError, match="bytes, 543 were written"):
        publication.republish(f"{tmp_path}/runs/a", force=False, reason=None)
    assert published(tmp_path) == "c"


def test_somebody_who_writes_there_is_waited_for(tmp_path: Path) -> None:
    make_run(tmp_path, "a")
    make_run(tmp_path, "b")
    with files.single_writer(str(tmp_path)):
        works: tuple[Callable[[], object], ...] = (
            lambda: publication.rollback(str(tmp_path), None),
            lambda: publication.republish(f"{tmp_path}/runs/a", force=False, reason=None),
            lambda: garbage.collect(str(tmp_path), 1, None, dry_run=False),
        )
        for work in works:
            with pytest.raises(InputError, match="another camenn process"):
                work()
