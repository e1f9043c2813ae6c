"""Publish runs.

`latest.json` is pointed to a new one, an earlier one, or the one before.
"""

import contextlib
from dataclasses import dataclass
from typing import Any

from camenn_model.integrity import DamagedError, dump_document, parse_document
from pipelines.io import clock, files, objects
from pipelines.io.lease import Writer
from pipelines.io.object_client import ChangedError
from pipelines.runner.log import stage_logger
from pipelines.runs import readers_path
from pipelines.runs.manifest import Manifest, check_records, published_files, read_latest, read_run, write_manifest
from schemas.errors import InputError
from schemas.manifest import LATEST, LATEST_FIELDS, MANIFEST, PUBLISHED, PUBLISHED_FIELDS, RUNS, repair_hint


class AnotherPublishedError(InputError):
    """Another run was published since this one began."""


@dataclass(frozen=True)
class Position:
    """The state of an output's publications when a run began.

    The run is published as the next number or not at all.
    """

    number: int
    """Of the last record in `published/`, 0 where there is none"""
    token: str | None = None
    """Version of `latest.json` in an object store"""

    @classmethod
    def of(cls, root: str) -> "Position":
        """Read the state of an output that is held."""
        # The pointer first: what is written between the two reads is then noticed in either.
        pointer = files.join(root, LATEST)
        token = None
        if not files.is_local(root):
            token = next((found.token for found in objects.stat_all([pointer])), None)
        return cls(max((number for number, _ in published_files(root)), default=0), token)


def publish(root: str, manifest: Manifest, position: Position | None = None, writer: Writer | None = None) -> None:
    """Write the run's manifest and publish it.

    `latest.json` is pointed to it: the one moment at which readers see the run.

    Args:
        root: of the output.
        manifest: of the run.
        position: of the output when the run began. None = as it is now.
        writer: the right to write there, which is checked in between.

    Raises:
        LostLeaseError: another process took the output over.
        AnotherPublishedError: another run was published since `position` was read.
    """
    write_manifest(root, manifest)
    if writer is not None:
        writer.check()
    point_to(root, manifest, position)


def point_to(root: str, manifest: Manifest, position: Position | None = None, **why: str) -> None:
    """Let `latest.json` point to a run.

    Its manifest is written already. `why` is kept beside the time in `published/`.

    The record in `published/` is the commit: of any number of processes that want to write the same
    number one succeeds. `latest.json` then follows, and only ever to higher numbers.

    Raises:
        AnotherPublishedError: another run was published since `position` was read.
    """
    position = position or Position.of(root)
    number = position.number + 1
    entry = {
        "run": manifest.run,
        "stage": manifest.stage,
        "at": clock.utc_stamp(),
        **why,
    }
    # Numbered, not named by time: a clock that is set back must not change the order.
    record = files.join(root, PUBLISHED, f"{number:08d}.json")
    try:
        files.create_document(record, entry)
    except FileExistsError as error:
        raise _another_published(root, manifest, record) from error
    pointer: dict[str, Any] = {
        "run": manifest.run,
        "stage": manifest.stage,
        "manifest": f"{RUNS}/{manifest.run}/{MANIFEST}",
    }
    if files.is_local(root):
        # The lock of the output is held until this is written.
        files.write_document(files.join(root, LATEST), pointer, durable=True)
    else:
        _advance(root, manifest, pointer | {"number": number}, position.token)
    readers_path.update(root, manifest)


def _advance(root: str, manifest: Manifest, pointer: dict[str, Any], token: str | None) -> None:
    """Point an object store's `latest.json` to a publication, unless a later one is shown.

    Its bytes are new every time, as its number is: a token that was seen never comes back, as the
    checksum of a run that is published twice would (an ETag of s3).
    """
    path = files.join(root, LATEST)
    while True:
        try:
            objects.put_if(path, dump_document(pointer), token)
            return
        except ChangedError:
            # A process that had lost its lease wrote it, or one that took this one's over. The higher number is shown.
            token, shown = _read_pointer(path)
        if shown > pointer["number"]:
            raise _another_published(root, manifest, files.join(root, PUBLISHED, f"{shown:08d}.json"))


def _read_pointer(path: str) -> tuple[str | None, int]:
    """Read the token of an object store's `latest.json`, and the number that it shows."""
    while True:
        try:
            token = objects.stat(path).token
            (data,) = objects.read(path, token=token)
        except FileNotFoundError:
            return None, 0
        except ChangedError:
            continue
        hint = repair_hint(path.rpartition("/")[0])
        return token, int(parse_document(data, path, LATEST_FIELDS, hint).get("number", 0))


def _another_published(root: str, manifest: Manifest, record: str) -> AnotherPublishedError:
    other = ""
    with contextlib.suppress(InputError, OSError):
        other = f" ({files.read_document(record, PUBLISHED_FIELDS, '')['run']})"
    directory = files.join(root, RUNS, manifest.run)
    return AnotherPublishedError(
        f"{root}: another run{other} was published meanwhile, which readers see. Run {manifest.run} is finished and "
        f"kept in {directory}: nothing was lost. Run the command again, or show this one: camenn publish {directory}"
    )


