"""Layout of an output's documents.

They list the files of an output: `latest.json`, `published/`, a run's `manifest.json`, a part's
commit marker.

Each is a JSON object with a checksum of its own (`camenn_model.integrity`). A document with any
other key was not written by camenn. The messages about them are here as well: the packages that
read them share no other module.
"""

from schemas.errors import InputError

LATEST = "latest.json"
"""The published run: {run, stage, manifest}, and on object stores the number of its record"""
LATEST_FIELDS = ("run", "stage", "manifest", "number")

PUBLISHED = "published"
"""Folder with a numbered record of each publication"""
PUBLISHED_FIELDS = ("run", "stage", "at", "reason", "forced", "rolled_back_from", "repaired")

KEEP = 7
"""Runs published last that `camenn gc` keeps"""

RUNS = "runs"
"""Folder with a directory a run"""
MANIFEST = "manifest.json"
MANIFEST_FIELDS = (
    "stage",
    "run",
    "request",
    "inputs",
    "options",
    "tables",
    "counts",
    "summary",
    "gates",
    "seconds",
    "created_at",
    "versions",
    "schema_version",
)
"""Fields of `pipelines.runs.manifest.Manifest`"""

MARKER_FIELDS = (
    "rows",
    "bytes",
    "sha256",
    "keys_bytes",
    "keys_sha256",
    "kernels",
    "seconds",
    "failures",
    "unread",
    "replaces",
    "written_at",
)
"""Fields of the commit marker of an embedding store's part"""


def remedy(stage: str, table: str) -> str:
    """Return the commands that repair a damaged table.

    A file of it is lost or damaged.
    """
    if stage == "embed" and table.endswith(("_embeddings", "_keys")):
        return (
            "Run `camenn fsck --repair` on this store, which sets the part aside, and then `camenn embed`: "
            "it encodes what is missing again."
        )
    if stage == "embed":
        return "Run `camenn embed` again."
    if stage == "shards" and table.startswith(("contents_", "kept_")):
        return "Run `camenn shards --rerun`: it is made again from the store and the logs."
    if stage == "shards":
        return "Run `camenn shards --rebuild`, or `camenn rollback` to the shard set of before."
    if stage == "train":
        return "Run `camenn train --rerun`, or `camenn rollback` to the model of before."
    if table.startswith("contents_"):
        return "Run `camenn score --rerun`: it is copied again from the store."
    return "Run `camenn score --rerun`, or `camenn rollback` to the scores of before."


def repair_hint(root: str) -> str:
    """Return the command that repairs an unreadable document.

    The document is one of an output.
    """
    return f"`camenn fsck --out {root} --repair` lets readers see the newest run that is whole."


def nothing_published(root: str, stage: str, flag: str) -> InputError:
    """Return the error of an output without published runs.

    No run was published in it yet.
    """
    return InputError(f"{flag} {root}: nothing is published there (no {LATEST}). Run `camenn {stage}` into it first.")


def not_of_stage(root: str, found: str, wanted: str, flag: str) -> InputError:
    """Return the error of an output that another stage wrote."""
    return InputError(
        f"{flag} {root}: holds the output of `camenn {found}`, not of `camenn {wanted}`. Give another directory."
    )


def pointer_lost(root: str) -> str:
    """Return the message for a lost `latest.json`.

    Runs were published there and `latest.json` is gone.
    """
    return f"{root.rstrip('/')}/{LATEST}: this file is gone, although runs were published here. {repair_hint(root)}"
