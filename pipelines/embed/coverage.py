"""Check that the photos the catalog names are there.

This is asked before a run reads any photo, and before its readers see the run.
"""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from camenn_model.hashing import stable_hash
from pipelines.embed.options import EmbedOptions
from pipelines.io import files
from pipelines.io.tables import FileRecord, Source, list_slices, open_parquet, read_slice
from pipelines.runs.gate import LEAST_ROWS, NEARLY_NONE, Gate, hold_photos
from pipelines.runs.manifest import Manifest
from schemas.catalog import CATALOG
from schemas.errors import InputError

LEAST_NAMED = 5
"""Of so many photos that a first catalog names, not all are broken, not even where a third of them is: one such catalog
in 240."""


def read_items(item_files: list[str], columns: list[str]) -> Iterator[pa.Table]:
    """Yield the run's items, a row group at a time.

    All of them at once would grow with the catalog.
    """
    for path in item_files:
        with files.open_read(path) as handle:
            source = open_parquet(handle)
            for group in range(source.num_row_groups):
                yield source.read_row_group(group, columns=columns)


@dataclass(frozen=True)
class PhotoIds:
    """The listings that have a photo.

    Ids are hashes, uint64, ordered: eight bytes a listing.
    """

    listings: np.ndarray
    with_photo: np.ndarray
    named: int
    """Listings that name a photo, usable or not"""

    @property
    def lacks_photos(self) -> bool:
        """Return whether nearly none of the named photos is usable."""
        usable = len(self.with_photo)
        return self.named >= (LEAST_ROWS if usable else LEAST_NAMED) and usable < NEARLY_NONE * self.named

    @classmethod
    def of_items(cls, item_files: list[str], failed: Iterable[str], bad_items: Iterable[str] = ()) -> "PhotoIds":
        """Read a run's items.

        `failed` are content keys without an embedding. `bad_items` are ids of listings without one.
        """
        keys, ids = pa.array(list(failed), pa.string()), pa.array(list(bad_items), pa.string())
        listings, with_photo, named = [], [], 0
        for table in read_items(item_files, ["item_id", "image_key", "image_defect"]):
            key = table["image_key"]
            has = pc.and_(pc.is_valid(key), pc.invert(pc.or_(pc.is_in(key, keys), pc.is_in(table["item_id"], ids))))
            listings.append(stable_hash(table["item_id"]))
            with_photo.append(listings[-1][has.to_numpy()])
            named += pc.sum(pc.or_(pc.is_valid(key), pc.is_valid(table["image_defect"]))).as_py() or 0
        empty = np.zeros(0, dtype=np.uint64)
        return cls(
            np.unique(np.concatenate([empty, *listings])), np.unique(np.concatenate([empty, *with_photo])), named
        )

    @classmethod
    def of_run(cls, manifest: Manifest | None) -> "PhotoIds":
        """Read the photo ids of a published run.

        There are none where there is no run.
        """
        if manifest is None:
            return cls.of_items([], [])
        bad = [key.removeprefix("catalog:") for path in manifest.paths("defects") for key in _defect_keys(path)]
        return cls.of_items(manifest.paths("items"), [], bad)


def _defect_keys(path: str) -> list[str]:
    with files.open_read(path) as handle:
        return list(pq.read_table(handle, columns=["key"])["key"].to_pylist())


def check_photos(
    options: EmbedOptions, latest: Manifest | None, now: PhotoIds, defects: list[FileRecord]
) -> list[Gate]:
    """Hold tonight's photos against those of the published run.

    There is no gate where no listing of tonight had one.

    Raises:
        InputError: none had one before, listings name photos, and nearly none can be used.
    """
    before = PhotoIds.of_run(latest)
    had = np.intersect1d(before.with_photo, now.listings, assume_unique=True)
    if len(had):
        return [hold_photos(len(np.intersect1d(had, now.with_photo, assume_unique=True)), len(had))]
    # Such a run is published by force only. An earlier camenn, which did not count what is named, published it anyway.
    given_up = latest is not None and "photos_named" in latest.summary and before.lacks_photos
    if now.lacks_photos and not given_up:
        raise InputError(
            f"--image_root {options.image_root}: {len(now.with_photo):,} of {now.named:,} listings that name a "
            "photo have one that can be used. "
            f"The first: {first_defect(defects)} Nothing was published. Give the directory that image_uri is "
            "relative to, "
            "or leave image_uri null to embed titles alone."
        )
    return []


def first_defect(defects: list[FileRecord]) -> str:
    """Return the detail of a run's first defect."""
    for record in defects:
        with files.open_read(record.path) as handle:
            return str(pq.read_table(handle, columns=["detail"])["detail"][0])
    return ""


def check_image_root(options: EmbedOptions, source: Source) -> None:
    """Stop where photos are sought in a missing directory.

    Raises:
        InputError: with the first address that is relative to it. A catalog without any does not
            need the directory.
    """
    root = options.image_root
    if not files.is_local(root) or os.path.isdir(root):
        return
    names = ["image_uri", "image_bytes"]
    contract = replace(CATALOG, columns=tuple(c for c in CATALOG.columns if c.name in names), extra_columns=False)
    for where in list_slices(source):
        photos = read_slice(where, contract, names)
        uris = photos["image_uri"].filter(pc.is_null(photos["image_bytes"])).drop_null()
        relative = uris.filter(pc.invert(pc.match_substring_regex(uris, r"^(\s*$|/|[A-Za-z][A-Za-z0-9+.-]*:)")))
        if len(relative):
            raise InputError(
                f"--image_root {root}: no such directory, and {where.file}: column 'image_uri' has addresses that "
                "are relative to it "
                f"('{relative[0]}' is the first). Mount it, or give the directory that holds the photos (default: "
                "--data)."
            )
