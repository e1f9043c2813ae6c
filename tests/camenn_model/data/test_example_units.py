"""The units of reading depend on a day's rows, not on their files."""

import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import given, settings
from hypothesis import strategies as st

from camenn_model.data.batching import list_units
from camenn_model.data.examples import count_rows, read_examples

DAYS = {"2024-01-01": range(23), "2024-01-02": range(100, 108), "2024-01-03": range(200, 201)}


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_units_are_a_days_rows_in_pieces_however_files_are_cut(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 30), label="size")
    with tempfile.TemporaryDirectory() as directory:
        files: list[tuple[str, int]] = []
        for date, rows in DAYS.items():
            cuts = data.draw(st.sets(st.integers(1, len(rows) - 1), max_size=4) if len(rows) > 1 else st.just(set()))
            edges = [0, *sorted(cuts), len(rows)]
            for first, end in zip(edges[:-1], edges[1:], strict=True):
                path = Path(directory, f"run-{data.draw(st.integers(0, 2))}", f"date={date}", f"{len(files)}.parquet")
                path.parent.mkdir(parents=True, exist_ok=True)
                table = pa.table({"row": list(rows[first:end]), "twice": [2 * row for row in rows[first:end]]})
                pq.write_table(table, path, row_group_size=data.draw(st.integers(1, 9)))
                files.append((str(path), table.num_rows))
        units = list_units(files, size)
        found = [read_examples(unit)["row"].to_pylist() for unit in units]
        expected = [list(rows[start : start + size]) for rows in DAYS.values() for start in range(0, len(rows), size)]
        assert found == expected
        assert count_rows(units) == sum(map(len, DAYS.values()))
        assert [read_examples(unit, ["twice"]).to_pydict() for unit in units[:2]] == [
            {"twice": [2 * row for row in rows]} for rows in expected[:2]
        ]
