"""The embedding store: content-addressed parts under one generation per encoder fingerprint, each with a commit marker.

    STORE/images/FINGERPRINT/part-X.parquet    distinct photos' patch features
    STORE/images/FINGERPRINT/part-X.json       commit marker: rows, bytes, photos that could not be decoded, photos that were gone
    STORE/titles/FINGERPRINT/...               the same for titles
    STORE/runs/RUN/items/...                   which photo and title each listing has; rejects/, defects/, manifest.json
    STORE/latest.json

A part without its marker was cut off by a crash: nobody reads it.
"""

import hashlib
from dataclasses import dataclass

import pyarrow as pa
from apache_beam.io.filesystems import FileSystems

from pipelines import files
from schemas.contract import Contract, check_output
from schemas.embeddings import with_shape

IMAGES, TITLES = "images", "titles"


@dataclass(frozen=True, kw_only=True)
class Part:
    """A committed part of a generation."""

    path: str
    rows: int
    bytes: int
    failures: tuple[tuple[str, str, str], ...] = ()
    """(content key, reason, detail) of contents in the chunk that could not be encoded."""
    unread: tuple[tuple[str, str, str], ...] = ()
    """The same of contents that were not there any more: true of that run only, so that later ones try again."""


def generation(store: str, kind: str, fingerprint: str) -> str:
    """Directory of one kind's generation."""
    return files.join(store, kind, fingerprint)


def list_parts(directory: str) -> list[Part]:
    """Committed parts of a generation, ordered by path."""
    match = FileSystems.match([files.join(directory, "part-*.json")])[0]
    return [read_marker(metadata.path) for metadata in sorted(match.metadata_list, key=lambda m: m.path)]


def read_marker(path: str) -> Part:
    """The part that a commit marker vouches for."""
    value = files.read_json(path)
    failures, unread = (
        tuple((key, reason, detail) for key, reason, detail in value[name]) for name in ("failures", "unread")
    )
    return Part(
        path=path.removesuffix(".json") + ".parquet",
        rows=value["rows"],
        bytes=value["bytes"],
        failures=failures,
        unread=unread,
    )


def chunk_name(run: str, keys: list[str]) -> str:
    """Name of the part that one run makes of some content keys: a retried bundle writes the same part again, not a second one."""
    return hashlib.sha256("\n".join([run, *keys]).encode()).hexdigest()[:32]


def find_part(directory: str, name: str) -> Part | None:
    """The committed part of that name, if there is one."""
    marker = files.join(directory, f"part-{name}.json")
    return read_marker(marker) if files.exists(marker) else None


def commit_part(
    directory: str,
    contract: Contract,
    shape: tuple[int, int],
    name: str,
    table: pa.Table,
    failures: list[tuple[str, str, str]],
    unread: list[tuple[str, str, str]],
) -> Part:
    """Write a part and then its marker: from that moment on its contents are never encoded again."""
    path = files.join(directory, f"part-{name}.parquet")
    size = files.write_parquet(path, with_shape(check_output(table, contract), shape), row_group_size=256)
    files.write_json(
        files.join(directory, f"part-{name}.json"),
        {"rows": table.num_rows, "bytes": size, "failures": failures, "unread": unread},
    )
    return Part(path=path, rows=table.num_rows, bytes=size, failures=tuple(failures), unread=tuple(unread))