def publications(root: str, last: int | None = None) -> list[dict[str, str]]:
    """List what `latest.json` pointed to, oldest first.

    Each has run, stage, at, and why. With `last`, only so many of the latest ones are listed.

    The latest one may be of a publication that was cut off: `latest.json` alone says what is
    published.
    """
    entries = published_files(root)
    hint = repair_hint(root)
    return [files.read_document(path, PUBLISHED_FIELDS, hint) for _, path in entries[-last if last else None :]]


def check_whole(root: str, manifest: Manifest) -> None:
    """Check that a run's files are what was written.

    Raises:
        DamagedError: one is gone, or has another size or other bytes than the manifest says.
    """
    records = [record for table in manifest.tables for record in manifest.records(table)]
    check_records(records, f"Run {manifest.run} of {root} is not whole: publish another run.", fresh=True)


def split_run(path: str) -> tuple[str, str]:
    """Split a run's directory, `OUT/runs/RUN`, into (output, name).

    Raises:
        InputError: it is no run's directory, or the run was never finished.
    """
    root, _, run = path.rstrip("/").rpartition("/runs/")
    if not root or "/" in run:
        raise InputError(f"{path}: give the run's directory, as in WORK/scores/runs/20260131T020000-1a2b3c.")
    if not files.exists(files.join(root, RUNS, run, MANIFEST)):
        raise InputError(
            f"{path}: there is no {MANIFEST} in it: the run was never finished. Run its command again instead."
        )
    return root, run


def republish(path: str, *, force: bool, reason: str | None) -> dict[str, Any]:
    """Let readers see a finished run.

    Returned is the closing table.

    Raises:
        InputError: the run is not whole, its gates failed and it is not forced, or it is forced
            without a reason.
    """
    root, run = split_run(files.absolute(path))
    with files.single_writer(root) as writer:
        position = Position.of(root)
        manifest = read_run(root, run)
        try:
            latest = read_latest(root)
        except DamagedError as error:
            # The published run is not known. Publishing this one fixes it.
            stage_logger("publish").warning("%s", error)
            latest = None
        before = latest.run if latest is not None else None
        failed = [gate for gate in manifest.gates if not gate["passed"]]
        if failed and not force:
            reasons = "; ".join(gate["words"] for gate in failed)
            raise InputError(
                f"{path}: its gates failed: {reasons}. Publish it with --force --reason TEXT if you know better."
            )
        if force and not reason:
            raise InputError("--force needs --reason TEXT: it is kept beside the publication.")
        check_whole(root, manifest)
        changed = before != run
        if changed:
            why = {"reason": reason} if reason else {}
            if force:
                why["forced"] = "; ".join(gate["words"] for gate in failed) or "no gate had failed"
            writer.check()
            point_to(root, manifest, position, **why)
        else:
            readers_path.update(root, manifest)
    return {
        "out": root,
        "run": run,
        "before": before,
        "published": changed,
        "gates_overridden": len(failed) if force else 0,
    }


def rollback(root: str, reason: str | None) -> dict[str, Any]:
    """Let readers see the run that was published before.

    It is the one before the present one. Returned is the closing table.

    Rolling back twice goes back by two: runs that were rolled back from are passed over.

    Raises:
        InputError: nothing was published before, or it is not whole any more.
    """
    root = files.absolute(root)
    with files.single_writer(root) as writer:
        position = Position.of(root)
        latest = read_latest(root)
        if latest is None:
            raise InputError(f"--out {root}: nothing is published there (no {LATEST}).")
        earlier = _before(publications(root), latest.run)
        if earlier is None:
            raise InputError(f"--out {root}: nothing was published before run {latest.run}.")
        manifest = read_run(root, earlier)
        check_whole(root, manifest)
        writer.check()
        why = {"reason": reason} if reason else {}
        point_to(root, manifest, position, rolled_back_from=latest.run, **why)
    return {"out": root, "run": earlier, "before": latest.run, "published": True}


def effective_runs(history: list[dict[str, str]], run: str) -> list[str]:
    """List the runs that stand up to `run`.

    They were published up to `run`, which is published now, oldest first, without those that were
    rolled back from.
    """
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
    """Find the run that was published before `run`."""
    stack = effective_runs(history, run)
    return stack[-2] if len(stack) > 1 else None


def previous_run(root: str, run: str) -> Manifest | None:
    """Read the manifest of the previously published run.

    It was published before `run`, which is published now. It is None where there was none or
    `camenn gc` removed its files.
    """
    earlier = _before(publications(root), run)
    if earlier is None:
        return None
    try:
        manifest = read_run(root, earlier)
        check_whole(root, manifest)
    except DamagedError:
        return None
    return manifest


def published_manifests(root: str, last: int) -> list[Manifest]:
    """Read the manifests of the last standing runs.

    They are up to `last` runs that stand, the published one included, oldest first.
    """
    latest = read_latest(root)
    if latest is None:
        return []
    runs = list(dict.fromkeys(reversed(effective_runs(publications(root), latest.run))))[:last]
    # A manifest that was lost, or that `camenn fsck --repair` set aside, can be published no more,
    # and compared with no more.
    there = [run for run in runs if files.exists(files.join(root, RUNS, run, MANIFEST))]
    return [read_run(root, run) for run in reversed(there)]
