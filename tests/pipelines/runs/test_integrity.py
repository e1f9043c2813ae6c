"""One flipped bit in any file that a stage reads.

It gives an error that names the file and the command to run again, never another result.
"""

import json
import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from camenn_model import integrity
from camenn_model.data.shard_set import ShardSet
from camenn_model.integrity import DamagedError, file_sha256
from camenn_model.published import check_table_files, read_manifest
from camenn_model.tensors import load_tensors, save_tensors
from pipelines.cli import main
from pipelines.io import files
from pipelines.io.tables import FileRecord
from pipelines.runs import fsck
from pipelines.runs.manifest import Manifest, add_files, read_latest
from pipelines.runs.night_record import new_night, read_nights
from pipelines.runs.part_keys import files_of_part
from pipelines.runs.publication import publications, publish
from pipelines.runs.store import list_parts
from pipelines.shards import stage as shards_stage
from pipelines.shards.log_cache import Part as KeptPart
from tests.pipelines.shards.test_examples import shard_options
from tests.support.small_city import catalog_table, random_city, write_data, write_store
from tests.support.work_directory import make_items, write_scores

FLIPS = 150
IMAGES = "fake-images"


@dataclass(frozen=True)
class Kind:
    """A kind of file: how to find one of them, and how a stage reads it."""

    pattern: str
    read: Callable[[Path, Path], Any]
    """(working directory, the file) → the content read, for comparison"""
    remedy: str


def table(folder: str, name: str) -> Callable[[Path, Path], Any]:
    """Read a table as stages do that take a manifest's paths."""

    def read(work: Path, _: Path) -> Any:
        manifest = read_latest(str(work / folder))
        assert manifest is not None
        return [pq.ParquetFile(path).read().to_pylist() for path in manifest.paths(name)]

    return read


def shard_set(name: str) -> Callable[[Path, Path], Any]:
    """Read a shard set as training does."""

    def read(work: Path, _: Path) -> Any:
        shards = ShardSet(str(work / "shards"))
        if name == "contents_images":
            return shards.images.gather(np.arange(len(shards.images))).tobytes()
        if name == "examples":
            return [pq.ParquetFile(path).read().to_pylist() for path, _ in shards.examples("train")]
        return getattr(shards, name).to_pylist()

    return read


def parts(work: Path, _: Path) -> Any:
    """Read a store's parts as `embed` does."""
    found = list_parts(str(work / "store" / "images" / IMAGES))
    for part in found:
        part.check()
    return [(part, pq.ParquetFile(part.path).read().to_pylist()) for part in found]


def kept_log(work: Path, _: Path) -> Any:
    """Read the kept rows of a log as `shards` does."""
    latest = read_latest(str(work / "shards"))
    assert latest is not None
    latest.check("kept_clicks")
    return [KeptPart.read(record) for record in latest.records("kept_clicks")]


def package(work: Path, _: Path) -> Any:
    """Check a model as its readers do."""
    directory = next((work / "model" / "runs").iterdir())
    check_table_files(work / "model", read_manifest(directory), None, "Run `camenn train --rerun`.")
    return sorted(path.read_bytes() for path in directory.iterdir() if path.suffix != ".json")


def checkpoint(_: Path, path: Path) -> Any:
    """Read a checkpoint as a resumed training does."""
    tensors, metadata = load_tensors(path)
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}, metadata


