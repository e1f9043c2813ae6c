"""Read and write files, here or in an object store.

Local paths, gs:// and s3:// are treated the same: pipelines/io/objects.py has the latter two. Every
write is atomic: a unique temporary name, then the final one.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq
from apache_beam.io.filesystems import FileSystems

from camenn_model.integrity import dump_document, parse_document
from pipelines.io import clock, lease, objects
from pipelines.io.errors import reading
from pipelines.io.lease import InUseError as InUseError
from pipelines.io.lease import LockedWriter, Writer
from pipelines.io.object_client import PART, ChangedError, Stat
from schemas.errors import InputError


def join(*parts: str) -> str:
    """Join path parts.

    Parts of an object's name are joined by one slash.
    """
    return os.path.join(*parts) if is_local(parts[0]) else "/".join([parts[0].rstrip("/"), *parts[1:]])


def is_local(path: str) -> bool:
    """Return whether `path` is on this machine's own file system."""
    return "://" not in path


def absolute(path: str) -> str:
    """Make a local path absolute.

    Workers run elsewhere. Paths of other file systems stay as they are.
    """
    return os.path.abspath(os.path.expanduser(path)) if is_local(path) else path.rstrip("/")


def exists(path: str) -> bool:
    """Return whether a file or directory exists. An object store has files only."""
    return os.path.exists(path) if is_local(path) else objects.exists(path)


def has_folder(path: str) -> bool:
    """Return whether a directory exists. In an object store, any object below it counts."""
    if is_local(path):
        return os.path.exists(path)
    return next(objects.list_objects(f"{path.rstrip('/')}/"), None) is not None


def open_read(path: str, found: Stat | None = None) -> BinaryIO:
    """Open a file for reading bytes as they are.

    A .gz stays compressed. Of an object, exactly the ranges that are read are downloaded. `found`:
    what a listing said of it, which saves a request.
    """
    return open(path, "rb") if is_local(path) else cast(BinaryIO, objects.open_read(path, found))


def read_json(path: str) -> Any:
    """Parse one JSON file.

    Raises:
        InputError: it cannot be read, or is not JSON.
    """
    with reading(path, "not JSON", remedy="Write it again, or remove it."), open_read(path) as handle:
        return json.loads(handle.read())


@dataclass(frozen=True)
class Found:
    """A file that is there."""

    path: str
    bytes: int
    written_at: float
    """Seconds since 1970, UTC"""
    version: str = ""
    """Of an object: changes whenever other bytes are written"""


def match(directory: str, pattern: str) -> list[Found]:
    """List the files below a directory whose paths match.

    They come in no order. `*` matches no slash, `**` does. The directory's name is taken literally,
    even with any of `[*?` in it.
    """
    if not is_local(directory):
        return [_found(found) for found in objects.match(directory, pattern)]
    return [
        Found(file.path, file.size_in_bytes, file.last_updated_in_seconds)
        for result in FileSystems.match([join(_literal(directory), pattern)])
        for file in result.metadata_list
    ]


def find(paths: Iterable[str]) -> list[Found]:
    """Find the files among some paths that exist.

    Their names are taken literally.
    """
    found, remote = [], []
    for path in paths:
        if not is_local(path):
            remote.append(path)
        elif os.path.isfile(path):
            status = os.stat(path)
            found.append(Found(path, status.st_size, status.st_mtime))
    return found + [_found(stat) for stat in objects.stat_all(remote)]


def _found(stat: Stat) -> Found:
    return Found(stat.path, stat.bytes, stat.written_at, stat.token)


def _literal(path: str) -> str:
    """Return a pattern that matches this path alone.

    Beam has no quoting, but character sets, so a special character becomes a set of one. `[` may
    not begin a set, and no path has a backslash before it.
    """
    return re.sub(r"[*?[]", lambda found: r"[\[]" if found[0] == "[" else f"[{found[0]}]", path)


