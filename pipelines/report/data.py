"""Read the report's sources.

They are the manifests, metrics, curves and tables of a working directory. Each of them may be
absent.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.io import files
from pipelines.runs.manifest import Manifest, read_latest
from pipelines.runs.publication import previous_run
from pipelines.stages import OUTPUT_FOLDERS
from schemas.errors import InputError

"""Stage and the folder of the working directory that it publishes in."""

_FIELDS = (
    "baselines",
    "early_stop_log_loss",
    "queries",
    "reliability",
    "representation",
    "seconds",
    "test",
    "train",
)
"""Keys of metrics.json and retrieval.json"""
_ITEM_COLUMNS = ("item_id", "title", "subcategory", "image_uri", "store_id", "price", "product_key")


@dataclass(frozen=True, kw_only=True)
class Work:
    """A working directory, as far as it exists.

    `metrics`, `curves` and `retrieval` are as their files have them.

    `metrics` come from `metrics.json` of the working directory, which has the baselines, or else
    from the model's own. `metrics_path` says which.
    """

    root: str
    manifests: dict[str, Manifest]
    previous_scores: Manifest | None
    metrics: dict[str, Any] | None
    metrics_path: str | None
    curves: pd.DataFrame | None
    retrieval: list[dict[str, Any]] | None


@dataclass(frozen=True, kw_only=True)
class Item:
    """A listing, as it was clicked or scored.

    `price`: currency units.
    """

    item_id: str
    title: str | None = None
    subcategory: str | None = None
    image_uri: str | None = None
    store_id: str | None = None
    price: float | None = None
    product_key: str | None = None


@dataclass(frozen=True, kw_only=True)
class Reason:
    """One reason of a rejects or defects table.

    It has its rows, and a few of them as examples (key, detail).
    """

    stage: str
    reason: str
    rows: int
    examples: list[dict[str, str]]


def read_work(root: str) -> Work:
    """Read a working directory's contents, except tables.

    Raises:
        InputError: it is no directory, or one of its files is malformed.
    """
    if not files.has_folder(root):
        raise InputError(
            f"--run {root}: no such directory. Give the working directory that holds store/, "
            "shards/, model/ and scores/."
        )
    found = {stage: read_latest(files.join(root, folder)) for stage, folder in OUTPUT_FOLDERS.items()}
    manifests = {stage: manifest for stage, manifest in found.items() if manifest is not None}
    scores, model = manifests.get("score"), manifests.get("train")
    curves = retrieval = None
    places = [files.join(root, "metrics.json")]
    if model is not None:
        directory = files.join(root, "model", "runs", model.run)
        for name in model.tables:
            model.check(name)
        curves = _read_curves(files.join(directory, "curves.csv"))
        retrieval = _read_object(files.join(directory, "retrieval.json"))
        places.append(files.join(directory, "metrics.json"))
    metrics_path = next((path for path in places if files.exists(path)), None)
    return Work(
        root=root,
        manifests=manifests,
        previous_scores=previous_run(files.join(root, "scores"), scores.run) if scores else None,
        metrics=_read_object(metrics_path) if metrics_path else None,
        metrics_path=metrics_path,
        curves=curves,
        retrieval=retrieval["queries"] if retrieval else None,
    )


def _read_object(path: str) -> dict[str, Any] | None:
    if not files.exists(path):
        return None
    return files.read_document(path, _FIELDS, "Write it again, or remove it.")


def _read_curves(path: str) -> pd.DataFrame | None:
    if not files.exists(path):
        return None
    with files.open_read(path) as handle:
        curves = pd.read_csv(handle)
    if curves.empty:
        # A run that stopped before its first step has nothing to draw.
        return None
    needed = {"step", "total", "cvr", "ita", "tia", "contrastive", "balance", "z", "early_stop_log_loss"}
    missing = sorted(needed - set(curves.columns))
    if missing:
        raise InputError(f"{path}: columns {', '.join(missing)} are missing. Train again, or remove the file.")
    return curves


def read_columns(paths: list[str], columns: list[str]) -> Iterator[pa.Table]:
    """Yield some columns of Parquet files, file by file."""
    for path in paths:
        with files.open_read(path) as handle:
            # A ParquetFile reads this file alone; hive folders of its path would add columns.
            yield pq.ParquetFile(handle, pre_buffer=not files.is_local(path)).read(columns=columns)


def read_items(work: Work, wanted: set[str]) -> dict[str, Item]:
    """Read the listings of some ids.

    They come from the scored catalog, or from the shards' one where the scored catalog no longer
    has them. Unknown ids are left out.
    """
    found: dict[str, Item] = {}
    for stage in ("score", "shards"):
        manifest = work.manifests.get(stage)
        ids = pa.array(sorted(wanted - set(found)), pa.string())
        for table in read_columns(manifest.paths("items") if manifest else [], list(_ITEM_COLUMNS)):
            rows = table.filter(pc.is_in(table["item_id"], value_set=ids)).to_pylist()
            found |= {row["item_id"]: Item(**row) for row in rows}
    return found


def count_reasons(manifests: dict[str, Manifest], table: str, examples: int) -> list[Reason]:
    """Count the rows of `rejects` or `defects` by reason.

    Counts are by stage and reason, most frequent first, with the first few rows of each.
    """
    rows: dict[tuple[str, str], int] = {}
    first: dict[tuple[str, str], list[dict[str, str]]] = {}
    for manifest in manifests.values():
        for piece in read_columns(manifest.paths(table), ["stage", "key", "reason", "detail"]):
            grouped = piece.group_by(["stage", "reason"], use_threads=False).aggregate([([], "count_all")])
            for group in grouped.to_pylist():
                name = group["stage"], group["reason"]
                rows[name] = rows.get(name, 0) + group["count_all"]
                shown = first.setdefault(name, [])
                if len(shown) < examples:
                    same = pc.and_(pc.equal(piece["stage"], name[0]), pc.equal(piece["reason"], name[1]))
                    shown += piece.filter(same).slice(0, examples - len(shown)).select(["key", "detail"]).to_pylist()
    order = sorted(rows, key=lambda name: (-rows[name], name))
    return [
        Reason(stage=stage, reason=reason, rows=rows[stage, reason], examples=first[stage, reason])
        for stage, reason in order
    ]
