"""Find and remove garbage: behind `camenn gc`.

Garbage is what no kept run of an output refers to.

Removed is only what is certainly camenn's: a file whose name camenn gives, in a directory that says
or whose documents prove that camenn made it.
"""

import contextlib
import datetime
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from camenn_model.integrity import DamagedError
from pipelines.io import clock, files, objects
from pipelines.io.lease import LEASE
from pipelines.runs.accounting import FINISHED
from pipelines.runs.manifest import CONTENTS, RUN_NAME, read_latest, read_run
from pipelines.runs.part_keys import KEYS_ENDING
from pipelines.runs.publication import publications
from pipelines.runs.store import IMAGES, TITLES, read_marker
from schemas.errors import InputError
from schemas.manifest import LATEST, MANIFEST, PUBLISHED, RUNS

YOUNG = datetime.timedelta(hours=48)
"""Files of this age or younger are never removed: a run may be writing them, and a reader may have
begun before the last publication."""

_HEX = "[0-9a-f]{32}"
_PART = re.compile(rf"part-{_HEX}\.(parquet|keys\.parquet|json|arrow)(\.{_HEX}\.tmp)?")
"""Parts of a generation of embeddings, and what a killed writer left of one"""
_IN_RUN = re.compile(
    rf"((part-(\d+|{_HEX}|\d+-\d+|kept-\d+-\d+)\.(parquet|arrow))|bucket-\d+-{_HEX}\.arrows|{_HEX}\.arrows"
    r"|(images|titles)-\d+\.arrows"
    r"|(items|image_root|store_item|pair|user_subcategory|user_brand)\.parquet"
    r"|(model|likeness|agreement|taste_space|directions)\.safetensors"
    r"|(config|features|calibration|metrics|retrieval|finished)\.json|curves\.csv|\.camenn"
    rf")(\.{_HEX}\.tmp|\.tmp)?|manifest\.json\.{_HEX}\.tmp"
)
"""Names of a run's files. A manifest is never removed"""


@dataclass(frozen=True)
class Garbage:
    """The files that `collect` would remove.

    `left`: old files in directories of an output that may not be camenn's.
    """

    kept_runs: list[str]
    files: list[files.Found]
    left: int


def find_garbage(
    root: str, keep: int, retention: datetime.timedelta | None = None, now: datetime.datetime | None = None
) -> Garbage:
    """Find old files that no kept run refers to.

    They are files of an output, older than 48 h.

    Kept are the published run and the `keep` runs that were published last. With `retention`, only
    those of them that were published no longer ago are kept (but always the published one). Their
    whole directories are kept, and what their manifests name in others'. Manifests and `published/`
    are kept of every run: they are small, and show how figures moved.

    A file is old by three clocks: this machine's, its file system's, and the newest file of the
    output. A clock that runs ahead ages nothing.

    Raises:
        InputError: nothing is published there: it may be no output of camenn at all.
    """
    now = now or clock.utc_now()
    latest = read_latest(root)
    if latest is None:
        raise InputError(f"--out {root}: nothing is published there (no {LATEST}); nothing was removed.")
    at: dict[str, datetime.datetime] = {}
    for entry in publications(root):
        # By when it was published last.
        at.pop(entry["run"], None)
        at[entry["run"]] = datetime.datetime.fromisoformat(entry["at"])
    recent = list(at)[-keep:]
    kept = {latest.run, *(run for run in recent if retention is None or now - at[run] <= retention)}
    reached: set[str] = set()
    for run in kept:
        if files.exists(files.join(root, RUNS, run, MANIFEST)):
            manifest = read_run(root, run)
            reached |= {path for table in manifest.tables for path in manifest.listed(table)}
    whole = tuple(f"{files.join(root, RUNS, run)}/" for run in kept)
    ours, foreign = _list_own(root)
    newest = max((file.written_at for file in [*ours, *_documents(root)]), default=0.0)
    limit = min(now.timestamp(), _file_system_now(root), newest) - YOUNG.total_seconds()

    def is_garbage(file: files.Found) -> bool:
        # A keys file and a commit marker go with their part.
        vouched = {file.path, *(file.path.removesuffix(ending) + ".parquet" for ending in (KEYS_ENDING, ".json"))}
        return file.written_at < limit and not file.path.startswith(whole) and not vouched & reached

    garbage = [file for file in ours if is_garbage(file)]
    left = sum(file.written_at < limit and not file.path.startswith(whole) for file in foreign)

    def last(file: files.Found) -> tuple[bool, str]:
        # A part goes before the marker that vouches for it, and a run's files before what proves them to be camenn's:
        # a removal that was cut off is finished by the next one.
        return file.path.endswith((".json", f"/{files.OWN}")), file.path

    return Garbage(sorted(kept), sorted(garbage, key=last), left)


def _documents(root: str) -> list[files.Found]:
    return files.find([files.join(root, LATEST)]) + files.match(files.join(root, PUBLISHED), "*.json")