def make_directory(path: str) -> None:
    """Create a local directory and its parents.

    Object stores need none.
    """
    if is_local(path):
        os.makedirs(path, exist_ok=True)


def delete_directory(path: str) -> None:
    """Remove a directory with all that is in it.

    Object stores know names only. There, a trailing slash means all names with that prefix.
    """
    if is_local(path):
        shutil.rmtree(path)
    else:
        objects.delete(found.path for found in objects.list_objects(f"{path.rstrip('/')}/"))


def delete(paths: Sequence[str]) -> None:
    """Remove files. Objects that are gone already are no error."""
    for path in filter(is_local, paths):
        os.remove(path)
    objects.delete(path for path in paths if not is_local(path))


def delete_any(paths: Sequence[str]) -> None:
    """Remove those files among some paths that are there."""
    delete([path for path in paths if not is_local(path) or os.path.exists(path)])


def move(source: str, target: str) -> None:
    """Give a file another name, in the same place.

    An object has no other name: it is copied, piece by piece, and then removed.
    """
    if is_local(source):
        os.replace(source, target)
        return
    with open_read(source) as handle, objects.upload(target) as upload:
        while piece := handle.read(PART):
            upload.write(piece)
    objects.delete([source])


@dataclass(frozen=True)
class Written:
    """The size and checksum of a finished file.

    They are its size in bytes and the SHA-256 of them, 64 hex digits.
    """

    bytes: int
    sha256: str


class Sink:
    """A binary handle that computes a checksum while writing.

    The checksum covers everything written through it, from the first byte to the last.
    """

    closed = False

    def __init__(self, handle: BinaryIO) -> None:
        self._handle = handle
        self._digest = hashlib.sha256()
        self._bytes = 0

    def write(self, data: Any) -> int:
        """Write bytes and return how many."""
        self._digest.update(data)
        self._bytes += memoryview(data).nbytes
        return self._handle.write(data)

    def tell(self) -> int:
        """Return the bytes written so far."""
        return self._bytes

    def flush(self) -> None:
        """Hand everything to the file system."""
        self._handle.flush()

    def close(self) -> None:
        """Do nothing.

        The opener of the file closes it (Arrow closes every handle that it is given).
        """

    def readable(self) -> bool:
        """Return False: nothing is read."""
        return False

    def writable(self) -> bool:
        """Return True: bytes are written."""
        return True

    def seekable(self) -> bool:
        """Return False: bytes are written in order."""
        return False

    @property
    def written(self) -> Written:
        """Return size and checksum of all that was written."""
        return Written(self._bytes, self._digest.hexdigest())


@contextlib.contextmanager
def atomic_write(path: str, *, durable: bool = False, new: bool = False) -> Iterator[Sink]:
    """Yield a sink to a file that appears atomically.

    `path` appears when the block ends without an error.

    On object stores an object appears only when it is complete, so it is written under its own name
    at once: a rename would copy it.

    Args:
        path: of the file.
        durable: whether it must outlast a power cut from the moment that it appears. It costs a
            wait for the disk.
        new: whether a local file that is there is an error, and stays.
    """
    if not is_local(path):
        with objects.upload(path) as upload:
            yield Sink(cast(BinaryIO, upload))
        return
    directory = os.path.dirname(path) or os.curdir
    make_directory(directory)
    temporary = f"{path}.{uuid.uuid4().hex}.tmp"
    try:
        with open(temporary, "wb") as handle:
            yield Sink(handle)
            if durable:
                handle.flush()
                _sync(handle.fileno())
        if new:
            _link(temporary, path)
        else:
            os.replace(temporary, path)
        if durable:
            sync_directory(directory)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def _link(temporary: str, path: str) -> None:
    """Give a file its final name, unless something has it."""
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
            raise
        # No hard links (FAT, some network file systems): the output's lock has to do.
        if os.path.exists(path):
            raise FileExistsError(errno.EEXIST, "is there already", path) from error
        os.replace(temporary, path)


