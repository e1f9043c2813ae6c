"""Keep a path of the published scores that never changes.

Readers open `OUT/published/scores` and `OUT/published/listing_quality`, whichever run is published,
with the same words on all file systems:

* On a local disk it is a symbolic link to the table's directory in the published run. A new link
  replaces it atomically.
* On an object store it is one object, `OUT/published/scores/scores.parquet`, a copy of the table
  that is replaced whole. Its key-value metadata name the run.

`latest.json` alone says what is published. This follows it, and a run that finds it behind brings
it up to date.
"""

import errno
import os
import re
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.io import files, objects
from pipelines.io.tables import open_parquet
from pipelines.runner.log import stage_logger
from pipelines.runs.manifest import Manifest, read_latest
from schemas.errors import InputError
from schemas.manifest import PUBLISHED, RUNS

TABLES = {"score": ("scores", "listing_quality")}
"""Stage -> its tables that have such a path"""
RUN_KEY = b"camenn.run"
"""Key of the run's name in the metadata of the object"""
_OURS = re.compile(r"part-[0-9a-f]{32}\.parquet")
_COPIED = re.compile(r"([^/=]+=[^/]+/)?part-(\d+|[0-9a-f]{32})\.parquet")
"""What lies in the table's directory of a run"""
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS)


def reader_paths(root: str, stage: str) -> dict[str, str]:
    """Return the paths for readers by table.

    There are none for a stage whose tables only camenn reads.
    """
    return {table: files.join(root, PUBLISHED, table) for table in TABLES.get(stage, ())}


def run_at(path: str) -> str | None:
    """Return the run that readers find at a path.

    It is None where nothing is there, and '' where something is that names no run.
    """
    table = path.rpartition("/")[2]
    if files.is_local(path):
        if not os.path.islink(path):
            return "" if os.path.lexists(path) else None
        found = re.fullmatch(rf"\.\./{RUNS}/([^/]+)/{re.escape(table)}", os.readlink(path))
        return found[1] if found and os.path.isdir(path) else ""
    there = {found.path: found for found in objects.list_objects(f"{path}/")}
    stat = there.get(_object(path))
    if stat is None:
        return "" if there else None
    try:
        with objects.open_read(stat.path, stat) as handle:
            run = (pq.read_metadata(handle).metadata or {}).get(RUN_KEY, b"").decode()
    except (pa.ArrowException, UnicodeDecodeError):
        return ""
    return "" if any(_is_copy(path, name) for name in there) else run


def update(root: str, manifest: Manifest) -> list[str]:
    """Let the paths for readers lead to a run.

    It is published already. Returns the paths that changed. Those of the run already are left alone.

    Raises:
        InputError: something that camenn did not write is in the way.
        DamagedError: a file of the run is gone or has another size.
    """
    changed = []
    for table, path in reader_paths(root, manifest.stage).items():
        paths = manifest.listed(table)
        run = run_at(path)
        if run == (manifest.run if paths else None):
            continue
        if files.is_local(path):
            _link(root, path, manifest, paths)
        else:
            manifest.check(table)
            _write(path, manifest, files.join(root, RUNS, manifest.run, table), paths)
        changed.append(path)
    if changed and not files.is_local(root):
        # While it was copied, another process may have taken the output over and published.
        latest = read_latest(root)
        if latest is not None and latest.run != manifest.run:
            changed += update(root, latest)
    return changed


def update_or_warn(root: str, manifest: Manifest) -> None:
    """Bring the paths up to date before a run.

    The publication before it may have been cut off. What cannot be done is logged: the run may be
    what helps.
    """
    try:
        changed = update(root, manifest)
    except (InputError, OSError) as error:
        stage_logger(manifest.stage).warning("readers' paths below %s are not of run %s: %s", root, manifest.run, error)
        return
    for path in changed:
        stage_logger(manifest.stage).warning("%s leads to run %s again, as latest.json does", path, manifest.run)


# --- a local disk


