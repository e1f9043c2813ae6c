"""Reconcile the row counts of a run.

Every row has one outcome.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import apache_beam as beam
import numpy as np
import pandas as pd
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.io import files
from pipelines.io.tables import FileRecord
from schemas.errors import InputError

FINISHED = "finished.json"


@dataclass(frozen=True)
class Count:
    """A number of rows with one outcome.

    `rows` of `table` that went `where`: `in`, `out`, `rejected`, or a named exclusion such as
    `duplicates`. Summed over the job.
    """

    table: str
    where: str
    rows: int


class _WriteFinished(beam.DoFn):
    def __init__(self, directory: str) -> None:
        self.directory = directory

    def process(self, _: None, records: list[FileRecord], counts: list[tuple[tuple[str, str], int]]) -> Iterator[str]:
        path = files.join(self.directory, FINISHED)
        value = {
            "files": [asdict(record) for record in records],
            "counts": [[table, where, rows] for (table, where), rows in counts],
        }
        files.write_document(path, value)
        yield path


@dataclass
class FinishRun(beam.PTransform[Any, beam.PCollection[Any]]):
    """The last step of a job, which records its output.

    It writes what the job emitted (finished files, summed counts) as one small file that the
    submitter reads.

    Files that a retried bundle left behind are not emitted, so they never enter a manifest. Counts
    come from emitted elements, so a retry does not count twice.
    """

    directory: str

    def expand(self, emitted: Any) -> beam.PCollection[Any]:
        counts = (
            emitted["counts"]
            | "KeyCounts" >> beam.Map(lambda c: ((c.table, c.where), c.rows))
            | "SumCounts" >> beam.CombinePerKey(sum)
        )
        return (
            emitted["files"].pipeline
            | "Once" >> beam.Create([None])
            | "WriteFinished"
            >> beam.ParDo(
                _WriteFinished(self.directory), beam.pvalue.AsList(emitted["files"]), beam.pvalue.AsList(counts)
            )
        )


def read_finished(directory: str) -> tuple[list[FileRecord], dict[str, dict[str, int]]]:
    """Read the file that `FinishRun` wrote.

    Returned are file records, and counts as {table: {where: rows}}.
    """
    value = files.read_document(
        files.join(directory, FINISHED), ("files", "counts"), "Run the command again: nothing was published."
    )
    counts: dict[str, dict[str, int]] = {}
    for table, where, rows in value["counts"]:
        counts.setdefault(table, {})[where] = rows
    return [FileRecord(**record) for record in value["files"]], counts


def read_rejects(records: list[FileRecord], limit: int = 5) -> list[dict[str, str]]:
    """Read the first few rejects of each table.

    They are of a run's tables, as dicts.
    """
    found: dict[str, list[dict[str, str]]] = {}
    for record in records:
        if record.table == "rejects":
            with files.open_read(record.path) as handle:
                rejects = pq.read_table(handle)
            tables = pc.list_element(pc.split_pattern(rejects["key"], ":", max_splits=1), 0)
            for table in tables.unique().to_pylist():
                kept = found.setdefault(table, [])
                kept += rejects.filter(pc.equal(tables, table)).slice(0, limit - len(kept)).to_pylist()
    return [reject for kept in found.values() for reject in kept]


def check_accounting(counts: dict[str, dict[str, int]]) -> None:
    """Check that every input row has exactly one outcome.

    in = out + rejected + each exclusion.

    Raises:
        RuntimeError: the row-count reconciliation of a table fails, which is a bug, so nothing may
            be published.
    """
    for table, row in counts.items():
        outcomes = {where: rows for where, rows in row.items() if where != "in"}
        if row.get("in", 0) != sum(outcomes.values()):
            raise RuntimeError(
                f"table '{table}': {row.get('in', 0)} rows came in, but these went somewhere: "
                f"{outcomes}. Nothing was published."
            )


def check_reject_rate(counts: dict[str, dict[str, int]], limit: float, examples: list[dict[str, str]]) -> None:
    """Stop when a table loses too many rows.

    It may lose `limit` of its rows to rejects and no more.

    Raises:
        InputError: with up to five rejects as examples.
    """
    for table, row in counts.items():
        rejected, total = row.get("rejected", 0), row.get("in", 0)
        if total and rejected / total > limit:
            shown = "\n".join(
                f"  {reject['key']}: {reject['reason']}: {reject['detail']}"
                for reject in examples
                if reject["key"].startswith(f"{table}:")
            )
            raise InputError(
                f"table '{table}': {rejected:,} of {total:,} rows were rejected "
                f"({rejected / total:.1%}), more than --max_reject_rate {limit}. "
                f"Nothing was published. First ones:\n{shown}\nMend the rows, or raise --max_reject_rate."
            )


@dataclass
class Outcomes:
    """A count of one table's excluded rows.

    It counts the rows that leave, exclusion by exclusion.
    """

    table: str
    counts: list[Count]

    def keep(self, frame: pd.DataFrame, mask: np.ndarray, exclusion: str) -> pd.DataFrame:
        """Keep rows where `mask` holds.

        The others are counted under `exclusion`.
        """
        lost = int(len(mask) - mask.sum())
        if lost:
            self.counts.append(Count(self.table, exclusion, lost))
            return frame[mask].reset_index(drop=True)
        return frame