_FULL_SYNC: int | None = getattr(fcntl, "F_FULLFSYNC", None)
"""macOS: fsync alone leaves bytes in the drive's own memory"""


def _sync(descriptor: int) -> None:
    if _FULL_SYNC is not None:
        fcntl.fcntl(descriptor, _FULL_SYNC)
    else:
        os.fsync(descriptor)


def sync_file(path: str) -> None:
    """Wait until a local file's bytes are on the disk.

    Any process may have written them.
    """
    if not is_local(path):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        _sync(descriptor)
    finally:
        os.close(descriptor)


def sync_directory(path: str) -> None:
    """Wait until a local directory's names are on the disk.

    Syncing a new file's bytes does not sync its name.
    """
    if not is_local(path):
        return
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot sync a directory, and need not: a name is on the server once it is created.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def sync_tree(root: str, paths: Iterable[str]) -> None:
    """Wait until local files below `root` are on disk.

    It waits for all names on the way to them as well.
    """
    if not is_local(root):
        return
    directories = {root}
    for path in paths:
        sync_file(path)
        directory = os.path.dirname(path)
        while directory.startswith(root) and directory not in directories:
            directories.add(directory)
            directory = os.path.dirname(directory)
    # Deepest first: a name is useless before the file that it names is on disk.
    for directory in sorted(directories, key=len, reverse=True):
        sync_directory(directory)


def write_json(path: str, value: Any) -> None:
    """Write one JSON file atomically."""
    with atomic_write(path) as handle:
        handle.write(json.dumps(value, indent=1, sort_keys=True).encode() + b"\n")


def write_document(path: str, value: dict[str, Any], *, durable: bool = False) -> None:
    """Write a JSON object with its checksum, atomically.

    `read_document` reads it.
    """
    with atomic_write(path, durable=durable) as handle:
        handle.write(dump_document(value))


def create_document(path: str, value: dict[str, Any]) -> None:
    """Write a JSON object with its checksum, durably, unless something is there.

    Of any number of writers at once one succeeds.

    Raises:
        FileExistsError: something is there. It stays as it is.
    """
    if is_local(path):
        with atomic_write(path, durable=True, new=True) as handle:
            handle.write(dump_document(value))
        return
    try:
        objects.put_if(path, dump_document(value))
    except ChangedError as error:
        raise FileExistsError(errno.EEXIST, "is there already", path) from error


def read_document(path: str, fields: Collection[str], remedy: str) -> dict[str, Any]:
    """Read a JSON object that `write_document` wrote.

    Args:
        path: of the file.
        fields: every key that it may have.
        remedy: sentence of the message with what to do where the file cannot be used.

    Raises:
        DamagedError: it is not what was written.
    """
    if not is_local(path):
        # By one request: `latest.json` may be replaced between two.
        return parse_document(objects.read(path)[0], path, fields, remedy)
    with open_read(path) as handle:
        return parse_document(handle.read(), path, fields, remedy)


def read_document_if_there(path: str, fields: Collection[str], remedy: str) -> dict[str, Any] | None:
    """Read a JSON object, or return None.

    It is read as `read_document` does. None = there is no such file.
    """
    if is_local(path) and not os.path.exists(path):
        return None
    try:
        return read_document(path, fields, remedy)
    except FileNotFoundError:
        # Of an object, asking first would be a second request.
        return None


def write_parquet(path: str, table: pa.Table, *, row_group_size: int = 65_536, durable: bool = False) -> Written:
    """Write a table to a Parquet file atomically.

    It has zstd, dictionary-encoded strings and a checksum for every page.
    """
    with atomic_write(path, durable=durable) as handle:
        pq.write_table(table, handle, compression="zstd", row_group_size=row_group_size, write_page_checksum=True)
    return handle.written


def has_table(path: str) -> bool:
    """Return whether a table is there, readable or not.

    It is there as `path`.parquet or as a directory `path`.
    """
    names = (f"{path}.parquet", path)
    if is_local(path):
        return any(map(os.path.lexists, names))
    return exists(names[0]) or has_folder(path)


