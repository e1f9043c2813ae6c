"""List the published runs of an output."""

from typing import Any

from pipelines.io import files
from pipelines.runs.manifest import read_latest
from pipelines.runs.publication import publications
from pipelines.runs.readers_path import reader_paths, run_at
from schemas.errors import InputError
from schemas.manifest import KEEP, LATEST, MANIFEST, RUNS


def list_runs(out: str, last: int = KEEP) -> dict[str, Any]:
    """Describe an output's published run and earlier publications.

    The keys are `out`, `stage`, `run`, `directory`, `published_at`, `tables` (rows and files by
    table), `readers` (by table, the path that never changes, where it leads to this run), `gates`,
    `summary` (the closing table) and `publications` (the `last` ones, oldest first).

    Raises:
        InputError: nothing is published there.
        DamagedError: a document of the output cannot be read.
    """
    out = files.absolute(out)
    latest = read_latest(out)
    if latest is None:
        raise InputError(f"{out}: nothing is published there (no {LATEST}).")
    history = publications(out, last)
    readers = reader_paths(out, latest.stage)
    times = [entry["at"] for entry in history if entry["run"] == latest.run]
    return {
        "out": out,
        "stage": latest.stage,
        "run": latest.run,
        "directory": files.join(out, RUNS, latest.run),
        "manifest": files.join(out, RUNS, latest.run, MANIFEST),
        "published_at": times[-1] if times else latest.created_at,
        "tables": {name: {"rows": latest.rows(name), "files": latest.listed(name)} for name in sorted(latest.tables)},
        "readers": {table: path for table, path in readers.items() if run_at(path) == latest.run},
        "gates": latest.gates,
        "summary": latest.summary,
        "publications": history,
    }
