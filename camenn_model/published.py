"""Published runs of a local output.

They are read and checked without Beam. Layout: schemas/manifest.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from camenn_model.integrity import DamagedError, check_files, parse_document
from schemas.manifest import (
    LATEST,
    LATEST_FIELDS,
    MANIFEST,
    MANIFEST_FIELDS,
    PUBLISHED,
    not_of_stage,
    nothing_published,
    pointer_lost,
    repair_hint,
)


@dataclass(frozen=True)
class ListedFile:
    """A file as a manifest lists it."""

    path: str
    """Below the output's root"""
    bytes: int
    sha256: str
    """64 hex digits, or '' where an earlier version of camenn wrote it"""

    @classmethod
    def of(cls, manifest: dict[str, Any], table: str | None) -> "list[ListedFile]":
        """Return the files of one table, or of all."""
        tables = manifest["tables"]
        chosen = list(tables.values()) if table is None else [tables.get(table, {"files": []})]
        return [cls.of_entry(entry) for found in chosen for entry in found["files"]]

    @classmethod
    def of_entry(cls, entry: dict[str, Any]) -> "ListedFile":
        """Return one entry of a manifest as a file."""
        return cls(entry["path"], int(entry["bytes"]), entry.get("sha256", ""))


class Copies(Protocol):
    """Local copies of one run's files.

    The output lies elsewhere. Copies are made when they are first needed, under the same names as in the output.
    """

    @property
    def directory(self) -> str:
        """Return the local directory that stands for the output.

        The run's manifest is in it.
        """

    @property
    def run(self) -> str:
        """Return the run's name."""

    def make(self, listed: Sequence[ListedFile], remedy: str) -> None:
        """Make the missing copies of some files.

        Raises:
            DamagedError: one is gone, or has other bytes than were written.
        """


def read_published(root: str, stage: str, flag: str) -> dict[str, Any]:
    """Read `latest.json` of an output: {run, stage, manifest}.

    Raises:
        InputError: nothing is published there, or it is another stage's output.
        DamagedError: the file is lost or damaged.
    """
    pointer = Path(root) / LATEST
    if not pointer.exists():
        if len(list((Path(root) / PUBLISHED).glob("*.json"))) > 1:
            raise DamagedError(pointer_lost(root))
        raise nothing_published(root, stage, flag)
    latest = parse_document(pointer.read_bytes(), pointer, LATEST_FIELDS, repair_hint(root))
    if latest["stage"] != stage:
        raise not_of_stage(root, latest["stage"], stage, flag)
    return latest


def read_manifest(directory: Path) -> dict[str, Any]:
    """Read the manifest in a run's directory.

    Raises:
        DamagedError: it is lost or damaged.
    """
    path = directory / MANIFEST
    hint = repair_hint(str(directory.parents[1]))
    if not path.exists():
        raise DamagedError(f"{path}: this file is gone. {hint}")
    return parse_document(path.read_bytes(), path, MANIFEST_FIELDS, hint)


def check_table_files(root: Path, manifest: dict[str, Any], table: str | None, remedy: str) -> None:
    """Check a table's files, or those of all tables.

    They must equal what was written.

    Raises:
        DamagedError: see `camenn_model.integrity.check_file`.
    """
    listed = ListedFile.of(manifest, table)
    check_files([(str(root / entry.path), entry.bytes, entry.sha256) for entry in listed], remedy)
