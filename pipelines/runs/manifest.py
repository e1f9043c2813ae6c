"""Publish a run: its directory, manifest and `latest.json`.

`latest.json` is the one file that ever changes. `published/` records what it pointed to, one file
each time.
"""

import hashlib
import importlib.metadata
import json
import platform
import re
import secrets
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from camenn_model.integrity import DamagedError, check_files, file_sha256
from pipelines.io import clock, files
from pipelines.io.tables import FileRecord
from schemas.contract import SCHEMA_VERSION
from schemas.errors import InputError
from schemas.manifest import (
    LATEST,
    LATEST_FIELDS,
    MANIFEST,
    MANIFEST_FIELDS,
    PUBLISHED,
    RUNS,
    not_of_stage,
    nothing_published,
    pointer_lost,
    remedy,
    repair_hint,
)

RUN_NAME = re.compile(r"\d{8}T\d{6}-[0-9a-f]{6}")
"""What `new_run` calls a run"""


@dataclass(kw_only=True)
class Manifest:
    """A description of what a finished run is made of."""

    stage: str
    run: str
    request: str = ""
    """16 hex digits. Two runs of a stage with equal ones hold the same rows, however often they were run."""
    inputs: dict[str, str] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, Any] = field(default_factory=dict)
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    gates: list[dict[str, Any]] = field(default_factory=list)
    """Comparisons with earlier nights before publication: name, passed, and words that say by how much"""
    seconds: float = 0.0
    created_at: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    def listed(self, table: str) -> list[str]:
        """Return the paths of a table's files.

        They are given whether the files are there or not.
        """
        return [record.path for record in self.records(table)]

    def paths(self, table: str) -> list[str]:
        """Return the paths of a table's files, each whole.

        Raises:
            DamagedError: one is gone, or is not what was written.
        """
        self.check(table)
        return self.listed(table)

    def check(self, table: str) -> None:
        """Check that a table's files are what was written.

        Raises:
            DamagedError: see `check_records`.
        """
        check_records(self.records(table), remedy(self.stage, table))

    def records(self, table: str) -> list[FileRecord]:
        """Return a table's files as records.

        They are as a job emitted them.
        """
        return [
            FileRecord(
                table, entry["path"], entry["rows"], entry["bytes"], entry.get("split", ""), entry.get("sha256", "")
            )
            for entry in self.tables.get(table, {}).get("files", [])
        ]

    def rows(self, table: str) -> int:
        """Count the rows of a table."""
        return sum(entry["rows"] for entry in self.tables.get(table, {}).get("files", []))


def check_records(records: Iterable[FileRecord], remedy: str, *, fresh: bool = False) -> None:
    """Check that files are what was written.

    Local ones are compared by size and SHA-256, see `camenn_model.integrity.check_file`. Of objects
    the size is compared, as a listing gives it: a store checks the bytes itself.

    `fresh`: list objects again, although this process has listed them before.

    Raises:
        DamagedError: one is gone or has other bytes.
    """
    records = list(records)
    local = [record for record in records if files.is_local(record.path)]
    check_files([(record.path, record.bytes, record.sha256) for record in local], remedy)
    check_objects([record for record in records if not files.is_local(record.path)], remedy, fresh=fresh)


_listed: dict[str, dict[str, int]] = {}
"""Directory -> path -> bytes, of the objects that this process has listed to check others"""


def check_objects(records: list[FileRecord], remedy: str, *, fresh: bool = False) -> None:
    """Check the sizes of objects.

    A thousand of one run take one request.

    Raises:
        DamagedError: one is gone or has another size.
    """
    again = {_directory(record.path) for record in records} if fresh else set()
    for record in records:
        directory = _directory(record.path)
        if _listed.get(directory, {}).get(record.path) != record.bytes and directory not in again:
            again.add(directory)
    # Object stores list whole folders: a request for each file would take minutes.
    for directory in again:
        _listed[directory] = {found.path: found.bytes for found in files.match(directory, "**")}
    for record in records:
        found = _listed[_directory(record.path)].get(record.path)
        if found is None:
            raise DamagedError(f"{record.path}: this file is gone (`camenn gc` removed it, or it was lost). {remedy}")
        if found != record.bytes:
            raise DamagedError(f"{record.path}: has {found:,} bytes, {record.bytes:,} were written. {remedy}")


def _directory(path: str) -> str:
    """Return the directory that is listed for an object.

    It is the run's, or elsewhere in an output the object's own.
    """
    root, runs, rest = path.rpartition(f"/{RUNS}/")
    return f"{root}{runs}{rest.partition('/')[0]}" if root and "/" in rest else path.rpartition("/")[0]


def request_fingerprint(inputs: dict[str, str], options: dict[str, Any]) -> str:
    """Hash inputs, options and the program's version.

    Equal 16 hex digits give equal output, so the work need not be done again.
    """
    value = {"inputs": inputs, "options": options, "camenn": versions()["camenn"], "schema": SCHEMA_VERSION}
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def new_run(root: str) -> tuple[str, str]:
    """Make the directory of a new run.

    Returns name and directory of a run that does not exist yet. Names sort by time.
    """
    stamp = clock.utc_now().strftime("%Y%m%dT%H%M%S")
    run = f"{stamp}-{secrets.token_hex(3)}"
    directory = files.join(root, RUNS, run)
    files.make_directory(directory)
    files.mark_own(directory, new=True)
    return run, directory


