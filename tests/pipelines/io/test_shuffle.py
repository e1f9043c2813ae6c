"""Tables in a shuffle: as bytes or as spilled partitions, the same table either way."""

import pickle
from pathlib import Path

import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from pipelines.io.shuffle import Packer, unpack

TABLES = st.lists(st.tuples(st.integers(-(2**40), 2**40), st.text(max_size=20) | st.none()), max_size=30).map(
    lambda rows: pa.table({"n": [n for n, _ in rows], "text": pa.array([text for _, text in rows], pa.string())})
)


@given(st.lists(TABLES, max_size=6))
def test_tables_come_back_as_bytes(tables: list[pa.Table]) -> None:
    packer = Packer(None)
    partitions = [packer.pack(table) for table in tables]
    assert all(isinstance(partition, bytes) for partition in partitions)
    assert [unpack(partition) for partition in partitions] == tables


def test_tables_come_back_from_files_whoever_reads_them(tmp_path: Path) -> None:
    tables = [pa.table({"n": list(range(number))}) for number in (3, 0, 70_000)]
    packer = pickle.loads(pickle.dumps(Packer(str(tmp_path / "shuffle"))))
    partitions = []
    for table in tables:
        partitions.append(packer.pack(table))
        # Before the file is closed, too: stages overlap.
        assert unpack(partitions[-1]) == table
    packer.close()
    packer.pack(tables[0])
    # A packer that has begun a file travels without it.
    other = pickle.loads(pickle.dumps(packer))
    partitions.append(other.pack(tables[2]))
    assert [unpack(partition) for partition in partitions] == [*tables, tables[2]]
    assert len({partition[0] for partition in partitions}) == 2 and len(list((tmp_path / "shuffle").iterdir())) == 3
