"""What readers see of an output, and what is kept of it: behind `camenn publish`, `camenn rollback` and `camenn gc`.

An output (a store, a shard set, models or scores) is a directory with `runs/`, `published/` and `latest.json`; see pipelines/manifest.py.
"""

import datetime
import os
from dataclasses import dataclass
from typing import Any

from pipelines import clock, files
from pipelines.manifest import LATEST, MANIFEST, Manifest, point_to, publications, read_latest, read_run
from pipelines.store import CONTENTS, IMAGES, TITLES
from schemas.contract import InputError

YOUNG = datetime.timedelta(hours=48)
"""Files of this age or younger are never removed: a run may be writing them, and a reader may have begun before the last publication."""
KEEP = 7
OWN = ("runs", IMAGES, TITLES, CONTENTS)
"""Folders of an output that garbage is looked for in."""


def check_whole(root: str, manifest: Manifest) -> None:
    """Raises InputError where a file of a run is gone or has another size than its manifest says."""
    for table in manifest.tables.values():
        for entry in table["files"]:
            found = files.find([entry["path"]])
            if not found:
                raise InputError(
                    f"{root}: run {manifest.run} lacks {entry['path']}: `camenn gc` removed it, or it was lost. Publish another run."
                )
            if found[0].bytes != entry["bytes"]:
                raise InputError(
                    f"{root}: run {manifest.run}: {entry['path']} has {found[0].bytes:,} bytes, its manifest says {entry['bytes']:,}. Publish another run."
                )


def split_run(path: str) -> tuple[str, str]:
    """(output, name) of a run's directory as `OUT/runs/RUN`.

    Raises:
        InputError: it is no run's directory, or the run was never finished.
    """
    root, _, run = path.rstrip("/").rpartition("/runs/")
    if not root or "/" in run:
        raise InputError(f"RUN {path}: give the run's directory, as in WORK/scores/runs/20260131T020000-1a2b3c.")
    if not files.exists(files.join(root, "runs", run, MANIFEST)):
        raise InputError(
            f"RUN {path}: there is no {MANIFEST} in it: the run was never finished. Run its command again instead."
        )
    return root, run


def republish(path: str, *, force: bool, reason: str | None) -> dict[str, Any]:
    """Let readers see a finished run; returns the closing table.

    Raises:
        InputError: the run is not whole; its gates failed and it is not forced; it is forced without a reason.
    """
    root, run = split_run(files.absolute(path))
    with files.single_writer(root):
        manifest, latest = read_run(root, run), read_latest(root)
        before = latest.run if latest is not None else None
        failed = [gate for gate in manifest.gates if not gate["passed"]]
        if failed and not force:
            told = "; ".join(gate["words"] for gate in failed)
            raise InputError(
                f"RUN {path}: its gates failed: {told}. Publish it with --force --reason TEXT if you know better."
            )
        if force and not reason:
            raise InputError("--force needs --reason TEXT: it is kept beside the publication.")
        check_whole(root, manifest)
        changed = before != run
        if changed:
            why = {"reason": reason} if reason else {}
            if force:
                why["forced"] = "; ".join(gate["words"] for gate in failed) or "no gate had failed"
            point_to(root, manifest, **why)
    return {
        "out": root,
        "run": run,
        "before": before,
        "published": changed,
        "gates_overridden": len(failed) if force else 0,
    }


def rollback(root: str, reason: str | None) -> dict[str, Any]:
    """Let readers see the run that was published before the present one; returns the closing table.

    Rolling back twice goes back by two: runs that were rolled back from are passed over.

    Raises:
        InputError: nothing was published before, or it is not whole any more.
    """
    root = files.absolute(root)
    with files.single_writer(root):
        latest = read_latest(root)
        if latest is None:
            raise InputError(f"--out {root}: nothing is published there (no {LATEST}).")
        earlier = _before(publications(root), latest.run)
        if earlier is None:
            raise InputError(f"--out {root}: nothing was published before run {latest.run}.")
        manifest = read_run(root, earlier)
        check_whole(root, manifest)
        point_to(root, manifest, rolled_back_from=latest.run, **({"reason": reason} if reason else {}))
    return {"out": root, "run": earlier, "before": latest.run, "published": True}


