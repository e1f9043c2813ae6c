"""The store's parts over many nights.

They are merged without losing or doubling a content, and removed only when nobody can be reading
them.
"""

import datetime
import re
from collections.abc import Container
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from camenn_model.integrity import DamagedError
from pipelines.io import clock, files
from pipelines.runs import store as runs_store
from pipelines.runs.part_keys import files_of_part, keys_path, read_part
from pipelines.runs.store import Part, all_parts, commit_part, drop_replaced, list_parts, merge_parts, plan_merges
from schemas.embeddings import KERNELS_KEY, ROW_GROUP_COLUMN, embedding_keys, embedding_shape, image_embeddings

SHAPE = (2, 4)
CONTRACT = image_embeddings(*SHAPE)
NIGHT = datetime.timedelta(days=1)


def commit(
    directory: Path, first: int, rows: int, kernels: str = "eager-batch64", **extra: list[tuple[str, str, str]]
) -> Part:
    """A part with the contents `first` to `first + rows`."""
    keys = [f"{number:032x}" for number in range(first, first + rows)]
    rng = np.random.default_rng(first)
    table = pa.table(
        {
            "image_key": keys,
            "embedding": [rng.normal(size=SHAPE).astype(np.float16).tobytes() for _ in keys],
            "blur": np.arange(rows, dtype=np.float32),
            "luminance": np.full(rows, 0.5, dtype=np.float32),
            "width": np.full(rows, 300, dtype=np.int32),
            "height": np.full(rows, 300, dtype=np.int32),
        },
        schema=CONTRACT.schema,
    )
    return commit_part(
        str(directory), CONTRACT, SHAPE, f"{first:032x}", table, kernels=kernels, seconds=rows / 4, **extra
    )


def rows_of(parts: list[Part]) -> list[dict[str, object]]:
    """All rows of some parts, by key."""
    found = [row for part in parts for row in pq.ParquetFile(part.path).read().to_pylist()]
    return sorted(found, key=lambda row: row["image_key"])


def drop(directory: Path, listed: set[str], now: datetime.datetime | None = None, unseen: Container[str] = ()) -> int:
    """Remove replaced parts of a directory."""
    return drop_replaced(all_parts(str(directory)), lambda: listed, now, unseen=unseen)


def test_merged_parts_hold_the_same_rows(tmp_path: Path) -> None:
    sizes = [1, 300, 256, 7, 0, 500]
    bad = [("dead", "corrupt_image", "no photo")]
    before = [commit(tmp_path, 1000 * n, size, failures=bad if n == 4 else []) for n, size in enumerate(sizes)]
    expected = rows_of(before)
    merged = merge_parts(str(tmp_path), before)
    assert list_parts(str(tmp_path)) == [runs_store.read_marker(merged.path.replace(".parquet", ".json"))]
    assert rows_of([merged]) == expected
    assert (merged.rows, merged.failures, merged.seconds) == (sum(sizes), tuple(bad), sum(sizes) / 4)
    file = pq.ParquetFile(merged.path)
    assert max(file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)) <= runs_store.ROW_GROUP
    assert embedding_shape(file.schema_arrow) == SHAPE
    assert file.schema_arrow.field("embedding").metadata[KERNELS_KEY] == b"eager-batch64"


def test_keys_files_hold_all_but_the_embeddings(tmp_path: Path) -> None:
    parts = [commit(tmp_path, 1000 * n, size) for n, size in enumerate([1, 300, 0, 500])]
    columns = [name for name in CONTRACT.names if name != "embedding"] + [ROW_GROUP_COLUMN]
    for part in [*parts, merge_parts(str(tmp_path), parts)]:
        found = part.read_keys(columns)
        # The last is a part that an earlier version of camenn wrote.
        assert found == read_part(part.path, columns) == replace(part, keys_bytes=0).read_keys(columns)
        assert found.num_rows == part.rows and found.schema.names == embedding_keys(CONTRACT).names
        assert Path(keys_path(part.path)).stat().st_size == part.keys_bytes


@pytest.mark.parametrize("harm", ["gone", "another byte", "cut off"])
def test_a_damaged_keys_file_is_named(tmp_path: Path, harm: str) -> None:
    part = commit(tmp_path, 0, 3)
    path = Path(keys_path(part.path))
    data = path.read_bytes()
    path.write_bytes(data[:-1] if harm == "cut off" else data[:-1] + bytes([data[-1] ^ 1]))
    if harm == "gone":
        path.unlink()
    for use in (part.check, lambda: part.read_keys(["image_key"])):
        with pytest.raises(DamagedError, match=rf"{re.escape(str(path))}: .*fsck --repair"):
            use()


def test_a_merge_is_done_once(tmp_path: Path) -> None:
    group = [commit(tmp_path, 10 * n, 3) for n in range(3)]
    merged = merge_parts(str(tmp_path), group)
    written = Path(merged.path).stat().st_mtime_ns
    assert merge_parts(str(tmp_path), group).path == merged.path
    assert Path(merged.path).stat().st_mtime_ns == written


