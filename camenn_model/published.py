"""What is published in a local output: read and checked without Beam. Layout: schemas/manifest.py."""

from pathlib import Path
from typing import Any

from camenn_model.integrity import DamagedError, check_files, parse_document
from schemas.contract import InputError
from schemas.manifest import LATEST, LATEST_FIELDS, MANIFEST, MANIFEST_FIELDS, PUBLISHED


def read_published(root: str, stage: str, flag: str) -> dict[str, Any]:
    """Read `latest.json` of an output: {run, stage, manifest}.

    Raises:
        InputError: nothing is published there, or it is another stage's output.
        DamagedError: the file is lost or damaged.
    """
    pointer = Path(root) / LATEST
    if not pointer.exists():
        if len(list((Path(root) / PUBLISHED).glob("*.json"))) > 1:
            raise DamagedError(f"{pointer}: this file is gone, although runs were published here. {_hint(root)}")
        raise InputError(
            f"{flag} {root}: nothing is published there (no {LATEST}). Run `camenn {stage}` into it first."
        )
    latest = parse_document(pointer.read_bytes(), pointer, LATEST_FIELDS, _hint(root))
    if latest["stage"] != stage:
        raise InputError(
            f"{flag} {root}: holds the output of `camenn {latest['stage']}`, not of `camenn {stage}`. Give another directory."
        )
    return latest


def read_manifest(directory: Path) -> dict[str, Any]:
    """Read the manifest in a run's directory.

    Raises:
        DamagedError: it is lost or damaged.
    """
    path = directory / MANIFEST
    hint = _hint(str(directory.parents[1]))
    if not path.exists():
        raise DamagedError(f"{path}: this file is gone. {hint}")
    return parse_document(path.read_bytes(), path, MANIFEST_FIELDS, hint)


def check_table_files(root: Path, manifest: dict[str, Any], table: str | None, remedy: str) -> None:
    """Check that a table's files, or those of all tables, are what was written.

    Raises:
        DamagedError: see `camenn_model.integrity.check_file`.
    """
    tables = manifest["tables"]
    chosen = list(tables.values()) if table is None else [tables.get(table, {"files": []})]
    entries = [entry for found in chosen for entry in found["files"]]
    check_files(
        [(str(root / entry["path"]), int(entry["bytes"]), entry.get("sha256", "")) for entry in entries], remedy
    )


def _hint(root: str) -> str:
    return f"`camenn fsck --out {root} --repair` lets readers see the newest run that is whole."