KINDS = {
    "store: part": Kind(f"store/images/{IMAGES}/part-*[0-9a-f].parquet", parts, "camenn embed"),
    "store: keys": Kind(f"store/images/{IMAGES}/part-*.keys.parquet", parts, "camenn embed"),
    "store: marker": Kind(f"store/images/{IMAGES}/part-*.json", parts, "camenn embed"),
    "store: items": Kind("store/runs/*/items/*", table("store", "items"), "camenn embed"),
    "shards: examples": Kind("shards/runs/*/examples/*/*", shard_set("examples"), "camenn shards --rebuild"),
    "shards: items": Kind("shards/runs/*/items/*", shard_set("items"), "camenn shards --rebuild"),
    "shards: users": Kind("shards/runs/*/users/*", shard_set("users"), "camenn shards --rebuild"),
    "shards: contents": Kind("shards/contents/images/*/part-*", shard_set("contents_images"), "camenn shards --rerun"),
    "shards: kept log": Kind("shards/runs/*/kept_clicks/*", kept_log, "camenn shards"),
    "scores": Kind("scores/runs/*/scores/*/*", table("scores", "scores"), "camenn score --rerun"),
    "scores: quality": Kind("scores/runs/*/listing_quality/*/*", table("scores", "listing_quality"), "camenn score"),
    "scores: audience": Kind("scores/runs/*/audience/*", table("scores", "audience"), "camenn score --rerun"),
    "model: weights": Kind("model/runs/*/model.safetensors", package, "camenn train"),
    "model: curves": Kind("model/runs/*/curves.csv", package, "camenn train"),
    "model: config": Kind("model/runs/*/config.json", package, "camenn train"),
    "checkpoint": Kind("model/checkpoints/main.safetensors", checkpoint, "Remove it and run `camenn train`"),
    "manifest": Kind(
        "scores/runs/*/manifest.json", lambda work, _: read_latest(str(work / "scores")), "camenn fsck --out"
    ),
    "latest.json": Kind("shards/latest.json", lambda work, _: read_latest(str(work / "shards")), "camenn fsck --out"),
    "published": Kind("scores/published/*", lambda work, _: publications(str(work / "scores")), "camenn fsck --out"),
    "night": Kind("nights/*/record.json", lambda work, _: read_nights(str(work)), "Remove the folder of that night"),
}
"""Every kind of file that a stage reads and that camenn wrote"""


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with a store, a shard set, a model, scores, a checkpoint and a night; all small."""
    root = tmp_path_factory.mktemp("integrity")
    work = root / "work"
    store = write_store(work / "store", catalog_table())
    data = write_data(root / "data", *random_city(3, clicks=80, orders=30))
    shards_stage.run(shard_options(data, store, work / "shards"), [])
    run = "20240311T010000-aaaaaa"
    model = work / "model" / "runs" / run
    save_tensors(model / "model.safetensors", {"weight": torch.arange(60.0).reshape(3, 20)})
    (model / "config.json").write_text(json.dumps({"width": 64}))
    (model / "curves.csv").write_text("step,total\n1,0.5\n")
    records = [
        FileRecord(path.name, str(path), 0, path.stat().st_size, sha256=file_sha256(path)) for path in model.iterdir()
    ]
    manifest = Manifest(stage="train", run=run)
    add_files(manifest, {record.table: "" for record in records}, records)
    publish(str(work / "model"), manifest)
    state = {"state": {"step": 3}}
    save_tensors(work / "model" / "checkpoints" / "main.safetensors", {"model.weight": torch.randn(4, 5)}, state)
    write_scores(work / "scores", "20240312T020000-bbbbbb", make_items(["a.jpg"], 12, 2), 2, 0)
    new_night(str(work), {})
    return work


def flip(path: Path, at: int) -> None:
    """Flip one bit in place; size and modification time stay."""
    data = bytearray(path.read_bytes())
    data[at // 8] ^= 1 << at % 8
    status = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_bit_is_told_or_changes_nothing(work: Path, kind: str) -> None:
    expected = KINDS[kind]
    path = sorted(work.glob(expected.pattern))[0]
    whole = path.read_bytes()
    right = expected.read(work, path)
    folder = work / path.relative_to(work).parts[0]
    wrong = missed = 0
    for at in np.random.default_rng(0).choice(8 * len(whole), min(FLIPS, 8 * len(whole)), replace=False):
        flip(path, int(at))
        try:
            # For example white space of a document.
            same = expected.read(work, path) == right
            wrong += not same
        except DamagedError as error:
            same = False
            assert str(path) in str(error) or path.stem in str(error)
            assert expected.remedy in str(error)
        found = fsck.Findings()
        waiting = fsck.check_output(str(folder), found) if folder.name != "nights" else []
        fsck.check_rest(str(work), found)
        for entry in waiting:
            found.file(entry, fsck.find_fault(entry))
        missed += bool(found.damaged) == same
        path.write_bytes(whole)
    assert (wrong, missed) == (0, 0)
    assert expected.read(work, path) == right


def test_fsck_says_that_all_is_whole(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fsck", "--work", str(work), "--json"]) == 0
    reported = json.loads(capsys.readouterr().out)
    assert reported["damaged"] == reported["without_checksum"] == 0 and reported["outputs"] == 4
    names = [path for path in work.rglob("*") if path.is_file() and not path.name.startswith(".")]
    # Some of a run's own files are its workers' input only.
    assert reported["files"] >= 0.6 * len(names)


def test_a_lost_file_of_each_kind_is_told(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, kind in KINDS.items():
        if name in ("store: marker", "checkpoint", "night", "published", "latest.json"):
            # One less of them is an earlier state, not damage.
            continue
        shutil.rmtree(tmp_path / "work", ignore_errors=True)
        shutil.copytree(work, tmp_path / "work")
        path = sorted((tmp_path / "work").glob(kind.pattern))[0]
        path.unlink()
        with pytest.raises(DamagedError, match=re.escape(path.name)):
            assert kind.read(tmp_path / "work", path) is None, name
        assert main(["fsck", "--work", str(tmp_path / "work")]) == 2, name
        assert path.name in capsys.readouterr().err


def test_what_was_found_whole_is_remembered_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAMENN_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "large.arrow"
    path.write_bytes(bytes(integrity.REMEMBERED_BYTES))
    size, sha256 = path.stat().st_size, file_sha256(path)
    read: list[Path] = []

    def recorded(path: Path) -> str:
        read.append(path)
        return file_sha256(path)

    monkeypatch.setattr(integrity, "file_sha256", recorded)
    for _ in range(3):
        # As in a new process.
        integrity._whole.clear()
        integrity.check_file(path, size, sha256, "")
    assert len(read) == 1
    # Not indefinitely, and not by a clock that was set back.
    for age in (integrity.REMEMBERED_S + 60, -3_600.0):
        read.clear()
        (memory,) = (tmp_path / "cache" / "whole").iterdir()
        os.utime(memory, (time.time() - age, time.time() - age))
        integrity._whole.clear()
        integrity.check_file(path, size, sha256, "")
        assert len(read) == 1, age
    flip(path, 77)
    integrity._whole.clear()
    with pytest.raises(DamagedError, match="SHA-256 differs"):
        integrity.check_file(path, size, sha256, "")


@pytest.mark.parametrize("change", [-1, 1])
def test_a_file_without_a_checksum_is_known_by_its_size(tmp_path: Path, change: int) -> None:
    path = tmp_path / "of_before.parquet"
    path.write_bytes(bytes(100))
    integrity.check_file(path, 100, "", "")
    os.truncate(path, 100 + change)
    with pytest.raises(DamagedError, match=f"has {100 + change} bytes, 100 were written"):
        integrity.check_file(path, 100, "", "")


def test_documents_of_before_are_read_and_others_are_not() -> None:
    given = {"run": "r", "stage": "score"}
    assert integrity.parse_document(json.dumps(given).encode(), "x", ("run", "stage"), "") == given
    data = integrity.dump_document(given)
    assert integrity.parse_document(data, "x", ("run", "stage"), "") == given
    for harmed in (
        data.replace(b"checksum", b"ahecksum"),
        data.replace(b"score", b"scare"),
        b"",
        b"[]",
        b"[" * 100_000,
    ):
        with pytest.raises(DamagedError, match="^x: .* Do this"):
            integrity.parse_document(harmed, "x", ("run", "stage"), "Do this")


def publish_runs(root: Path, runs: list[str]) -> None:
    for run in runs:
        path = root / "runs" / run / "scores" / "part-0.parquet"
        written = files.write_parquet(str(path), pq.ParquetFile(_sample(root)).read())
        manifest = Manifest(stage="score", run=run)
        add_files(manifest, {"scores": ""}, [FileRecord.of("scores", str(path), 1, written)])
        publish(str(root), manifest)


def _sample(root: Path) -> Path:
    import pyarrow as pa

    path = root / ".sample.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"a": [1]}), path)
    return path


@pytest.mark.parametrize("harm", ["empty", "gone", "names a run that is gone", "newest run damaged"])
def test_repair_lets_readers_see_the_newest_whole_run(
    tmp_path: Path, harm: str, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "scores"
    publish_runs(root, ["a", "b", "c"])
    expected = "c"
    if harm == "empty":
        (root / "latest.json").write_bytes(b"")
    elif harm == "gone":
        (root / "latest.json").unlink()
    else:
        expected = "b"
        if harm == "newest run damaged":
            (root / "latest.json").write_bytes(b"{")
            flip(root / "runs" / "c" / "scores" / "part-0.parquet", 300)
        else:
            shutil.rmtree(root / "runs" / "c")
    # Every command's message names the remedy, and that command's message names its result.
    for command in (["rollback", "--out", str(root)], ["gc", "--out", str(root)]):
        assert main(command) == 2
        assert f"camenn fsck --out {root} --repair" in capsys.readouterr().err
    assert main(["fsck", "--out", str(root), "--repair"]) == 2
    latest = read_latest(str(root))
    assert latest is not None and latest.run == expected
    assert main(["gc", "--out", str(root)]) == 0
    if harm != "newest run damaged":
        assert main(["fsck", "--out", str(root)]) == 0


def test_publish_mends_a_pointer(tmp_path: Path) -> None:
    publish_runs(tmp_path, ["a", "b"])
    (tmp_path / "latest.json").write_bytes(b"")
    assert main(["publish", str(tmp_path / "runs" / "a")]) == 0
    latest = read_latest(str(tmp_path))
    assert latest is not None and latest.run == "a"


@pytest.mark.parametrize("ending", [".parquet", ".keys.parquet"])
def test_a_damaged_part_is_set_aside(work: Path, tmp_path: Path, ending: str) -> None:
    shutil.copytree(work / "store", tmp_path / "store")
    directory = tmp_path / "store" / "images" / IMAGES
    before = list_parts(str(directory))
    flip(Path(before[0].path.replace(".parquet", ending)), 999)
    assert main(["fsck", "--out", str(tmp_path / "store"), "--repair"]) == 2
    # The rest is whole; `camenn embed` finds the part's contents missing, and encodes them.
    left = list_parts(str(directory))
    assert [part.name for part in left] == [part.name for part in before[1:]]
    for part in left:
        part.check()
    for path in files_of_part(before[0].path):
        assert Path(f"{path}.damaged").exists() and not Path(path).exists()
