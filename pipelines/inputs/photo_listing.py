"""List the photos in an object store once.

A look at each listing's photo would be a request each. A listing tells a thousand objects at once,
so the submitter lists the root once, and every worker looks the photos of its buckets up there.
"""

import functools
import io
import itertools
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.inputs.photo_files import object_root
from pipelines.io import files, objects
from pipelines.io.object_client import Stat
from pipelines.runner.log import stage_logger

FILE = "image_root.parquet"
"""In the run's directory, as long as the job takes"""
LEAST_PAGES = 50
"""Pages of a thousand objects that are listed however few listings there are"""
OBJECTS_A_LISTING = 20
"""A root of more objects than that is not listed: workers hold about 100 bytes for each of them"""

_SCHEMA = pa.schema(
    [("name", pa.string()), ("bytes", pa.int64()), ("written_at", pa.float64()), ("token", pa.string())]
)
_BATCH = 65_536
_LOG = stage_logger("embed")
_lock = threading.Lock()


def list_photos(image_root: str, listings: int, directory: str) -> str | None:
    """List a root's objects into a file of `directory`.

    Args:
        image_root: the user's. Nothing is listed where it is local.
        listings: of the catalog.
        directory: that workers can read.

    Returns:
        path of the file. None = each photo is to be looked at by itself: the root is local, may not
        be listed, or has far more objects than the catalog has listings.

    Raises:
        InputError: there is no such bucket.
    """
    if files.is_local(image_root):
        return None
    root = f"{object_root(image_root)}/"
    most = max(LEAST_PAGES * objects.PAGE, OBJECTS_A_LISTING * listings)
    path = files.join(directory, FILE)
    found = itertools.islice(objects.list_objects(root), most + 1)
    rows = 0
    try:
        with files.atomic_write(path) as sink, pq.ParquetWriter(sink, _SCHEMA, compression="zstd") as writer:
            for table in _tables(root, found):
                writer.write_table(table)
                rows += table.num_rows
                if rows > most:
                    raise _TooManyError
    except _TooManyError:
        _LOG.warning(
            "--image_root %s: holds more than %s objects, so each photo is looked at by itself, which takes a "
            "request for each listing. Give the folder that holds the photos alone.",
            image_root,
            f"{most:,}",
        )
        return None
    except PermissionError as error:
        _LOG.warning(
            "--image_root %s: may not be listed (%s), so each photo is looked at by itself, which takes a request "
            "for each listing.",
            image_root,
            error.strerror,
        )
        return None
    return path


class _TooManyError(Exception):
    """A root has more objects than are worth listing."""


def _tables(root: str, found: Iterable[Stat]) -> Iterator[pa.Table]:
    waiting = iter(found)
    while some := list(itertools.islice(waiting, _BATCH)):
        columns = (
            [one.path.removeprefix(root) for one in some],
            [one.bytes for one in some],
            [one.written_at for one in some],
            [one.token for one in some],
        )
        yield pa.table(dict(zip(_SCHEMA.names, columns, strict=True)), schema=_SCHEMA)


@functools.lru_cache(1)
def _read(path: str) -> pa.Table:
    with files.open_read(path) as handle:
        return pq.read_table(io.BytesIO(handle.read())).combine_chunks()


@dataclass(frozen=True)
class PhotoListing:
    """What `list_photos` wrote.

    Args:
        image_root: that was listed.
        path: of the file. None = nothing was listed.
    """

    image_root: str
    path: str | None

    def look(self, paths: Iterable[str]) -> dict[str, Stat | None]:
        """Look photos up in the listing.

        The result has those below its root, and None for what is not there. Paths elsewhere are
        left out. The file is read once for a process.
        """
        if self.path is None:
            return {}
        root = f"{object_root(self.image_root)}/"
        wanted = [path for path in dict.fromkeys(paths) if path.startswith(root)]
        with _lock:
            listed = _read(self.path)
        names = pa.array([path.removeprefix(root) for path in wanted], pa.string())
        rows = listed.take(pc.index_in(names, value_set=listed["name"])).to_pylist()
        return {
            path: None if row["name"] is None else Stat(path, row["bytes"], row["written_at"], row["token"])
            for path, row in zip(wanted, rows, strict=True)
        }
