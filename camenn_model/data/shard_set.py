"""A shard set, opened.

It has items, users and example files, and the embeddings mapped into memory. Nothing here imports
torch or Beam.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from camenn_model.data.contents import Contents
from camenn_model.published import check_table_files, read_manifest, read_published
from schemas.errors import InputError
from schemas.manifest import RUNS, remedy
from schemas.training import EXAMPLE_ORDER

UNIT_ROWS = 8_192
"""Examples of a day that are read and mixed at once, which is a row group of their files"""
BLOCK_ROWS = 262_144
"""Examples of a day that are read at once where all are read in order. A file has no more"""


def date_of(path: str) -> str:
    """Return the date that an example file is filed under."""
    return path.split("/date=")[1].split("/")[0]


def first_row(path: str) -> tuple[Any, ...]:
    """Read the `EXAMPLE_ORDER` columns of an example file's first row."""
    with pq.ParquetFile(path) as file:
        row = file.read_row_group(0, columns=list(EXAMPLE_ORDER)).slice(0, 1).to_pylist()[0]
    return tuple(row[name] for name in EXAMPLE_ORDER)


@dataclass(frozen=True)
class ShardSet:
    """A published shard set.

    Raises:
        InputError: nothing is published at `root`, or another stage's output.
    """

    root: str

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """Return the published run's manifest."""
        latest = read_published(self.root, "shards", "--shards")
        return read_manifest(Path(self.root) / RUNS / latest["run"])

    def _check(self, table: str) -> None:
        check_table_files(Path(self.root), self.manifest, table, remedy("shards", table))

    def files(self, table: str) -> list[tuple[str, int]]:
        """Return (path, rows) of a table's files, ordered by path.

        Raises:
            DamagedError: one of them is lost or damaged.
        """
        self._check(table)
        entries = self.manifest["tables"].get(table, {}).get("files", [])
        return sorted((str(Path(self.root) / entry["path"]), int(entry["rows"])) for entry in entries)

    def examples(self, split: str) -> list[tuple[str, int]]:
        """List the example files of one split, by time.

        Returns (path, rows) of each. A day's rows are its files' rows concatenated, whichever runs
        wrote them.

        Raises:
            InputError: the shard set was written by a version that filed splits by folder.
            DamagedError: a file of any split is lost or damaged.
        """
        return self._examples.get(split, [])

    @cached_property
    def _examples(self) -> dict[str, list[tuple[str, int]]]:
        self._check("examples")
        entries = self.manifest["tables"].get("examples", {}).get("files", [])
        if any("split" not in entry for entry in entries):
            raise InputError(
                f"--shards {self.root}: was written by an earlier version of camenn. Run `camenn "
                "shards --rebuild` into it."
            )
        days: dict[tuple[str, str], list[tuple[str, int]]] = {}
        for path, rows, split in sorted(
            (str(Path(self.root) / entry["path"]), int(entry["rows"]), entry["split"]) for entry in entries
        ):
            days.setdefault((split, date_of(path)), []).append((path, rows))
        found: dict[str, list[tuple[str, int]]] = {}
        for (split, _), of_day in sorted(days.items()):
            # Names contain runs and pieces: only the rows show which file of a day comes first.
            in_order = sorted(of_day, key=lambda file: first_row(file[0])) if len(of_day) > 1 else of_day
            found.setdefault(split, []).extend(in_order)
        return found

    def closed_before(self) -> str:
        """Return the first date that is not over yet.

        Attribution windows are included: labels of earlier dates are complete, except for orders
        that arrive late.
        """
        options = self.manifest["options"]
        closed_us = int(options["days"]["as_of"]) - round(float(options["attribution_hours"]) * 3_600_000_000)
        return str(np.datetime64(closed_us, "us").astype("datetime64[D]"))

    @cached_property
    def items(self) -> pa.Table:
        """Return the items, ordered by item_id."""
        return pa.concat_tables([pq.ParquetFile(path).read() for path, _ in self.files("items")])

    @cached_property
    def users(self) -> pa.Table:
        """Return the users and their fields."""
        return pa.concat_tables([pq.ParquetFile(path).read() for path, _ in self.files("users")])

    @cached_property
    def images(self) -> Contents:
        """Return the patch features of the items' photos."""
        paths = [path for path, _ in self.files("contents_images")]
        return Contents(paths, "image_key", wanted=self.items["image_key"])

    @cached_property
    def titles(self) -> Contents:
        """Return the token states of the items' titles."""
        paths = [path for path, _ in self.files("contents_titles")]
        return Contents(paths, "title_key", wanted=self.items["title_key"])
