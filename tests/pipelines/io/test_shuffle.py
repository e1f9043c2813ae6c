"""Tables on their way through a shuffle: bytes or places in files, the same table either way."""

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
    parcels = [packer.pack(table) for table in tables]
    assert all(isinstance(parcel, bytes) for parcel in parcels)
    assert [unpack(parcel) for parcel in parcels] == tables


def test_tables_come_back_from_files_whoever_reads_them(tmp_path: Path) -> None:
    tables = [pa.table({"n": list(range(number))}) for number in (3, 0, 70_000)]
    packer = pickle.loads(pickle.dumps(Packer(str(tmp_path / "shuffle"))))
    parcels = []
    for table in tables:
        parcels.append(packer.pack(table))
        # Before the file is closed, too: stages overlap.
        assert unpack(parcels[-1]) == table
    packer.close()
    packer.pack(tables[0])
    # A packer that has begun a file travels without it.
    other = pickle.loads(pickle.dumps(packer))
    parcels.append(other.pack(tables[2]))
    assert [unpack(parcel) for parcel in parcels] == [*tables, tables[2]]
    assert len({parcel[0] for parcel in parcels}) == 2 and len(list((tmp_path / "shuffle").iterdir())) == 3
