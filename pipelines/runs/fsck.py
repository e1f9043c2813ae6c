"""Check every file of every output: `camenn fsck`.

Each is held against the checksum that was written with it, on a local disk or an object store. A
message says what to run again. `--repair` repairs.
"""

import hashlib
import os
import re
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from camenn_model.integrity import DamagedError, check_file, file_sha256
from pipelines.io import clock, files, objects
from pipelines.runner.console import NO_ROWS, Bar
from pipelines.runner.log import stage_logger
from pipelines.runs import readers_path
from pipelines.runs.manifest import Manifest, published_files, read_latest, read_pointer, read_run
from pipelines.runs.night_record import NIGHTS, RECORD, read_night
from pipelines.runs.part_keys import files_of_part, keys_path
from pipelines.runs.publication import Position, check_whole, effective_runs, point_to, publications
from pipelines.runs.store import IMAGES, TITLES, Part, read_marker
from schemas.errors import InputError
from schemas.manifest import KEEP, LATEST, MANIFEST, PUBLISHED, PUBLISHED_FIELDS, RUNS, remedy

DAMAGED = ".damaged"
"""Ending that `--repair` gives to what it sets aside"""
_PIECE = 8 * 2**20
"""Bytes of an object that one request reads"""
_THREADS = 4
"""That read objects at once"""


@dataclass
class Findings:
    """A record of what was checked and what is wrong."""

    files: int = 0
    bytes: int = 0
    unproven: int = 0
    """Files that an earlier version of camenn wrote, without a checksum: only their size is compared"""
    damaged: dict[str, str] = field(default_factory=dict)
    """Path → what is wrong with it, and what to do"""
    earlier: dict[str, str] = field(default_factory=dict)
    """The same of files that only earlier runs need: those cannot be published again"""
    repaired: list[str] = field(default_factory=list)

    def document(self, path: str, error: DamagedError | None = None) -> None:
        """Count a JSON document.

        With `error`, it is counted as a damaged one.
        """
        self.files += 1
        if files.is_local(path) and os.path.exists(path):
            self.bytes += os.path.getsize(path)
        if error is not None:
            self.damaged[path] = str(error)

    def file(self, entry: "Check", fault: str | None) -> None:
        """Count one file that was compared with what was written."""
        self.files += 1
        self.bytes += entry.bytes
        self.unproven += not entry.sha256
        if fault is not None:
            (self.damaged if entry.published else self.earlier)[entry.path] = fault


@dataclass(frozen=True)
class Check:
    """One file to compare."""

    path: str
    bytes: int
    sha256: str
    advice: str
    published: bool = True
    """Whether the published run needs it, or the next one reads it"""


def find_fault(entry: Check) -> str | None:
    """Compare one file with what was written.

    Returns what is wrong with it. All its bytes are read, those of an object too.
    """
    path, advice = entry.path, entry.advice
    try:
        if files.is_local(path):
            check_file(path, entry.bytes, "", advice)
            # Not through what is remembered: whoever asks wants the disk to be read.
            found = file_sha256(path) if entry.sha256 else ""
        else:
            found = _object_sha256(entry)
        if found != entry.sha256:
            raise DamagedError(f"{path}: its bytes are not those that were written (SHA-256 differs). {advice}")
    except DamagedError as error:
        return str(error)
    return None


def _object_sha256(entry: Check) -> str:
    """Return the SHA-256 of an object.

    It is '' where the manifest has none to compare with.

    Raises:
        DamagedError: it is gone or has another size.
    """
    try:
        there = objects.stat(entry.path)
    except FileNotFoundError as error:
        raise DamagedError(f"{entry.path}: this file is gone. {entry.advice}") from error
    if there.bytes != entry.bytes:
        raise DamagedError(f"{entry.path}: has {there.bytes:,} bytes, {entry.bytes:,} were written. {entry.advice}")
    if not entry.sha256:
        return ""
    digest = hashlib.sha256()
    with objects.open_read(entry.path, there) as handle:
        while piece := handle.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


