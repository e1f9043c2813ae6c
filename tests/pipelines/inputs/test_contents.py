"""Embeddings of shard sets and scores: copied from the store once, and read in order of keys whatever the files."""

import hashlib
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from camenn_model.data.contents import Contents
from pipelines.inputs import contents as contents_module
from pipelines.inputs.contents import ContentJob, copy_contents, plan_contents
from pipelines.io.tables import FileRecord
from pipelines.runs.manifest import Manifest, add_files
from pipelines.runs.store import IMAGES, commit_part, fixed_binary, generation
from schemas.embeddings import image_embeddings, stamp_embeddings

SHAPE = (1, 4)


def name_key(number: int) -> str:
    """A content's key."""
    return hashlib.sha256(str(number).encode()).hexdigest()[:32]


def embed(number: int) -> NDArray[np.float16]:
    """Its embedding."""
    return np.random.default_rng(number).normal(size=SHAPE).astype(np.float16)


def write_contents(path: Path, numbers: list[int], batch: int) -> str:
    """A contents file of some contents in this order, `batch` rows in a record batch."""
    embeddings = fixed_binary(np.stack([embed(number) for number in numbers]))
    keys = pa.array([name_key(number) for number in numbers], pa.string())
    table = stamp_embeddings(pa.table({"image_key": keys, "embedding": embeddings}), SHAPE, "fake")
    with path.open("wb") as handle, pa.ipc.new_file(handle, table.schema) as writer:
        writer.write_table(table, max_chunksize=batch)
    return str(path)


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_contents_are_in_order_of_keys_whatever_the_files(data: st.DataObject) -> None:
    """Also files of earlier versions, whose rows are in the store's order; a key in two files counts once."""
    numbers = st.lists(st.integers(0, 25), min_size=1, max_size=12, unique=True)
    cut = data.draw(st.lists(numbers, max_size=4), label="files")
    wanted = data.draw(st.none() | st.lists(st.integers(0, 30)), label="wanted")
    known = {name_key(number): embed(number) for file in cut for number in file}
    if wanted is not None:
        known = {key: value for key, value in known.items() if key in {name_key(number) for number in wanted}}
    keep = data.draw(st.booleans(), label="keep")
    with tempfile.TemporaryDirectory() as directory:
        batch = data.draw(st.integers(1, 12), label="rows of a record batch")
        paths = [write_contents(Path(directory, f"{place}.arrow"), file, batch) for place, file in enumerate(cut)]
        asked = None if wanted is None else pa.chunked_array([[name_key(number) for number in wanted]], pa.string())
        contents = Contents(paths, "image_key", SHAPE, wanted=asked, keep=keep)
        assert contents.keys.to_pylist() == sorted(known)
        assert len(contents) == len(known)
        keys = data.draw(st.lists(st.integers(0, 40).map(name_key) | st.none(), max_size=20), label="keys")
        rows = contents.rows_of(pa.array(keys, pa.string()))
        assert [row >= 0 for row in rows] == [key in known for key in keys]
        nothing = np.zeros(SHAPE, dtype=np.float16)
        expected = [known.get(key or "", nothing) for key in keys]
        assert np.array_equal(contents.gather(rows), np.array(expected, dtype=np.float16).reshape(-1, *SHAPE))
        everything = contents.gather(np.arange(len(contents)))
        assert np.array_equal(everything, np.array([known[key] for key in sorted(known)]).reshape(-1, *SHAPE))