def _file_system_now(root: str) -> float:
    """Read the time of the clock that stamps files.

    It may be a server's. The output's lock or lease is held.
    """
    if not files.is_local(root):
        # As old as the lease's last renewal at most, which makes files seem younger.
        return objects.stat(files.join(root, LEASE)).written_at
    path = os.path.join(root, files.LOCK)
    os.utime(path)
    return os.stat(path).st_mtime


def _list_own(root: str) -> tuple[list[files.Found], list[files.Found]]:
    """List camenn's files and others in an output.

    Returns (files that camenn wrote, other files) in the folders that garbage is looked for in.
    Manifests are left out.
    """
    ours: list[files.Found] = []
    foreign: list[files.Found] = []
    proven = _Proofs(root)
    for file in _walk(files.join(root, RUNS)):
        run, _, name = file.path.removeprefix(f"{files.join(root, RUNS)}/").partition("/")
        if name == MANIFEST:
            continue
        own = RUN_NAME.fullmatch(run) and _IN_RUN.fullmatch(name.rpartition("/")[2]) and proven.run(run)
        (ours if own else foreign).append(file)
    for kind in (IMAGES, TITLES, f"{CONTENTS}/{IMAGES}", f"{CONTENTS}/{TITLES}"):
        folder = files.join(root, *kind.split("/"))
        for file in _walk(folder):
            generation, _, name = file.path.removeprefix(f"{folder}/").partition("/")
            if name.startswith("."):
                continue
            own = _PART.fullmatch(name) and proven.generation(files.join(folder, generation))
            (ours if own else foreign).append(file)
    return ours, foreign


def _walk(directory: str) -> Iterator[files.Found]:
    """List all files below a directory.

    Links are not followed: what they lead to is not the output's.
    """
    if not files.is_local(directory):
        yield from files.match(directory, "**")
        return
    for path, _, names in os.walk(directory):
        for name in names:
            status = os.lstat(os.path.join(path, name))
            yield files.Found(os.path.join(path, name), status.st_size, status.st_mtime)


class _Proofs:
    """Proofs that a directory is camenn's.

    They are its record, or documents that only camenn writes.
    """

    def __init__(self, root: str) -> None:
        self.root = root
        self.known: dict[str, bool] = {}
        self.named: set[str] | None = None

    def run(self, run: str) -> bool:
        """Return whether camenn made a run's directory."""
        directory = files.join(self.root, RUNS, run)
        if directory not in self.known:
            documents = (MANIFEST, FINISHED)
            self.known[directory] = files.is_own(directory) or any(
                files.exists(files.join(directory, name)) for name in documents
            )
        return self.known[directory]

    def generation(self, directory: str) -> bool:
        """Return whether camenn made a generation of embeddings.

        It is proven also by a commit marker, or by a run that names one of its parts.
        """
        if directory not in self.known:
            self.known[directory] = files.is_own(directory) or self._has_marker(directory) or directory in self._named()
        return self.known[directory]

    def _has_marker(self, directory: str) -> bool:
        for marker in files.match(directory, "part-*.json"):
            with contextlib.suppress(DamagedError):
                read_marker(marker.path)
                return True
        return False

    def _named(self) -> set[str]:
        if self.named is None:
            self.named = set()
            for found in files.match(files.join(self.root, RUNS), f"*/{MANIFEST}"):
                with contextlib.suppress(InputError):
                    manifest = read_run(self.root, found.path.split("/")[-2])
                    paths = (path for table in manifest.tables for path in manifest.listed(table))
                    self.named |= {path.rpartition("/")[0] for path in paths}
        return self.named


def collect(root: str, keep: int, retention_days: float | None, *, dry_run: bool) -> dict[str, Any]:
    """Remove garbage and return the closing table."""
    root = files.absolute(root)
    if keep < 1:
        raise InputError(f"--keep {keep}: must be at least 1.")
    if retention_days is not None and retention_days < 0:
        raise InputError(f"--retention_days {retention_days}: must not be negative.")
    retention = None if retention_days is None else datetime.timedelta(days=retention_days)
    with files.single_writer(root) as writer, files.no_readers(root):
        garbage = find_garbage(root, keep, retention)
        if not dry_run:
            for start in range(0, len(garbage.files), 500):
                writer.check()
                files.delete([file.path for file in garbage.files[start : start + 500]])
            if files.is_local(root):
                _remove_empty(files.join(root, RUNS))
    return {
        "out": root,
        "runs_kept": len(garbage.kept_runs),
        "files_removed": 0 if dry_run else len(garbage.files),
        "files_found": len(garbage.files),
        "megabytes": round(sum(file.bytes for file in garbage.files) / 1e6, 1),
        "files_not_ours": garbage.left,
        "dry_run": dry_run,
    }


def _remove_empty(directory: str) -> None:
    """Remove empty directories of runs.

    Object stores have none.
    """
    for path, _, _ in os.walk(directory, topdown=False):
        inside = path != directory and RUN_NAME.fullmatch(os.path.relpath(path, directory).split(os.sep)[0])
        if inside and not os.listdir(path):
            os.rmdir(path)