def _link(root: str, path: str, manifest: Manifest, paths: list[str]) -> None:
    _make_room(path)
    if not paths:
        if os.path.islink(path):
            os.remove(path)
        return
    table = os.path.basename(path)
    _drop_unlisted(files.join(root, RUNS, manifest.run, table), set(paths))
    new = files.join(root, PUBLISHED, f".{table}.new")
    if os.path.lexists(new):
        os.remove(new)
    files.make_directory(os.path.dirname(new))
    try:
        os.symlink(f"../{RUNS}/{manifest.run}/{table}", new)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        # Readers then go by latest.json, as `camenn runs` shows.
        stage_logger(manifest.stage).warning("%s: this file system has no symbolic links, so it is not made", path)
        return
    os.replace(new, path)
    files.sync_directory(os.path.dirname(path))


def _make_room(path: str) -> None:
    """Remove a copy of the table.

    It came with a copy of the output. A tool may have followed the link, or have copied the object of an object store.
    """
    if os.path.islink(path) or not os.path.lexists(path):
        return
    names = [found.path.removeprefix(f"{path}/") for found in files.match(path, "**")]
    foreign = [name for name in names if not _COPIED.fullmatch(name) and name != f"{os.path.basename(path)}.parquet"]
    if foreign or not os.path.isdir(path):
        raise InputError(
            f"{files.join(path, *foreign[:1])}: camenn did not write this, and puts the path for readers there. Move "
            "it away, then run `camenn publish` on the run that latest.json names."
        )
    files.delete_directory(path)


def _drop_unlisted(directory: str, listed: set[str]) -> None:
    """Remove what a repeated attempt left in a run.

    The manifest does not name it, but whoever reads the directory would count its rows twice.
    """
    for found in files.match(directory, "**.parquet"):
        if found.path not in listed and _OURS.fullmatch(os.path.basename(found.path)):
            files.delete([found.path])


# --- an object store


def _object(path: str) -> str:
    return f"{path}/{path.rpartition('/')[2]}.parquet"


def _is_copy(path: str, name: str) -> bool:
    """Return whether an object is a file of the table.

    A tool that copied the output here from a local disk followed the link.
    """
    return bool(_COPIED.fullmatch(name.removeprefix(f"{path}/")))


def _write(path: str, manifest: Manifest, directory: str, paths: list[str]) -> None:
    if paths:
        with files.atomic_write(_object(path)) as sink:
            _copy(sink, manifest, directory, paths)
    there = [found.path for found in objects.list_objects(f"{path}/")]
    files.delete([name for name in there if _is_copy(path, name) or (name == _object(path) and not paths)])
    foreign = [name for name in there if name != _object(path) and not _is_copy(path, name)]
    if foreign:
        words = "%s: camenn did not write it, and whoever reads %s/ reads it too. Remove it"
        stage_logger(manifest.stage).warning(words, foreign[0], path)


def _copy(sink: files.Sink, manifest: Manifest, directory: str, paths: list[str]) -> None:
    """Write the rows of some files as one.

    A row group is in memory at a time.
    """
    writer: pq.ParquetWriter | None = None
    for table in _row_groups(directory, paths):
        if writer is None:
            schema = table.schema.with_metadata({**(table.schema.metadata or {}), RUN_KEY: manifest.run.encode()})
            writer = pq.ParquetWriter(sink, schema, compression="zstd", write_page_checksum=True)
        writer.write_table(table)
    if writer is not None:
        writer.close()


def _row_groups(directory: str, paths: list[str]) -> Iterator[pa.Table]:
    """Yield the rows of some files.

    They have the columns that their folders are named after, of the type that pandas gives to
    folders of a local disk. A file without rows yields an empty table.
    """
    for path in paths:
        folders = path.removeprefix(f"{directory}/").split("/")[:-1]
        columns = dict(folder.split("=", 1) for folder in folders)
        with files.open_read(path) as handle:
            parquet = open_parquet(handle)
            for group in range(parquet.num_row_groups):
                yield _with_columns(parquet.read_row_group(group), columns)
            if not parquet.num_row_groups:
                yield _with_columns(parquet.schema_arrow.empty_table(), columns)


def _with_columns(table: pa.Table, columns: dict[str, str]) -> pa.Table:
    for name, value in columns.items():
        first = pa.array(np.zeros(table.num_rows, dtype=np.int32))
        table = table.append_column(name, pa.DictionaryArray.from_arrays(first, pa.array([value])))
    return table