class Store:
    """Parts of photos' embeddings, and a manifest that lists them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.records: list[FileRecord] = []

    def add(self, name: str, numbers: list[int]) -> None:
        """A part of some contents."""
        ones = np.ones(len(numbers))
        columns = {
            "image_key": pa.array([name_key(number) for number in numbers], pa.string()),
            "embedding": fixed_binary(np.stack([embed(number) for number in numbers])),
            **{column: pa.array(ones, pa.float32()) for column in ("blur", "luminance")},
            **{column: pa.array(ones, pa.int32()) for column in ("width", "height")},
        }
        contract = image_embeddings(*SHAPE)
        directory = generation(str(self.root), IMAGES, "fake")
        part = commit_part(directory, contract, SHAPE, name, pa.table(columns), kernels="fake")
        self.records.append(FileRecord(contract.name, part.path, part.rows, part.bytes))
        if len(self.records) % 3:
            # The others are like those that an earlier version of camenn wrote.
            self.records.append(part.keys_record("image_keys"))

    def jobs(self, wanted: list[int], present: list[str]) -> list[ContentJob]:
        """The jobs to copy."""
        manifest = Manifest(stage="embed", run="run")
        add_files(manifest, {"image_embeddings": "", "image_keys": ""}, self.records)
        keys = pa.chunked_array([[name_key(number) for number in wanted]], pa.string())
        return plan_contents(IMAGES, manifest, keys, present, str(self.root / "wanted"))


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """Three parts of row groups of four rows; a retry wrote three contents twice, one of them in one part."""
    monkeypatch.setattr("pipelines.runs.store.ROW_GROUP", 4)
    store = Store(tmp_path)
    store.add("b", list(range(20)))
    store.add("a", [20, 3, 21, 22, 20])
    store.add("c", [7, *range(30, 41)])
    return store


def numbers_of(path: str) -> list[str]:
    """Keys of a contents file, as they lie."""
    with pa.memory_map(path) as mapped:
        return [str(key) for key in pa.ipc.open_file(mapped).read_all()["image_key"].to_pylist()]


def test_contents_are_copied_once_in_files_of_bounded_size(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contents_module, "CONTENT_FILE_BYTES", 8 * 10)
    wanted = [*range(0, 20, 2), 3, *range(20, 23), *range(30, 41), 99]
    jobs = store.jobs(wanted, [])
    records = [copy_contents(job, str(tmp_path / "contents")) for job in jobs]
    found = [numbers_of(record.path) for record in records]
    assert len(found) > 2 and max(map(len, found)) <= 10
    assert [record.rows for record in records] == [len(keys) for keys in found]
    assert all(keys == sorted(keys) for keys in found)
    assert sorted(key for keys in found for key in keys) == sorted(
        name_key(number) for number in wanted if number != 99
    )
    read = [(path, group) for job in jobs for path, groups in job.groups for group in groups]
    assert len(read) == len(set(read)), "no row group is read twice"
    contents = Contents([record.path for record in records], "image_key")
    rows = contents.rows_of(pa.array([name_key(number) for number in wanted[:-1]], pa.string()))
    assert np.array_equal(contents.gather(rows), np.stack([embed(number) for number in wanted[:-1]]))
    # The next run copies what is new, and reads no row group that has nothing of it.
    again = store.jobs([*wanted, 5], [record.path for record in records])
    assert [[groups for _, groups in job.groups] for job in again] == [[(1,)]]
    assert numbers_of(copy_contents(again[0], str(tmp_path / "contents")).path) == [name_key(5)]


def test_contents_that_are_copied_again_are_the_same_file(store: Store, tmp_path: Path) -> None:
    """A bundle that is tried again leaves no second file, and a reader of the first one still has its bytes."""
    (job,) = store.jobs(list(range(41)), [])
    first = copy_contents(job, str(tmp_path / "contents"))
    written = Path(first.path).read_bytes()
    assert copy_contents(job, str(tmp_path / "contents")) == first
    assert [path.read_bytes() for path in (tmp_path / "contents").iterdir()] == [written]


def test_contents_that_are_gone_end_the_run(store: Store, tmp_path: Path) -> None:
    (job,) = store.jobs(list(range(41)), [])
    lost = [(path, groups[1:]) for path, groups in job.groups]
    with pytest.raises(RuntimeError, match=r"part-a.*of 34 contents that were there a moment ago are not"):
        copy_contents(ContentJob(job.kind, tuple(lost), job.wanted), str(tmp_path / "contents"))
    assert not (tmp_path / "contents").exists()


def test_contents_that_nobody_wants_are_no_job(store: Store) -> None:
    assert store.jobs([99], []) == []
