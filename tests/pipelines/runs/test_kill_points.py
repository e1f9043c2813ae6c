"""Commands are killed between any two system calls.

A power cut's further losses are tried too. Readers see the old run or the new one, whole.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipelines.io import files
from pipelines.runs.manifest import read_latest
from pipelines.runs.publication import publish
from tests.pipelines.runs.test_garbage import KILLED, A, B, begin_run, make_run
from tests.support.kill_lab import Loss

ROOT = Path(__file__).resolve().parents[3]


def try_points(data: Path, work: Path, points: int, *flags: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.support.kill_lab", "--data", str(data), "--work", str(work)]
    done = subprocess.run(
        [*command, "--points", str(points), *flags], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode in (0, 1), done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_publish_rollback_and_gc_at_every_call(tmp_path: Path) -> None:
    root = tmp_path / "work" / "scores"
    for run in (A, B):
        make_run(root, run)
    directory = begin_run(root, KILLED)
    for path in directory.rglob("*"):
        os.utime(path, (1e9, 1e9))
    reported = try_points(tmp_path, tmp_path / "work", 1_000, "--only", "publish,rollback,gc")
    assert reported["broken"] == []
    # Before a file is opened, written, synced and renamed, and its directory synced: twice, and the
    # first run's files go.
    assert sum(tally["points"] for tally in reported["tallies"].values()) > 25
    assert reported["tallies"]["publish"]["new"] > 0


@pytest.mark.parametrize("forgotten", ["sync_tree", "durable"])
def test_the_lab_notices_what_is_not_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forgotten: str) -> None:
    """A publication that syncs too little is detected: otherwise the test above would prove nothing."""
    work = tmp_path / "work"
    old = make_run(work / "scores", A)
    calls: list[list[Any]] = []

    def record(name: str, *paths: str) -> None:
        calls.append([name, *paths, True])

    replace, fsync, write = os.replace, os.fsync, files.Sink.write

    def replace_recorded(a: str, b: str) -> None:
        record("rename", a, b)
        replace(a, b)

    def fsync_recorded(fd: int) -> None:
        record("fsync", os.readlink(f"/proc/self/fd/{fd}"))
        fsync(fd)

    def write_recorded(sink: files.Sink, data: Any) -> int:
        record("write", os.readlink(f"/proc/self/fd/{sink._handle.fileno()}"))
        return write(sink, data)

    monkeypatch.setattr(os, "replace", replace_recorded)
    monkeypatch.setattr(os, "fsync", fsync_recorded)
    monkeypatch.setattr(files.Sink, "write", write_recorded)
    if forgotten == "sync_tree":
        monkeypatch.setattr(files, "sync_tree", lambda *_: None)
    else:
        atomic_write = files.atomic_write
        monkeypatch.setattr(files, "atomic_write", lambda path, **_: atomic_write(path))
    new = make_run(work / "scores", B)
    log = tmp_path / "log"
    log.write_text("\n".join(map(json.dumps, calls)))
    loss = Loss.of(log)
    lost = new.listed("scores")[0] if forgotten == "sync_tree" else str(work / "scores" / "latest.json")
    assert lost in loss.unsynced
    assert not any(Path(path).match(f"runs/{old.run}/*/*") for path in loss.unsynced)


def test_what_is_published_is_synced_before_it_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run's files and folders, its manifest, its record, and only then the pointer."""
    synced: list[str] = []
    fsync = os.fsync

    def fsync_recorded(fd: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{fd}"))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", fsync_recorded)
    manifest = make_run(tmp_path, A)
    part = Path(manifest.listed("scores")[0])
    run = tmp_path / "runs" / A
    order = [str(part), str(part.parent), str(run), str(run.parent), str(tmp_path)]
    assert [path for path in synced if path in order][:5] == order
    names = [Path(path).name.split(".json")[0] for path in synced if ".tmp" in path]
    assert names[-3:] == ["manifest", "00000001", "latest"]
    synced.clear()
    # What was published before is on the disk already.
    latest = read_latest(str(tmp_path))
    assert latest is not None
    publish(str(tmp_path), latest)
    assert str(part) not in synced
