"""Resolve the catalog to items and wanted contents.

This finds which photo and which title each listing has, and which contents are wanted.
"""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import apache_beam as beam
import pyarrow as pa

from camenn_model.hashing import content_key, normalise_title
from pipelines.embed.options import STAGE
from pipelines.inputs.catalog import add_origin, drop_duplicates
from pipelines.inputs.photo_files import (
    FileDefect,
    PhotoFiles,
    PhotoStatus,
    UriDefect,
    object_status,
    photo_status,
)
from pipelines.inputs.photo_listing import PhotoListing
from pipelines.io.object_client import Stat, missing
from pipelines.io.rejects import drop_unusable
from pipelines.io.tables import Slice
from pipelines.runs.accounting import Count
from schemas.catalog import CATALOG
from schemas.embeddings import EMBEDDED_ITEMS
from schemas.reasons import Reason

READ_THREADS = 8
HASHED = "photos_hashed"
"""What counts bytes of photos that were read to know them"""

WANTED_IMAGE = pa.schema(
    [("image_key", pa.string()), ("path", pa.string()), ("bytes", pa.binary()), ("size", pa.int64())]
)
WANTED_TITLE = pa.schema([("title_key", pa.string()), ("title", pa.string())])


class CleanRows(beam.DoFn):
    """A step that cleans catalog rows and keeps their origin.

    It takes (slice, catalog rows) and yields rows with their origin. Rejects and counts come
    beside.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # Beam's own has no annotations

    def process(self, element: tuple[Slice, pa.Table]) -> Iterator[Any]:
        where, table = element
        kept, rejects = drop_unusable(STAGE, where, add_origin(where, table), CATALOG)
        yield kept
        yield beam.pvalue.TaggedOutput("counts", Count("catalog", "in", table.num_rows))
        if rejects.num_rows:
            yield beam.pvalue.TaggedOutput("rejects", rejects)
            yield beam.pvalue.TaggedOutput("counts", Count("catalog", "rejected", rejects.num_rows))


@dataclass(frozen=True)
class _Photo:
    """The known facts of one listing's photo."""

    key: str | None = None
    path: str | None = None
    size: int | None = None
    mtime: float | None = None
    version: str | None = None
    data: bytes | None = None
    defect: str | None = None
    detail: str | None = None


class _Known(NamedTuple):
    """What the previous run says of one listing's photo."""

    uri: str
    size: int
    mtime: float
    version: str | None
    key: str

    def holds(self, uri: str, now: PhotoStatus) -> bool:
        """Return whether the photo is the same still."""
        if (self.uri, self.size) != (uri, now.bytes):
            return False
        return self.mtime == now.written_at if now.version is None else self.version == now.version