def versions() -> dict[str, str]:
    """Return the versions that results depend on."""
    packages = ("camenn", "apache-beam", "torch", "transformers", "timm", "pyarrow", "pandas", "numpy")
    found = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return {"python": platform.python_version(), "machine": platform.machine(), **found}


def read_pointer(root: str) -> dict[str, Any] | None:
    """Read `latest.json`.

    It is {run, stage, manifest}, or None where nothing was ever published.

    Raises:
        DamagedError: it is damaged, or gone although runs were published.
    """
    path = files.join(root, LATEST)
    pointer = files.read_document_if_there(path, LATEST_FIELDS, repair_hint(root))
    if pointer is not None:
        return pointer
    # The very first publication may have been cut off between its record and the pointer.
    if len(published_files(root)) > 1:
        raise DamagedError(pointer_lost(root))
    return None


def read_latest(root: str) -> Manifest | None:
    """Read the published run's manifest.

    It is None where nothing was published. Its paths are made absolute under `root`.

    Raises:
        DamagedError: `latest.json` or the manifest is lost or damaged.
    """
    pointer = read_pointer(root)
    return None if pointer is None else read_run(root, pointer["run"])


def read_run(root: str, run: str) -> Manifest:
    """Read the manifest of one run.

    Paths are made absolute under `root`.

    Raises:
        DamagedError: it is lost or damaged.
    """
    path = files.join(root, RUNS, run, MANIFEST)
    record = None if "/" in run else files.read_document_if_there(path, MANIFEST_FIELDS, repair_hint(root))
    if record is None:
        raise DamagedError(f"{path}: this file is gone: run {run} cannot be read. {repair_hint(root)}")
    manifest = Manifest(**record)
    if manifest.schema_version > SCHEMA_VERSION:
        raise InputError(
            f"{root}: run {run} has schema version {manifest.schema_version}, this camenn "
            f"reads up to {SCHEMA_VERSION}. Install the newer camenn."
        )
    for table in manifest.tables.values():
        for entry in table["files"]:
            entry["path"] = files.join(root, entry["path"])
    return manifest


def require_latest(root: str, stage: str, flag: str) -> Manifest:
    """Read the published run of `stage` at `root`.

    Raises:
        InputError: nothing is published there, or it was written by another stage.
    """
    manifest = read_latest(root)
    if manifest is None:
        raise nothing_published(root, stage, flag)
    if manifest.stage != stage:
        raise not_of_stage(root, manifest.stage, stage, flag)
    return manifest


def write_manifest(root: str, manifest: Manifest) -> None:
    """Write a finished run's manifest.

    It is written after all that it names is on the disk. Readers do not see the run yet.
    """
    manifest.created_at = clock.utc_stamp()
    manifest.versions = versions()
    # A run without files has no directory yet.
    files.make_directory(files.join(root, RUNS, manifest.run))
    if files.is_local(root):
        files.sync_tree(root, _new_files(root, manifest))
    record = asdict(manifest)
    prefix = root.rstrip("/") + "/"
    for table in record["tables"].values():
        for entry in table["files"]:
            if "sha256" not in entry and files.is_local(entry["path"]):
                # An earlier version of camenn wrote the file: from now on it must stay as it is.
                entry["sha256"] = file_sha256(entry["path"])
            # Relative paths, so that a directory can be moved or copied whole.
            entry["path"] = entry["path"].removeprefix(prefix)
        table["files"].sort(key=lambda entry: entry["path"])
    files.write_document(files.join(root, RUNS, manifest.run, MANIFEST), record, durable=True)


def _new_files(root: str, manifest: Manifest) -> list[str]:
    """List files of a run that may be unsynced.

    The published run does not name them, so they may be in memory only.
    """
    try:
        latest = read_latest(root)
    except DamagedError:
        # Whatever it named, what is named now must be on the disk.
        latest = None
    synced = {path for table in latest.tables for path in latest.listed(table)} if latest else set()
    return [path for table in manifest.tables for path in manifest.listed(table) if path not in synced]


def published_files(root: str) -> list[tuple[int, str]]:
    """List the entries of `published/`, oldest first.

    Each is (number, path). Other files there are not ours.
    """
    found = files.match(files.join(root, PUBLISHED), "*.json")
    names = ((file.path.rpartition("/")[2].removesuffix(".json"), file.path) for file in found)
    return sorted((int(name), path) for name, path in names if re.fullmatch(r"\d{8}", name))


def add_files(manifest: Manifest, contracts: dict[str, str], records: Iterable[FileRecord]) -> None:
    """Enter finished files under their tables.

    `contracts` maps a table's name to its contract's fingerprint.
    """
    for name, contract_fingerprint in contracts.items():
        manifest.tables.setdefault(name, {"fingerprint": contract_fingerprint, "files": []})
    for record in records:
        entry: dict[str, Any] = {"path": record.path, "rows": record.rows, "bytes": record.bytes}
        if record.sha256:
            entry["sha256"] = record.sha256
        if record.split:
            entry["split"] = record.split
        manifest.tables[record.table]["files"].append(entry)


CONTENTS = "contents"
"""Folder in which shard sets and scores keep the embeddings that they use"""
