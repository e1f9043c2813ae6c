"""Publish runs.

`latest.json` is pointed to a new one, an earlier one, or the one before.
"""

from typing import Any

from camenn_model.integrity import DamagedError
from pipelines.io import clock, files
from pipelines.runner.log import stage_logger
from pipelines.runs import readers_path
from pipelines.runs.manifest import Manifest, check_records, published_files, read_latest, read_run, write_manifest
from schemas.errors import InputError
from schemas.manifest import LATEST, MANIFEST, PUBLISHED, PUBLISHED_FIELDS, RUNS, repair_hint


def publish(root: str, manifest: Manifest) -> None:
    """Write the run's manifest and publish it.

    `latest.json` is pointed to it: the one moment at which readers see the run.
    """
    write_manifest(root, manifest)
    point_to(root, manifest)


def point_to(root: str, manifest: Manifest, **why: str) -> None:
    """Let `latest.json` point to a run.

    Its manifest is written already. `why` is kept beside the time in `published/`.
    """
    numbers = [number for number, _ in published_files(root)]
    entry = {
        "run": manifest.run,
        "stage": manifest.stage,
        "at": clock.utc_stamp(),
        **why,
    }
    # Numbered, not named by time: a clock that is set back must not change the order.
    files.write_document(files.join(root, PUBLISHED, f"{max(numbers, default=0) + 1:08d}.json"), entry, durable=True)
    files.write_document(
        files.join(root, LATEST),
        {"run": manifest.run, "stage": manifest.stage, "manifest": f"{RUNS}/{manifest.run}/{MANIFEST}"},
        durable=True,
    )
    readers_path.update(root, manifest)


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
    with files.single_writer(root):
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
            point_to(root, manifest, **why)
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