def list_parquet(path: str, table: str) -> list[str]:
    """List a table's Parquet files as `find_parquet` does."""
    return [file.path for file in find_parquet(path, table)]


def find_parquet(path: str, table: str) -> list[Found]:
    """Find the Parquet files of a table, sorted by name.

    It is given as `DIR/table.parquet`, a directory `DIR/table` of Parquet files, or a file itself.

    Below the table's own directory, names that begin with `_` or `.` are skipped: see `is_hidden`.

    Raises:
        InputError: the table does not exist (the message names both places that were tried), or
            cannot be opened.
    """
    names = [path] if path.endswith(".parquet") else [f"{path}.parquet", path]
    # A directory of the table's name takes precedence over a file.
    names.sort(key=lambda name: name != path or not (is_local(name) and os.path.isdir(name)))
    for name in names:
        with reading(name, f"table '{table}' cannot be listed", remedy="Look at its files."):
            # Spark and others write a directory under the name of a file.
            found = find(_list_local(name, table)) if is_local(name) else _list_remote(name)
        if found:
            return sorted(found, key=lambda file: file.path)
    empty = [name for name in names if is_local(name) and os.path.isdir(name)]
    note = f" ({empty[0]} is a directory without any; names that begin with _ or . do not count)" if empty else ""
    raise InputError(
        f"table '{table}' is missing: neither {path}.parquet nor a directory {path}/ with "
        f".parquet files exists{note}. Put it there."
    )


def is_hidden(name: str) -> bool:
    """Return whether a name is outside a table's data.

    Writers keep such files in a table's directory while they write, or as metadata: `_temporary`,
    `.spark-staging-1`, `_delta_log`. The rule is Spark's
    (InMemoryFileIndex.shouldFilterOutPathName): `_x=1`, a partition by a column `_x`, is data.
    """
    return name.startswith(".") or (name.startswith("_") and "=" not in name) or name.endswith("._COPYING_")


def _list_remote(name: str) -> list[Found]:
    # Object stores list every name that has the given directory's name as a prefix.
    below = len(name.rstrip("/")) + 1
    found = find([name]) if name.endswith(".parquet") else []
    return [
        file for file in found or match(name, "**.parquet") if not any(map(is_hidden, file.path[below:].split("/")))
    ]


def _list_local(name: str, table: str) -> list[str]:
    if os.path.isdir(name):
        found = list(_walk(name, table, frozenset()))
    elif os.path.lexists(name):
        found = [_plain_file(name, table)]
    else:
        # Whether a path exists is unknown where it may not be read.
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.stat(name)
        found = []
    for path in found:
        if not _is_utf8(path):
            shown = os.fsencode(path).decode(errors="backslashreplace")
            raise InputError(f"{shown}: table '{table}': the file's path is not UTF-8. Give it another name.")
    return found


def _walk(directory: str, table: str, above: frozenset[str]) -> Iterator[str]:
    """List the Parquet files below a directory.

    Beam's listing would silently leave out unreadable files and the targets of links.
    """
    real = os.path.realpath(directory)
    if real in above:
        raise InputError(f"{directory}: table '{table}': a symbolic link leads back to {real}. Remove it.")
    with os.scandir(directory) as entries:
        for entry in entries:
            if is_hidden(entry.name):
                continue
            if entry.is_dir():
                yield from _walk(entry.path, table, above | {real})
            elif entry.name.endswith(".parquet"):
                yield _plain_file(entry.path, table)


def _plain_file(path: str, table: str) -> str:
    if not os.path.isfile(path):
        wrong = f"a symbolic link to {os.readlink(path)}, where nothing is" if os.path.islink(path) else "no plain file"
        raise InputError(f"{path}: table '{table}': is {wrong}. Put the file there, or remove it.")
    return path


