"""Rows read by ranges against those that Arrow reads, and ranges against what is needed."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from camenn_model.data import range_contents
from camenn_model.data.contents import Contents, Means
from camenn_model.data.range_contents import Range, RangeContents
from camenn_model.integrity import DamagedError
from schemas.embeddings import SHAPE_KEY

SHAPE = (2, 3)
ROW = 2 * SHAPE[0] * SHAPE[1]


class Disk:
    """Reads ranges of local files, and keeps a list of them."""

    def __init__(self) -> None:
        self.ranges: list[Range] = []
        self.most_at_once = 0

    def read(self, wanted: Sequence[Range]) -> list[bytes]:
        self.ranges += wanted
        self.most_at_once = max(self.most_at_once, len(wanted))
        found = []
        for path, start, stop in wanted:
            data = Path(path).read_bytes()
            assert 0 <= start < stop <= len(data)
            found.append(data[start:stop])
        return found


def write(path: Path, numbers: list[int], batch: int, options: pa.ipc.IpcWriteOptions | None = None) -> tuple[str, int]:
    """A contents file whose embeddings are told apart by key. Returned are its path and size."""
    values = [np.random.default_rng(number).normal(size=SHAPE).astype(np.float16).tobytes() for number in numbers]
    schema = pa.schema(
        [
            pa.field("image_key", pa.string()),
            pa.field("embedding", pa.binary(ROW), metadata={SHAPE_KEY: f"{SHAPE[0]},{SHAPE[1]}".encode()}),
        ]
    )
    # Keys of several lengths: what follows them in the file is padded.
    table = pa.table([[f"key{number * 7}" for number in numbers], pa.array(values, pa.binary(ROW))], schema=schema)
    with path.open("wb") as handle, pa.ipc.new_file(handle, schema, options=options) as writer:
        writer.write_table(table, max_chunksize=batch)
    return str(path), path.stat().st_size


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_rows_are_those_of_mapped_files(data: st.DataObject) -> None:
    """Whatever the files and record batches, with rows of -1, rows asked for twice, and bridged gaps."""
    numbers = st.lists(st.integers(0, 40), max_size=25, unique=True)
    cut = data.draw(st.lists(numbers, min_size=1, max_size=4), label="files")
    batch = data.draw(st.integers(1, 12), label="rows of a record batch")
    gap = data.draw(st.sampled_from([0, ROW, 5 * ROW]), label="gap")
    longest = data.draw(st.sampled_from([0, 3 * ROW, 2**20]), label="longest")
    wanted = data.draw(st.none() | st.lists(st.integers(0, 50)), label="wanted")
    asked = None if wanted is None else pa.chunked_array([[f"key{number * 7}" for number in wanted]], pa.string())
    disk = Disk()
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        for name, value in (("GAP", gap), ("LONGEST", longest), ("AT_ONCE", 2), ("TAIL", 64)):
            patch.setattr(range_contents, name, value)
        files = [write(Path(directory, f"{place}.arrow"), some, batch) for place, some in enumerate(cut)]
        mapped = Contents([path for path, _ in files], "image_key", wanted=asked)
        ranges = RangeContents(files[::-1], "image_key", disk.read, wanted=asked)
        assert ranges.keys.equals(mapped.keys) and len(ranges) == len(mapped) and ranges.shape == mapped.shape
        rows = np.array(data.draw(st.lists(st.integers(-1, len(mapped) - 1), max_size=30), label="rows"), np.int64)
        disk.ranges, disk.most_at_once = [], 0
        found = ranges.gather(rows)
        assert found.dtype == np.float16 and found.tobytes() == mapped.gather(rows).tobytes()
        assert disk.most_at_once <= 2
        read, distinct = sum(stop - start for _, start, stop in disk.ranges), len(np.unique(rows[rows >= 0]))
        # No byte is read twice, and few that nobody needs.
        assert ROW * distinct <= read <= ROW * distinct + gap * max(0, distinct - len(disk.ranges))
        assert len(disk.ranges) <= distinct
        assert all(stop - start <= max(ROW, longest) for _, start, stop in disk.ranges)
        used = rows[rows >= 0]
        assert Means(ranges)[used].tobytes() == Means(mapped)[used].tobytes()


def test_neighbouring_rows_are_one_range(tmp_path: Path) -> None:
    disk, numbers = Disk(), list(range(100))
    contents = RangeContents([write(tmp_path / "a.arrow", numbers, 100)], "image_key", disk.read)
    disk.ranges = []
    contents.gather(np.arange(100))
    ((_, start, stop),) = disk.ranges
    assert stop - start == 100 * ROW


def test_no_files(tmp_path: Path) -> None:
    """A city without any photo: the model tells the shape, which a file's own would not follow."""
    nothing = RangeContents([], "image_key", Disk().read)
    nothing.expect((4, 5))
    assert nothing.gather(np.array([-1, -1])).shape == (2, 4, 5)
    some = RangeContents([write(tmp_path / "a.arrow", [1], 1)], "image_key", Disk().read)
    some.expect((4, 5))
    assert some.shape == SHAPE


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda data: data[:-20], "its end is missing"),
        (lambda data: data[:-10] + b"\xff\xff\xff\x7f" + data[-6:], "its footer is longer than the file"),
        (lambda data: data.replace(b"\xff" * 4, b"\x00" * 4), "schema"),
        (lambda data: data[:12] + data[12:].replace(b"\xff" * 4, b"\x00" * 4), "no record batch is where"),
    ],
)
def test_a_file_that_is_no_contents_file(tmp_path: Path, damage: object, words: str) -> None:
    assert callable(damage)
    path, _ = write(tmp_path / "a.arrow", list(range(9)), 9)
    Path(path).write_bytes(damage(Path(path).read_bytes()))
    with pytest.raises(DamagedError, match=rf"a\.arrow: is not an Arrow file as camenn writes contents.*{words}"):
        RangeContents([(path, Path(path).stat().st_size)], "image_key", Disk().read)


def test_a_compressed_file_is_refused(tmp_path: Path) -> None:
    """Its rows lie where nobody can tell."""
    file = write(tmp_path / "a.arrow", list(range(99)), 99, pa.ipc.IpcWriteOptions(compression="zstd"))
    with pytest.raises(DamagedError, match="it is compressed"):
        RangeContents([file], "image_key", Disk().read)