class ResolveItems(beam.DoFn):
    """A step from a catalog bucket to its items.

    It also yields the photos and titles that the items want.

    A photo whose (address, size, modification time) is the previous run's is not opened: its key is
    known. Of an object its version counts, not its time.

    `listing`: file of `list_photos`, if any. `plan`: count the bytes of photos that are opened.
    """

    def __init__(self, image_root: str, allow_absolute: bool, listing: str | None = None, plan: bool = False) -> None:
        self.photos = PhotoFiles(image_root, allow_absolute)
        self.listing = PhotoListing(image_root, listing)
        self.listed: dict[str, Stat | None] = {}
        self.keys: dict[Stat, str] = {}
        self.plan = plan
        self.hashed: list[int] = []
        self.real_directory: Callable[[str], str] = os.path.realpath
        self.read = beam.metrics.Metrics.counter(STAGE, "photos-read")

    def process(self, element: tuple[int, dict[str, pa.Table]]) -> Iterator[Any]:
        _, kinds = element
        if "catalog" not in kinds:
            return
        rows, rejects, copies = drop_duplicates(STAGE, kinds["catalog"])
        known: dict[str, _Known] = {}
        if "previous" in kinds:
            names = ("item_id", "image_uri", "image_size", "image_mtime", "image_version", "image_key")
            columns = [kinds["previous"][name].to_pylist() for name in names]
            known = {row[0]: _Known(*row[1:]) for row in zip(*columns, strict=True) if row[-1] is not None}
        items, uris, inline = (rows[name].to_pylist() for name in ("item_id", "image_uri", "image_bytes"))
        # Again for each bucket: links may be changed between runs of a worker that lives on.
        self.real_directory = functools.lru_cache(4_096)(os.path.realpath)
        self.listed, self.keys = self._look_up(uris, inline), {}
        self.hashed = []
        with ThreadPoolExecutor(READ_THREADS) as pool:
            photos = list(
                pool.map(
                    lambda row: self._photo(row[1], row[2], known.get(row[0])), zip(items, uris, inline, strict=True)
                )
            )
        titles = [normalise_title(title) for title in rows["title"].to_pylist()]
        title_keys = [content_key(title.encode()) if title else None for title in titles]
        yield pa.table(
            {
                "item_id": items,
                "title_key": title_keys,
                "image_key": [photo.key for photo in photos],
                "image_uri": uris,
                "image_size": [photo.size for photo in photos],
                "image_mtime": [photo.mtime for photo in photos],
                "image_version": [photo.version for photo in photos],
                "image_defect": [photo.defect for photo in photos],
                "image_defect_detail": [photo.detail for photo in photos],
            },
            schema=EMBEDDED_ITEMS.schema,
        )
        wanted = {photo.key: photo for photo in photos if photo.key is not None}
        yield beam.pvalue.TaggedOutput(
            "images",
            pa.table(
                {
                    "image_key": list(wanted),
                    "path": [p.path for p in wanted.values()],
                    "bytes": [p.data for p in wanted.values()],
                    "size": [p.size for p in wanted.values()],
                },
                schema=WANTED_IMAGE,
            ),
        )
        by_key = {key: title for key, title in zip(title_keys, titles, strict=True) if key is not None}
        yield beam.pvalue.TaggedOutput(
            "titles", pa.table({"title_key": list(by_key), "title": list(by_key.values())}, schema=WANTED_TITLE)
        )
        if rejects.num_rows:
            yield beam.pvalue.TaggedOutput("rejects", rejects)
        yield beam.pvalue.TaggedOutput("counts", Count("catalog", "out", rows.num_rows))
        yield beam.pvalue.TaggedOutput("counts", Count("catalog", "rejected", rejects.num_rows))
        yield beam.pvalue.TaggedOutput("counts", Count("catalog", "duplicates", copies))
        if self.plan:
            for where in ("in", "hashed"):
                yield beam.pvalue.TaggedOutput("counts", Count(HASHED, where, sum(self.hashed)))

    def _look_up(self, uris: list[str | None], inline: list[bytes | None]) -> dict[str, Stat | None]:
        paths = []
        for uri, data in zip(uris, inline, strict=True):
            if self.listing.path is not None and data is None and uri is not None:
                # Each defect is reported where the listing is resolved.
                with contextlib.suppress(UriDefect):
                    paths.append(self.photos.resolve(uri, self.real_directory))
        return self.listing.look(paths)

    def _status(self, path: str) -> PhotoStatus:
        if path not in self.listed:
            return photo_status(path)
        found = self.listed[path]
        if found is None:
            raise missing(path)
        return object_status(found)

    def _key(self, path: str, status: PhotoStatus) -> str:
        key = self.keys.get(status.found) if status.found is not None else None
        if key is None:
            data = self.photos.read(path, status.found)
            key = content_key(data)
            self.hashed.append(len(data))
            self.read.inc()
            if status.found is not None:
                # Other listings of the bucket may have the same photo.
                self.keys[status.found] = key
        return key

    def _photo(self, uri: str | None, data: bytes | None, known: _Known | None) -> _Photo:
        if data is not None:
            return _Photo(key=content_key(data), data=data, size=len(data), mtime=0.0)
        if uri is None or not uri.strip():
            return _Photo()
        try:
            path = self.photos.resolve(uri, self.real_directory)
            status = self._status(path)
            same = known is not None and known.holds(uri, status)
            key = known.key if known is not None and same else self._key(path, status)
            return _Photo(key=key, path=path, size=status.bytes, mtime=status.written_at, version=status.version)
        except UriDefect as defect:
            return _Photo(defect=defect.reason, detail=defect.detail)
        except FileDefect as defect:
            return _Photo(defect=defect.reason, detail=f"column 'image_uri': '{uri}' {defect.detail}")
        except FileNotFoundError:
            detail = (
                f"column 'image_uri': '{uri}' is not a file under {self.photos.image_root}. Upload the photo, or "
                "fix the address."
            )
            return _Photo(defect=Reason.MISSING_IMAGE, detail=detail)
        except OSError as error:
            detail = (
                f"column 'image_uri': '{uri}' cannot be read ({error.strerror or error}). Fix its permissions, "
                "or upload it again."
            )
            return _Photo(defect=Reason.UNREADABLE_IMAGE, detail=detail)
