"""Atomic publication of a run, and the row counts that must reconcile before it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipelines.io import files
from pipelines.runs import manifest
from pipelines.runs.accounting import check_accounting, check_reject_rate
from pipelines.runs.manifest import Manifest, read_latest, request_fingerprint
from pipelines.runs.publication import publications, publish
from schemas.errors import InputError


def run(name: str) -> Manifest:
    return Manifest(stage="score", run=name)


def test_whatever_is_published_stands_in_the_history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After every single write, and so wherever a publication is interrupted: otherwise a rollback
    could not find the previous run.
    """
    root = str(tmp_path)
    publish(root, run("a"))
    seen = []

    def look_after(write: Callable[..., Any]) -> Callable[..., Any]:
        def write_and_look(*given: Any, **named: Any) -> Any:
            done = write(*given, **named)
            latest = read_latest(root)
            assert latest is not None
            seen.append((latest.run, [entry["run"] for entry in publications(root)]))
            return done

        return write_and_look

    for name in [name for name in dir(files) if name.startswith(("write_", "create_"))]:
        monkeypatch.setattr(files, name, look_after(getattr(files, name)))
    publish(root, run("b"))
    assert all(latest in history for latest, history in seen)
    assert seen[-1] == ("b", ["a", "b"])
    assert ("a", ["a", "b"]) in seen, "the entry is written first"


def test_an_entry_that_was_removed_leaves_the_later_ones_alone(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        publish(str(tmp_path), run(name))
    (tmp_path / "published" / "00000001.json").unlink()
    publish(str(tmp_path), run("d"))
    assert [entry["run"] for entry in publications(str(tmp_path))] == ["b", "c", "d"]


@pytest.mark.parametrize("out", [6, 8])
def test_books_that_do_not_balance_end_the_run(out: int) -> None:
    """Rows that are lost, and rows of unknown origin."""
    balanced = {"in": 10, "out": 7, "rejected": 1, "duplicates": 2}
    check_accounting({"clicks": balanced, "orders": {}})
    with pytest.raises(RuntimeError, match="table 'clicks': 10 rows came in"):
        check_accounting({"orders": {}, "clicks": balanced | {"out": out}})


def test_so_many_rejects_as_are_allowed_are_allowed() -> None:
    counts = {"clicks": {"in": 400, "rejected": 4}, "orders": {}}
    check_reject_rate(counts, 0.01, [])
    check_reject_rate({"clicks": {"in": 0, "rejected": 0}}, 0.0, [])
    with pytest.raises(InputError, match="4 of 399 rows were rejected"):
        check_reject_rate({"clicks": {"in": 399, "rejected": 4}}, 0.01, [])


def test_a_request_is_another_one_where_anything_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs, options, and the program itself: work of another version is done again."""
    plain = request_fingerprint({"clicks": "1"}, {"history": 5, "late": 1})
    assert request_fingerprint({"clicks": "1"}, {"late": 1, "history": 5}) == plain
    others = {
        request_fingerprint({"clicks": "2"}, {"history": 5, "late": 1}),
        request_fingerprint({"clicks": "1"}, {"history": 6, "late": 1}),
    }
    found = manifest.versions()
    monkeypatch.setattr(manifest, "versions", lambda: found | {"camenn": "0.0.0"})
    others.add(request_fingerprint({"clicks": "1"}, {"history": 5, "late": 1}))
    monkeypatch.undo()
    monkeypatch.setattr(manifest, "SCHEMA_VERSION", 10_000)
    others.add(request_fingerprint({"clicks": "1"}, {"history": 5, "late": 1}))
    assert len(others | {plain}) == 5