_EARLIER = "Only runs of before name it: they cannot be published again, and `camenn gc` removes them in time."


def find_outputs(work: str) -> list[str]:
    """Find the outputs in a working directory.

    It is the directory itself where that is one.
    """
    if files.is_local(work):
        if not os.path.isdir(work):
            raise InputError(
                f"--work {work}: no such directory. Give the one that holds store/, shards/, model/, scores/."
            )
        places = [work, *sorted(entry.path for entry in os.scandir(work) if entry.is_dir())]
        found = [place for place in places if is_output(place)]
    else:
        found = sorted(set(_places(work)))
    if not found:
        raise InputError(
            f"--work {work}: no output of camenn is in it. Give the directory that holds store/ or scores/."
        )
    return found


def _places(work: str) -> Iterator[str]:
    """Yield the outputs on an object store.

    They are the prefix itself, or one folder below it.
    """
    for found in files.match(work, "**"):
        name = found.path.removeprefix(f"{work.rstrip('/')}/")
        document = re.fullmatch(rf"([^/]+/)?({LATEST}|{PUBLISHED}/\d{{8}}\.json)", name)
        if document:
            yield files.join(work, document[1] or "").rstrip("/")


def is_output(directory: str) -> bool:
    """Return whether a directory is an output.

    Something is or was published in it then.
    """
    if files.is_local(directory):
        return any(os.path.exists(os.path.join(directory, name)) for name in (LATEST, PUBLISHED))
    return files.exists(files.join(directory, LATEST)) or bool(published_files(directory))


class _There:
    """A look at which files an output has.

    Of an object store it is a listing, which takes few requests.
    """

    def __init__(self, root: str) -> None:
        self._root = root
        self._objects = set() if files.is_local(root) else {found.path for found in files.match(root, "**")}

    def has(self, path: str) -> bool:
        """Return whether a file is there."""
        return os.path.exists(path) if files.is_local(path) else path in self._objects

    def has_files(self, run: str) -> bool:
        """Return whether a run has more than its manifest."""
        directory = files.join(self._root, RUNS, run)
        if files.is_local(directory):
            return os.path.isdir(directory) and any(entry.is_dir() for entry in os.scandir(directory))
        below = (path.removeprefix(f"{directory}/") for path in self._objects if path.startswith(f"{directory}/"))
        return any("/" in name for name in below)


def check_output(root: str, found: Findings) -> list[Check]:
    """Check an output's documents.

    Returned are the files that they vouch for.
    """
    checks: dict[str, Check] = {}
    pointer, there = None, _There(root)
    try:
        pointer = read_pointer(root)
        found.document(files.join(root, LATEST))
    except DamagedError as error:
        found.document(files.join(root, LATEST), error)
    for _, path in published_files(root):
        try:
            files.read_document(path, PUBLISHED_FIELDS, "`camenn fsck --repair` sets it aside.")
            found.document(path)
        except DamagedError as error:
            found.document(path, error)
    kept = _kept_runs(root, pointer["run"] if pointer else None, there)
    for path in sorted(file.path for file in files.match(files.join(root, RUNS), f"*/{MANIFEST}")):
        run = path.split("/")[-2]
        try:
            manifest = read_run(root, run)
            found.document(path)
        except DamagedError as error:
            found.document(path, error)
            continue
        for table in manifest.tables:
            for record in manifest.records(table):
                # Of runs that are not kept, `camenn gc` may have removed files.
                published = pointer is not None and run == pointer["run"]
                if published or (record.path not in checks and (run in kept or there.has(record.path))):
                    advice = remedy(manifest.stage, table) if published else _EARLIER
                    checks[record.path] = Check(record.path, record.bytes, record.sha256, advice, published)
    if pointer is not None and pointer["run"] in kept:
        latest = files.join(root, RUNS, pointer["run"], MANIFEST)
        if not there.has(latest):
            found.document(latest, DamagedError(f"{latest}: this file is gone. Run fsck with --repair."))
    if pointer is not None:
        _check_readers_paths(root, pointer["stage"], pointer["run"], found)
    for part in _parts(root, found):
        advice = remedy("embed", "image_embeddings")
        checks[part.path] = Check(part.path, part.bytes, part.sha256, advice)
        if part.keys_bytes:
            keys = keys_path(part.path)
            checks[keys] = Check(keys, part.keys_bytes, part.keys_sha256, advice)
    return list(checks.values())


