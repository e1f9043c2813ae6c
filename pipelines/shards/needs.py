"""Compute what the workers of `camenn shards` download."""

from collections.abc import Iterable

import pyarrow.parquet as pq

from pipelines.inputs.contents import ContentsPlan
from pipelines.io import files
from pipelines.io.tables import Slice, open_table
from pipelines.runner.machine_needs import MachineNeeds
from pipelines.shards.log_cache import LogPlan
from pipelines.shards.options import STAGE
from pipelines.shards.planning import Found


def worker_needs(found: Found, contents: ContentsPlan, threads: int) -> MachineNeeds:
    """Compute the needs of all workers together.

    They keep nothing on disk.
    """
    kept = sum(part.record.bytes for log in found.logs.values() for part in log.parts)
    open_days = {path for paths in found.kept.open_paths.values() for path in paths}
    return MachineNeeds(
        stage=STAGE,
        threads=threads,
        together={
            "logs": sum(map(log_bytes, found.logs.values())),
            "kept_rows": kept,
            "open_days": sum(each.bytes for each in files.find(open_days)),
            "embeddings": embedding_bytes(contents),
        },
        lacks="buckets",
    )


def log_bytes(log: LogPlan) -> int:
    """Add up a log's row groups that are read."""
    wanted: dict[str, list[Slice]] = {}
    for place in log.fresh:
        wanted.setdefault(place.file, []).append(place)
    total = 0
    for path, places in wanted.items():
        with open_table(path, log.contract) as (_, parquet):
            total += group_bytes(parquet, (place.row_group for place in places))
    return total


def embedding_bytes(contents: ContentsPlan) -> int:
    """Add up the store's row groups that are read."""
    groups: dict[str, set[int]] = {}
    for piece in contents.pieces:
        for path, numbers in piece.groups:
            groups.setdefault(path, set()).update(numbers)
    total = 0
    for path, chosen in groups.items():
        with files.open_read(path) as handle:
            total += group_bytes(pq.ParquetFile(handle), chosen, {"image_key", "title_key", "embedding"})
    return total


def group_bytes(parquet: pq.ParquetFile, groups: Iterable[int], columns: set[str] | None = None) -> int:
    """Add up some row groups of a file.

    `columns`: None = all.
    """
    metadata = parquet.metadata
    return sum(
        metadata.row_group(group).column(number).total_compressed_size
        for group in groups
        for number in range(metadata.num_columns)
        if columns is None or metadata.row_group(group).column(number).path_in_schema in columns
    )
