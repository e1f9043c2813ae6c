"""Check every file of every output: `camenn fsck`.

Each is held against the checksum that was written with it. CatalogFeatures is what to run again. `--repair`
repairs.
"""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from camenn_model.integrity import DamagedError, check_file, file_sha256
from pipelines.io import clock, files
from pipelines.runner.console import NO_ROWS, Bar
from pipelines.runner.log import stage_logger
from pipelines.runs.manifest import Manifest, published_files, read_latest, read_pointer, read_run
from pipelines.runs.night_record import NIGHTS, RECORD, read_night
from pipelines.runs.part_keys import files_of_part, keys_path
from pipelines.runs.publication import Position, check_whole, effective_runs, point_to, publications
from pipelines.runs.store import IMAGES, TITLES, Part, read_marker
from schemas.errors import InputError
from schemas.manifest import KEEP, LATEST, MANIFEST, PUBLISHED, PUBLISHED_FIELDS, RUNS, remedy

DAMAGED = ".damaged"
"""Ending that `--repair` gives to what it sets aside"""


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

    def file(self, entry: "Check") -> None:
        """Compare one file with what was written."""
        path, advice = entry.path, entry.advice
        self.files += 1
        self.bytes += entry.bytes
        self.unproven += not entry.sha256
        try:
            check_file(path, entry.bytes, "", advice)
            # Not through what is remembered: whoever asks wants the disk to be read.
            if entry.sha256 and file_sha256(path) != entry.sha256:
                raise DamagedError(f"{path}: its bytes are not those that were written (SHA-256 differs). {advice}")
        except DamagedError as error:
            (self.damaged if entry.published else self.earlier)[path] = str(error)


@dataclass(frozen=True)
class Check:
    """One file to compare."""

    path: str
    bytes: int
    sha256: str
    advice: str
    published: bool = True
    """Whether the published run needs it, or the next one reads it"""


_EARLIER = "Only runs of before name it: they cannot be published again, and `camenn gc` removes them in time."


def find_outputs(work: str) -> list[str]:
    """Find the outputs in a working directory.

    It is the directory itself where that is one.
    """
    if not os.path.isdir(work):
        raise InputError(f"--work {work}: no such directory. Give the one that holds store/, shards/, model/, scores/.")
    places = [work, *sorted(entry.path for entry in os.scandir(work) if entry.is_dir())]
    found = [place for place in places if is_output(place)]
    if not found:
        raise InputError(
            f"--work {work}: no output of camenn is in it. Give the directory that holds store/ or scores/."
        )
    return found


def is_output(directory: str) -> bool:
    """Return whether a directory is an output.

    Something is or was published in it then.
    """
    return any(os.path.exists(os.path.join(directory, name)) for name in (LATEST, PUBLISHED))


def check_output(root: str, found: Findings) -> list[Check]:
    """Check an output's documents.

    Returned are the files that they vouch for.
    """
    checks: dict[str, Check] = {}
    pointer = None
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
    kept = _kept_runs(root, pointer["run"] if pointer else None)
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
                if published or (record.path not in checks and (run in kept or os.path.exists(record.path))):
                    advice = remedy(manifest.stage, table) if published else _EARLIER
                    checks[record.path] = Check(record.path, record.bytes, record.sha256, advice, published)
    if pointer is not None and pointer["run"] in kept:
        latest = files.join(root, RUNS, pointer["run"], MANIFEST)
        if not os.path.exists(latest):
            found.document(latest, DamagedError(f"{latest}: this file is gone. Run fsck with --repair."))
    for part in _parts(root, found):
        advice = remedy("embed", "image_embeddings")
        checks[part.path] = Check(part.path, part.bytes, part.sha256, advice)
        if part.keys_bytes:
            keys = keys_path(part.path)
            checks[keys] = Check(keys, part.keys_bytes, part.keys_sha256, advice)
    return list(checks.values())


def _kept_runs(root: str, latest: str | None) -> set[str]:
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
    whole = {run for run in kept if run is not None and _has_files(root, run)}
    return whole | ({latest} if latest else set())


def _has_files(root: str, run: str) -> bool:
    directory = os.path.join(root, RUNS, run)
    return os.path.isdir(directory) and any(entry.is_dir() for entry in os.scandir(directory))


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
    checkpoints = sorted(Path(work).glob("**/checkpoints/*.safetensors"))
    if checkpoints:
        from camenn_model.tensors import load_tensors

        for checkpoint in checkpoints:
            try:
                load_tensors(checkpoint)
                found.document(str(checkpoint))
            except DamagedError as error:
                found.document(str(checkpoint), error)


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
                    if os.path.exists(side):
                        os.replace(side, f"{side}{DAMAGED}")
                        found.repaired.append(f"{side} is set aside as {side}{DAMAGED}")
        try:
            latest = read_latest(root)
            if latest is not None:
                return
        except DamagedError:
            latest = None
        if os.path.exists(files.join(root, LATEST)):
            os.replace(files.join(root, LATEST), files.join(root, LATEST + DAMAGED))
        whole = newest_whole(root)
        if whole is None:
            # One entry alone is a first publication that was cut off: the next run of the stage begins again.
            for _, path in published_files(root):
                os.replace(path, f"{path}{DAMAGED}")
            found.repaired.append(f"{root}: no run is whole: nothing is published now, run its stage again")
            return
        writer.check()
        point_to(root, whole, position, repaired=clock.utc_stamp())
        found.repaired.append(f"{files.join(root, LATEST)} names run {whole.run}, the newest one that is whole")


def _is_document(root: str, path: str) -> bool:
    parts = path.removeprefix(f"{root}/").split("/")
    return parts == [LATEST] or parts[0] == PUBLISHED or (parts[0] == RUNS and parts[2:] == [MANIFEST])


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
        for entry in waiting:
            found.file(entry)
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