def _check_readers_paths(root: str, stage: str, run: str, found: Findings) -> None:
    """Check that readers' paths lead to the published run.

    An output of an earlier version has none.
    """
    for path in readers_path.reader_paths(root, stage).values():
        there = readers_path.run_at(path)
        if there is not None and there != run:
            found.damaged[path] = (
                f"{path}: {f'leads to run {there}' if there else 'does not lead to a run'}, and run {run} is "
                "published: a publication was cut off, or the output was copied. Run fsck with --repair."
            )


def _kept_runs(root: str, latest: str | None, there: _There) -> set[str]:
    """List the runs whose files must be there.

    They are what is published, and what may be published again.
    """
    kept = {latest} if latest else set()
    for _, path in published_files(root)[-KEEP:]:
        try:
            kept.add(files.read_document(path, PUBLISHED_FIELDS, "")["run"])
        except DamagedError:
            continue
    # A run that `camenn gc --keep` took has its manifest alone.
    whole = {run for run in kept if run is not None and there.has_files(run)}
    return whole | ({latest} if latest else set())


def _parts(root: str, found: Findings) -> Iterator[Part]:
    """List the committed parts of a store's generations."""
    for kind in (IMAGES, TITLES):
        for marker in sorted(file.path for file in files.match(files.join(root, kind), "*/part-*.json")):
            try:
                part = read_marker(marker)
            except DamagedError as error:
                found.document(marker, error)
                continue
            found.document(marker)
            yield part


def check_rest(work: str, found: Findings) -> None:
    """Check what is no output.

    These are the nights' records, and where a killed training goes on.
    """
    for path in sorted(file.path for file in files.match(files.join(work, NIGHTS), f"*/{RECORD}")):
        try:
            read_night(path)
            found.document(path)
        except DamagedError as error:
            found.document(path, error)
    checkpoints = _checkpoints(work)
    if checkpoints:
        from camenn_model.tensors import load_tensors

        for checkpoint in checkpoints:
            try:
                if files.is_local(checkpoint):
                    load_tensors(Path(checkpoint))
                else:
                    _load_object(checkpoint)
                found.document(checkpoint)
            except DamagedError as error:
                found.document(checkpoint, error)


def _checkpoints(work: str) -> list[str]:
    if files.is_local(work):
        return sorted(str(path) for path in Path(work).glob("**/checkpoints/*.safetensors"))
    return sorted(found.path for found in files.match(work, "**.safetensors") if "/checkpoints/" in found.path)


def _load_object(path: str) -> None:
    """Load a file of tensors from an object store.

    Raises:
        DamagedError: it is damaged.
    """
    from camenn_model.tensors import load_tensors

    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory) / "checkpoint.safetensors"
        with files.open_read(path) as source, open(copy, "wb") as target:
            while piece := source.read(_PIECE):
                target.write(piece)
        try:
            load_tensors(copy)
        except DamagedError as error:
            raise DamagedError(str(error).replace(str(copy), path)) from error


