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
from camenn_model.published import Copies, ListedFile, check_table_files, read_manifest, read_published
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

    Args:
        root: of the output.
        copies: of its files on this machine, where it lies elsewhere.

    Raises:
        InputError: nothing is published at `root`, or another stage's output.
    """

    root: str
    copies: Copies | None = None

    @property
    def _place(self) -> Path:
        return Path(self.root if self.copies is None else self.copies.directory)

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """Return the published run's manifest."""
        run = read_published(self.root, "shards", "--shards")["run"] if self.copies is None else self.copies.run
        return read_manifest(self._place / RUNS / run)

    def _check(self, table: str, listed: list[ListedFile] | None = None) -> None:
        """Check a table's files, or copy those in `listed`."""
        if self.copies is None:
            check_table_files(self._place, self.manifest, table, remedy("shards", table))
        else:
            wanted = ListedFile.of(self.manifest, table) if listed is None else listed
            self.copies.make(wanted, remedy("shards", table))

    def files(self, table: str) -> list[tuple[str, int]]:
        """Return (path, rows) of a table's files, ordered by path.

        Raises:
            DamagedError: one of them is lost or damaged.
        """
        self._check(table)
        entries = self.manifest["tables"].get(table, {}).get("files", [])
        return sorted((str(self._place / entry["path"]), int(entry["rows"])) for entry in entries)

    def examples(self, split: str) -> list[tuple[str, int]]:
        """List the example files of one split, by time.

        Returns (path, rows) of each. A day's rows are its files' rows concatenated, whichever runs
        wrote them.

        Raises:
            InputError: the shard set was written by a version that filed splits by folder.
            DamagedError: a file of the split is lost or damaged. On a local disk, of any split.
        """
        if split not in self._examples:
            self._examples[split] = self._list_examples(split)
        return self._examples[split]

    @cached_property
    def _examples(self) -> dict[str, list[tuple[str, int]]]:
        """Keep the splits that were asked for."""
        if any("split" not in entry for entry in self._entries):
            raise InputError(
                f"--shards {self.root}: was written by an earlier version of camenn. Run `camenn "
                "shards --rebuild` into it."
            )
        if self.copies is None:
            self._check("examples")
        return {}

    @property
    def _entries(self) -> list[dict[str, Any]]:
        entries: list[dict[str, Any]] = self.manifest["tables"].get("examples", {}).get("files", [])
        return entries

    def _list_examples(self, split: str) -> list[tuple[str, int]]:
        entries = sorted(
            (entry for entry in self._entries if entry["split"] == split), key=lambda entry: str(entry["path"])
        )
        if self.copies is not None:
            self._check("examples", [ListedFile.of_entry(entry) for entry in entries])
        days: dict[str, list[tuple[str, int]]] = {}
        for entry in entries:
            path = str(self._place / entry["path"])
            days.setdefault(date_of(path), []).append((path, int(entry["rows"])))
        found: list[tuple[str, int]] = []
        for _, of_day in sorted(days.items()):
            # Names contain runs and pieces: only the rows show which file of a day comes first.
            found += sorted(of_day, key=lambda file: first_row(file[0])) if len(of_day) > 1 else of_day
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