def _is_utf8(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def fingerprint(found: Iterable[Found]) -> str:
    """Hash names, sizes and versions of files.

    The 16 hex digits change when any of them does. A local file's version is its modification time.
    """
    lines = [f"{file.path}:{file.bytes}:{file.version or file.written_at}" for file in found]
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()[:16]


LOCK = ".lock"
"""Name of the file in an output that a writer holds locked"""


@contextlib.contextmanager
def single_writer(root: str) -> Iterator[Writer]:
    """Hold the output root for one writer.

    On a local disk a lock of the system does, on an object store a lease (pipelines/io/lease.py).
    A lease can be lost: `check` what is yielded before anything is removed or published.

    Raises:
        InUseError: another process writes there now.
        InputError: nothing can be written there, or its file system has no locks, or the store no
            conditional writes.
    """
    if not is_local(root):
        with lease.hold(root) as held:
            yield held
        return
    try:
        make_directory(root)
        handle = open(os.path.join(root, LOCK), "w")  # noqa: SIM115 - closed below, after the lock is released
    except OSError as error:
        raise InputError(
            f"{root}: cannot be written to ({error.strerror}). Give another output, or fix its permissions."
        ) from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InUseError(
                f"{root}: another camenn process is writing there. Wait for it to end, or choose another output."
            ) from error
        except OSError as error:
            raise InputError(
                f"{root}: its file system has no locks ({error.strerror}), and two runs at once would harm each other. "
                "Mount it with locks (NFS 4, or without `nolock`), or give an output on another disk."
            ) from error
        yield LockedWriter()


READING = ".reading"
"""Name of the file in an output that readers lock shared, and `camenn gc` locks exclusively"""


@contextlib.contextmanager
def shared_reader(*roots: str) -> Iterator[None]:
    """Keep `camenn gc` off some outputs while reading.

    It removes none of their files while the block runs.

    An output that cannot be written to is read without a lock: this user cannot remove anything
    from it either.
    """
    with contextlib.ExitStack() as stack:
        for root in filter(is_local, roots):
            with contextlib.suppress(OSError):
                handle = stack.enter_context(open(os.path.join(root, READING), "a"))
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        yield


@contextlib.contextmanager
def no_readers(root: str) -> Iterator[None]:
    """Hold an output while nobody reads it.

    Raises:
        InUseError: a command is reading it.
    """
    if not is_local(root):
        yield
        return
    with open(os.path.join(root, READING), "a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InUseError(f"{root}: another camenn process is reading it. Wait for it to end.") from error
        yield


OWN = ".camenn"
"""Name of the record in a directory that camenn made"""


def mark_own(directory: str, *, new: bool = False) -> None:
    """Record in a directory that camenn made it.

    `camenn gc` removes nothing from other directories. A `new` one has no record yet.
    """
    path = join(directory, OWN)
    if new or not exists(path):
        write_document(path, {"made_at": clock.utc_stamp()})


def is_own(directory: str) -> bool:
    """Return whether a directory records that camenn made it."""
    return exists(join(directory, OWN))


def ipc_bytes(table: pa.Table, compression: str = "lz4") -> bytes:
    """Write a table as an Arrow IPC stream.

    Tables travel through a shuffle in this form.
    """
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def ipc_table(data: bytes) -> pa.Table:
    """Read the table of an Arrow IPC stream."""
    return pa.ipc.open_stream(data).read_all()


def output_place(path: str, flag: str) -> str:
    """Return an output's absolute path, or its address.

    Raises:
        InputError: it is an address that is not read, or whose library is not installed.
    """
    if is_local(path):
        return os.path.abspath(path)
    scheme = path.partition("://")[0]
    if not objects.is_object(path):
        raise InputError(f"{flag} {path}: '{scheme}' addresses are not written. Give a directory, gs:// or s3://.")
    lacking = objects.missing_library(scheme)
    if lacking:
        raise InputError(f"{flag} {path}: {lacking}")
    objects.split(path)
    return path.rstrip("/")