def standing(history: list[dict[str, str]], run: str) -> list[str]:
    """Runs that were published up to `run`, which is published now, oldest first, without those that were rolled back from."""
    stack: list[str] = []
    for entry in history:
        if "rolled_back_from" in entry:
            while stack and stack[-1] != entry["run"]:
                stack.pop()
        if not stack or stack[-1] != entry["run"]:
            stack.append(entry["run"])
    while stack and stack[-1] != run:
        # A publication that was cut off before `latest.json` was written.
        stack.pop()
    return stack


def _before(history: list[dict[str, str]], run: str) -> str | None:
    """The run that was published before `run`."""
    stack = standing(history, run)
    return stack[-2] if len(stack) > 1 else None


def previous_run(root: str, run: str) -> Manifest | None:
    """The manifest of the run that was published before `run`, which is published now; None where there was none or `camenn gc` removed its files."""
    earlier = _before(publications(root), run)
    if earlier is None:
        return None
    manifest = read_run(root, earlier)
    try:
        check_whole(root, manifest)
    except InputError:
        return None
    return manifest


def published_manifests(root: str, last: int) -> list[Manifest]:
    """Manifests of up to `last` runs that stand, the published one included, oldest first."""
    latest = read_latest(root)
    if latest is None:
        return []
    runs = list(dict.fromkeys(reversed(standing(publications(root), latest.run))))[:last]
    return [read_run(root, run) for run in reversed(runs)]


# --- removing what nobody reads


@dataclass(frozen=True)
class Garbage:
    """What `collect` would remove."""

    kept_runs: list[str]
    files: list[files.Found]


def find_garbage(
    root: str, keep: int, retention: datetime.timedelta | None = None, now: datetime.datetime | None = None
) -> Garbage:
    """Files of an output that no kept run refers to and that are older than 48 h.

    Kept are the published run and the `keep` runs that were published last; with `retention`, only those of them that were published no longer ago (but always the
    published one). Their whole directories are kept, and what their manifests name in others'. Manifests and `published/` are kept of every run: they are small,
    and tell how figures moved.

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
    last = list(at)[-keep:]
    kept = {latest.run, *(run for run in last if retention is None or now - at[run] <= retention)}
    reached: set[str] = set()
    for run in kept:
        if files.exists(files.join(root, "runs", run, MANIFEST)):
            manifest = read_run(root, run)
            reached |= {path for table in manifest.tables for path in manifest.paths(table)}
    whole = tuple(f"{files.join(root, 'runs', run)}/" for run in kept)
    limit = (now - YOUNG).timestamp()

    def is_garbage(file: files.Found) -> bool:
        # A commit marker goes with its part.
        vouched = {file.path, file.path.removesuffix(".json") + ".parquet"}
        kept_here = file.path.startswith(whole) or file.path.endswith(f"/{MANIFEST}")
        return file.written_at < limit and not kept_here and not vouched & reached

    # Nothing but what camenn writes, run by run and part by part.
    found = [file for folder in OWN for file in files.match(files.join(root, folder), "**")]
    garbage = [file for file in found if is_garbage(file)]
    # A part goes before the marker that vouches for it, so that a removal that was cut off is finished by the next one.
    return Garbage(sorted(kept), sorted(garbage, key=lambda file: (file.path.endswith(".json"), file.path)))


def collect(root: str, keep: int, retention_days: float | None, *, dry_run: bool) -> dict[str, Any]:
    """Remove garbage; returns the closing table."""
    root = files.absolute(root)
    if keep < 1:
        raise InputError(f"--keep {keep}: must be at least 1.")
    if retention_days is not None and retention_days < 0:
        raise InputError(f"--retention_days {retention_days}: must not be negative.")
    retention = None if retention_days is None else datetime.timedelta(days=retention_days)
    with files.single_writer(root):
        garbage = find_garbage(root, keep, retention)
        if not dry_run:
            for start in range(0, len(garbage.files), 500):
                files.delete([file.path for file in garbage.files[start : start + 500]])
            if files.is_local(root):
                _remove_empty(files.join(root, "runs"))
    return {
        "out": root,
        "runs_kept": len(garbage.kept_runs),
        "files_removed": 0 if dry_run else len(garbage.files),
        "files_found": len(garbage.files),
        "megabytes": round(sum(file.bytes for file in garbage.files) / 1e6, 1),
        "dry_run": dry_run,
    }


def _remove_empty(directory: str) -> None:
    """Empty directories below a local one; object stores have none."""
    for path, _, _ in os.walk(directory, topdown=False):
        if path != directory and not os.listdir(path):
            os.rmdir(path)