def repair(root: str, found: Findings) -> None:
    """Set damaged documents and parts aside.

    `latest.json` then names the newest run that is whole.

    Nothing is removed: what is set aside has `.damaged` behind its name.
    """
    with files.single_writer(root) as writer:
        position = Position.of(root)
        for path in [path for path in found.damaged if path.startswith(f"{root}/")]:
            if _is_document(root, path) or _is_part(root, path):
                for side in files_of_part(path) if _is_part(root, path) else [path]:
                    if files.exists(side):
                        files.move(side, f"{side}{DAMAGED}")
                        found.repaired.append(f"{side} is set aside as {side}{DAMAGED}")
        try:
            latest = read_latest(root)
            if latest is not None:
                changed = readers_path.update(root, latest)
                found.repaired += [f"{path} leads to run {latest.run}" for path in changed]
                return
        except DamagedError:
            latest = None
        if files.exists(files.join(root, LATEST)):
            files.move(files.join(root, LATEST), files.join(root, LATEST + DAMAGED))
        whole = newest_whole(root)
        if whole is None:
            # One entry alone is a first publication that was cut off: the next run of the stage begins again.
            for _, path in published_files(root):
                files.move(path, f"{path}{DAMAGED}")
            found.repaired.append(f"{root}: no run is whole: nothing is published now, run its stage again")
            return
        writer.check()
        point_to(root, whole, position, repaired=clock.utc_stamp())
        found.repaired.append(f"{files.join(root, LATEST)} names run {whole.run}, the newest one that is whole")


def _is_document(root: str, path: str) -> bool:
    parts = path.removeprefix(f"{root}/").split("/")
    return (
        parts == [LATEST]
        or (parts[0] == PUBLISHED and parts[-1].endswith(".json"))
        or (parts[0] == RUNS and parts[2:] == [MANIFEST])
    )


def _is_part(root: str, path: str) -> bool:
    return path.removeprefix(f"{root}/").split("/")[0] in (IMAGES, TITLES)


def newest_whole(root: str) -> Manifest | None:
    """Find the newest published run that is whole.

    Its files are all what was written.
    """
    history = publications(root)
    runs = [entry["run"] for entry in history]
    stands = effective_runs(history, runs[-1]) if runs else []
    for run in [*reversed(stands), *(run for run in reversed(runs) if run not in stands)]:
        try:
            manifest = read_run(root, run)
            check_whole(root, manifest)
        except DamagedError:
            continue
        return manifest
    return None


def _find_faults(waiting: list[Check]) -> Iterator[str | None]:
    """Compare files, objects several at once.

    The answers come in the order of the files. A local disk is best read file by file.
    """
    if all(files.is_local(entry.path) for entry in waiting):
        yield from map(find_fault, waiting)
        return
    with ThreadPoolExecutor(_THREADS) as pool:
        yield from pool.map(find_fault, waiting)


def check(roots: list[str], work: str | None, *, repairs: bool) -> tuple[dict[str, Any], Findings]:
    """Check some outputs.

    Returned are the closing table and what was found.
    """
    started = time.monotonic()
    found = Findings()
    waiting = [entry for root in roots for entry in check_output(root, found)]
    if work is not None:
        check_rest(work, found)
    with Bar("fsck", sum(entry.bytes for entry in waiting), "bytes") as bar:
        done = 0
        for entry, fault in zip(waiting, _find_faults(waiting), strict=True):
            found.file(entry, fault)
            done += entry.bytes
            bar.update(done)
    for words in [*found.damaged.values(), *found.earlier.values()]:
        stage_logger("fsck").warning("%s", words)
    if repairs:
        for root in roots:
            repair(root, found)
        for words in found.repaired:
            stage_logger("fsck").warning("%s", words)
    return {
        **NO_ROWS,
        "outputs": len(roots),
        "files": found.files,
        "megabytes": round(found.bytes / 1e6, 1),
        "without_checksum": found.unproven,
        "damaged": len(found.damaged),
        "damaged_of_earlier_runs": len(found.earlier),
        "repaired": len(found.repaired),
        "seconds": round(time.monotonic() - started, 1),
        "out": work or roots[0],
    }, found