def test_parts_of_other_kernels_are_not_merged(tmp_path: Path) -> None:
    parts = [commit(tmp_path, 10 * n, 3, "eager" if n % 2 else "compiled") for n in range(8)]
    groups = plan_merges(parts, target=1 << 20, leave=3)
    assert [{part.kernels for part in group} for group in groups] == [{"compiled"}, {"eager"}]


@pytest.mark.parametrize("small", [0, 1, 3])
def test_few_small_parts_and_large_ones_are_left_alone(small: int) -> None:
    large = [Part(path=f"s/part-{n}.parquet", rows=9, bytes=600) for n in range(9)]
    little = [Part(path=f"s/part-small{n}.parquet", rows=1, bytes=10) for n in range(small)]
    assert plan_merges([*large, *little], target=1000, leave=3) == []


def test_365_nights_leave_few_files_and_every_content_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each night two chunks are added, small ones are merged, and replaced parts are removed when
    their readers are gone.
    """
    start = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    published: list[set[str]] = [set(), set()]
    most = first = 0
    for night in range(365):
        monkeypatch.setattr(clock, "utc_now", lambda night=night: start + night * NIGHT)
        parts = list_parts(str(tmp_path))
        for _ in range(2):
            rows = 3 + night % 5
            commit(tmp_path, first, rows)
            first += rows
        for group in plan_merges(parts, target=64 * 1024, leave=8):
            merge_parts(str(tmp_path), group)
        after = list_parts(str(tmp_path))
        keys = [row["image_key"] for row in rows_of(after)] if night % 40 == 0 else []
        assert len(keys) == len(set(keys)) and sum(part.rows for part in after) == first
        drop(tmp_path, published[-1])
        # The run of last night and of the night before are still whole.
        published = [published[-1], {part.path for part in after}]
        assert all(Path(path).exists() for paths in published for path in paths)
        most = max(most, len(list(tmp_path.iterdir())))
    assert [row["image_key"] for row in rows_of(list_parts(str(tmp_path)))] == [f"{n:032x}" for n in range(first)]
    # 730 chunks would be 1,460 files. Allowed are the small parts of eight chunks, those of two
    # nights before, and the merged ones.
    assert most < 80, most


def test_parts_are_removed_only_after_two_days_and_when_not_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b, c = (commit(tmp_path, 10 * n, 3) for n in range(3))
    first = merge_parts(str(tmp_path), [a, b])
    second = merge_parts(str(tmp_path), [first, c])
    expected = rows_of([second])
    now = datetime.datetime.now(datetime.UTC)
    assert drop(tmp_path, set(), now + NIGHT) == 0
    # A run that is still read lists a; all others are removed, and a must not be restored although
    # its replacement is gone.
    assert drop(tmp_path, {a.path}, now + 3 * NIGHT) == 3
    assert Path(a.path).exists() and not Path(first.path).exists()
    assert rows_of(list_parts(str(tmp_path))) == expected
    # A clock that was set back removes nothing.
    assert drop(tmp_path, set(), now - 30 * NIGHT) == 0
    assert drop(tmp_path, set(), now + 3 * NIGHT) == 1


def test_a_removal_that_is_cut_off_leaves_the_marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its marker a part would belong to no run, and stay forever: no removal would find it again."""
    a, b = (commit(tmp_path, 10 * n, 3) for n in range(2))
    merged = merge_parts(str(tmp_path), [a, b])
    expected, later = rows_of([merged]), datetime.datetime.now(datetime.UTC) + 3 * NIGHT
    delete = files.delete

    def cut_off(paths: list[str]) -> None:
        delete(paths[:1])
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "delete", cut_off)
    for part in (a, b):
        with pytest.raises(KeyboardInterrupt):
            drop(tmp_path, set(), later)
        marker = Path(part.path.replace(".parquet", ".json"))
        assert (Path(part.path).exists(), marker.exists()) == (False, True)
        assert rows_of(list_parts(str(tmp_path))) == expected
        monkeypatch.setattr(files, "delete", delete)
        if part is a:
            assert drop(tmp_path, {b.path}, later) == 1
            monkeypatch.setattr(files, "delete", cut_off)
    assert drop(tmp_path, set(), later) == 1
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {Path(path).name for path in files_of_part(merged.path)}


def test_parts_that_nobody_ever_listed_go_at_once(tmp_path: Path) -> None:
    a, b, c = (commit(tmp_path, 10 * n, 3) for n in range(3))
    merged = merge_parts(str(tmp_path), [a, b, c])
    assert drop(tmp_path, set(), unseen={a.name, c.name, merged.name}) == 2
    assert Path(b.path).exists() and Path(merged.path).exists() and not Path(a.path).exists()
    assert [part.path for part in list_parts(str(tmp_path))] == [merged.path]


def test_a_part_without_its_marker_is_not_read(tmp_path: Path) -> None:
    kept = commit(tmp_path, 0, 3)
    cut = commit(tmp_path, 10, 3)
    Path(cut.path.replace(".parquet", ".json")).unlink()
    assert [part.path for part in list_parts(str(tmp_path))] == [kept.path]
