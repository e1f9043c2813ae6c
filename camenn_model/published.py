"""Published runs of a local output.

They are read and checked without Beam. Layout: schemas/manifest.py.
"""

from pathlib import Path
from typing import Any

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
    tables = manifest["tables"]
    chosen = list(tables.values()) if table is None else [tables.get(table, {"files": []})]
    entries = [entry for found in chosen for entry in found["files"]]
    check_files(
        [(str(root / entry["path"]), int(entry["bytes"]), entry.get("sha256", "")) for entry in entries], remedy
    )
