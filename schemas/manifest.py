"""Layout of what says which files an output is made of: `latest.json`, `published/`, a run's `manifest.json`, a part's commit marker.

Each is a JSON object with a checksum of its own (`camenn_model.integrity`). A document with any other key is not ours.
"""

LATEST = "latest.json"
"""The published run: {run, stage, manifest}"""
LATEST_FIELDS = ("run", "stage", "manifest")

PUBLISHED = "published"
"""Folder with a numbered record of each publication"""
PUBLISHED_FIELDS = ("run", "stage", "at", "reason", "forced", "rolled_back_from", "repaired")

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
"""Fields of `pipelines.manifest.Manifest`"""

MARKER_FIELDS = (
    "rows",
    "bytes",
    "sha256",
    "kernels",
    "seconds",
    "failures",
    "unread",
    "replaces",
    "written_at",
)
"""Of a part of the embedding store"""
