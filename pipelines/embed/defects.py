"""Find listings whose photo cannot be used."""

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.embed.coverage import read_items
from pipelines.embed.options import STAGE
from pipelines.io import files
from pipelines.io.tables import FileRecord
from pipelines.runs.store import Part
from schemas.rejects import DEFECTS


def failed_photos(parts: list[Part], unread_files: list[str]) -> dict[str, tuple[str, str]]:
    """Return the photos that could not be decoded or read.

    The result is {content key: (reason, detail)} of photos that could not be decoded, or not be
    read tonight.
    """
    failures = {key: (reason, detail) for part in parts for key, reason, detail in part.failures}
    for path in unread_files:
        with files.open_read(path) as handle:
            for row in pq.read_table(handle).to_pylist():
                failures[row["key"]] = (row["reason"], row["detail"])
    return failures


def write_defects(run_directory: str, item_files: list[str], failures: dict[str, tuple[str, str]]) -> list[FileRecord]:
    """Write the run's `defects` table.

    It has the listings whose photo is missing, unreadable or undecodable: one file, ordered by key.
    """
    failed = pa.array(list(failures), pa.string())
    keys: list[str] = []
    reasons: list[str] = []
    details: list[str] = []
    for table in read_items(item_files, ["item_id", "image_uri", "image_key", "image_defect", "image_defect_detail"]):
        bad = pc.or_(pc.is_valid(table["image_defect"]), pc.is_in(table["image_key"], failed))
        rows = (column.to_pylist() for column in table.filter(bad).columns)
        for item, uri, key, defect, detail in zip(*rows, strict=True):
            if key in failures:
                defect, detail = failures[key]
                detail = f"column 'image_uri': '{uri}': {detail}" if uri else f"column 'image_bytes': {detail}"
            keys.append(f"catalog:{item}")
            reasons.append(defect)
            details.append(f"item_id '{item}': {detail}")
    if not keys:
        return []
    defects = pa.table(
        {"stage": [STAGE] * len(keys), "key": keys, "reason": reasons, "detail": details}, schema=DEFECTS.schema
    ).sort_by("key")
    path = files.join(run_directory, "defects", "part-0.parquet")
    return [FileRecord.of("defects", path, defects.num_rows, files.write_parquet(path, defects))]
