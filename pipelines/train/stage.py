"""`camenn train`: a thin main around `camenn_model.training.trainer`, which knows nothing of Beam or of publication."""

import sys
from pathlib import Path

from pipelines.io import files
from pipelines.runner.exit_codes import HeldBack
from pipelines.runs.gate import Gate
from pipelines.runs.manifest import Manifest, write_manifest
from schemas.contract import InputError

STAGE = "train"


def is_readable(package: Path) -> bool:
    """Whether this version of camenn reads a package."""
    from camenn_model.package import read_package

    try:
        read_package(package)
    except InputError:
        return False
    return True


def challenge(manifest: Manifest, champion: str, out: str, shards_root: str) -> None:
    """Enter into the manifest how the new model did against the published run `champion` on the latest closed days.

    Raises:
        HeldBack: it is worse; its package and its manifest are kept.
    """
    from camenn_model.data.shard_set import ShardSet
    from camenn_model.evaluation.challenge import hold_duel
    from camenn_model.package import read_package

    runs = Path(out) / "runs"
    try:
        old = read_package(runs / champion)
    except InputError as error:
        print(f"train: the published model cannot be compared, and the new one takes over: {error}", file=sys.stderr)
        return
    duel = hold_duel(old, read_package(runs / manifest.run), ShardSet(shards_root))
    if duel is None:
        print(
            "train: the published model cannot be compared (other encoders, or no closed day in the test part): the new one takes over",
            file=sys.stderr,
        )
        return
    gate = Gate("challenge", duel.passed, duel.words())
    manifest.gates, manifest.summary["challenge"] = [gate.to_json()], duel.to_json()
    if not duel.passed:
        write_manifest(out, manifest)
        directory = files.join(out, "runs", manifest.run)
        raise HeldBack(
            f"{duel.words()}. The published model stays. If the new one is to be had all the same: camenn publish {directory} --force --reason TEXT"
        )
