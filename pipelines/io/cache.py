"""Keep copies of objects on this machine's disk.

Copied is what is mapped into memory, and what is read several times.

CACHE/objects/OUTPUT/...     files of an output, under their names in it
CACHE/inputs/NAME.parquet    files of the user's tables, one for each version
CACHE/scratch/RUN/           spilled partitions of a job on this machine

CACHE is `CAMENN_CACHE`, or ~/.cache/camenn. Only objects that never change are copied: a name in an
output has one content for ever, which a checksum proves, and a name in `inputs` includes the version.
What was not used for the longest time is removed where all copies together take more than
`CAMENN_CACHE_GB`, but nothing of the last day, and nothing of an output that a process is reading.
"""

import contextlib
import errno
import fcntl
import functools
import hashlib
import os
import shutil
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, Protocol

from camenn_model.integrity import DamagedError, cache_directory, check_file
from pipelines.io import files, objects
from pipelines.io.object_client import PART
from schemas.errors import InputError

LIMIT_GB = 100.0
"""Most bytes of all copies / 10^9, and half of the disk, unless `CAMENN_CACHE_GB` says otherwise"""
IN_USE_S = 86_400.0
"""Seconds since its last use in which a copy is never removed"""
PIECE = 4 * 2**20
"""Bytes that a request downloads"""
PIECES = 4
"""Pieces in memory at once"""
LOCKS = 256
IN_USE = ".in-use"
"""File in an output's directory that its readers lock shared for as long as they live"""
USED = ".used"
"""Ending of the empty file beside a copy, whose time is the copy's last use"""


class Listed(Protocol):
    """A file as a manifest lists it."""

    @property
    def path(self) -> str:
        """Return its path."""

    @property
    def bytes(self) -> int:
        """Return its size."""

    @property
    def sha256(self) -> str:
        """Return its checksum, or '' where none is known."""


def copy_root(root: str) -> str:
    """Return the local directory that stands for an output.

    It is the output itself on a local disk, and the directory of its copies otherwise.
    """
    if files.is_local(root):
        return root
    name = f"{objects.endpoint(root)} {root.rstrip('/')}"
    return str(cache_directory() / "objects" / hashlib.sha256(name.encode()).hexdigest()[:16])


def copy_path(root: str, path: str) -> str:
    """Return the path of a file's local copy.

    It may not be there yet.

    Raises:
        DamagedError: the path is not below the root. A manifest that says so was not written by
            camenn.
    """
    if files.is_local(path):
        return path
    inner = path.removeprefix(f"{root.rstrip('/')}/")
    if inner == path or any(part in ("", ".", "..") for part in inner.split("/")):
        raise DamagedError(f"{path}: is not in {root}, whose manifest names it. Publish another run.")
    return os.path.join(copy_root(root), *inner.split("/"))


def local_copies(root: str, listed: Iterable[Listed], remedy: str) -> list[str]:
    """Return local paths of an output's files.

    They come in the same order. Files on a local disk are those of the output: whoever opens it
    checks them. Others are downloaded, unless they are here already, and are what their manifest
    says.

    Raises:
        DamagedError: one is gone, or has other bytes than were written.
    """
    wanted = list(listed)
    if files.is_local(root):
        return [entry.path for entry in wanted]
    _forget_unused()
    _hold(Path(copy_root(root)))
    # Small files are downloaded at once, of a large one its pieces are.
    small = [entry for entry in wanted if entry.bytes <= PIECE]
    with ThreadPoolExecutor(objects.THREADS) as pool:
        list(pool.map(lambda entry: _copy(root, entry, remedy), small))
    for entry in wanted:
        if entry.bytes > PIECE:
            _copy(root, entry, remedy)
    return [copy_path(root, entry.path) for entry in wanted]


def _copy(root: str, entry: Listed, remedy: str) -> None:
    target = copy_path(root, entry.path)
    if _is_here(target, entry, remedy):
        return
    with _locked(target):
        # Another process may have downloaded it meanwhile.
        if _is_here(target, entry, remedy):
            return
        try:
            with _new_file(target) as handle:
                digest = _download(entry.path, entry.bytes, handle)
                if entry.sha256 and digest != entry.sha256:
                    raise DamagedError(
                        f"{entry.path}: its bytes are not those that were written (SHA-256 differs). {remedy}"
                    )
        except FileNotFoundError as error:
            raise DamagedError(
                f"{entry.path}: this file is gone (`camenn gc` removed it, or it was lost). {remedy}"
            ) from error
        _use(target)


def _is_here(target: str, entry: Listed, remedy: str) -> bool:
    if not os.path.exists(target):
        return False
    # First: what is in use is not forgotten while its bytes are read.
    _use(target)
    try:
        check_file(target, entry.bytes, entry.sha256, remedy)
    except (DamagedError, FileNotFoundError):
        # A copy is no one's only one: it is made again.
        return False
    return True


def _download(path: str, size: int, handle: BinaryIO, token: str | None = None) -> str:
    """Download an object in pieces.

    Returns the SHA-256 of its bytes.

    Raises:
        DamagedError: it has another size.
    """
    digest = hashlib.sha256()
    edges = [(start, min(start + PIECE, size)) for start in range(0, size, PIECE)]
    if token is None:
        found = objects.stat(path)
        if found.bytes != size:
            raise DamagedError(f"{path}: has {found.bytes:,} bytes, {size:,} were written. Publish another run.")
        token = found.token
    for number in range(0, len(edges), PIECES):
        for piece in objects.read(path, edges[number : number + PIECES], token):
            digest.update(piece)
            handle.write(piece)
    return digest.hexdigest()


@contextlib.contextmanager
def _explained(target: str) -> Iterator[None]:
    """Report that the cache cannot be written to."""
    try:
        yield
    except OSError as error:
        if str(error.filename).startswith(str(cache_directory())) or error.errno == errno.ENOSPC:
            raise InputError(
                f"{target}: the copy of an object cannot be written here ({error.strerror}). Let CAMENN_CACHE name a "
                "directory with room for it."
            ) from error
        raise


@contextlib.contextmanager
def _new_file(target: str, *, durable: bool = False) -> Iterator[BinaryIO]:
    """Yield a file that appears when the block ends well.

    `durable`: its bytes are on the disk before its name is. What has a checksum needs no wait.
    """
    temporary = f"{target}.{uuid.uuid4().hex}.tmp"
    try:
        with _explained(target):
            os.makedirs(os.path.dirname(target), mode=0o700, exist_ok=True)
            with open(temporary, "wb") as handle:
                yield handle
                if durable:
                    handle.flush()
                    os.fsync(handle.fileno())
            os.replace(temporary, target)
    finally:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.remove(temporary)


@contextlib.contextmanager
def _locked(target: str) -> Iterator[None]:
    """Hold a copy for one process of this machine."""
    number = int(hashlib.sha256(target.encode()).hexdigest(), 16) % LOCKS
    directory = cache_directory() / "locks"
    with contextlib.ExitStack() as stack:
        with _explained(target):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            handle = stack.enter_context(open(directory / f"{number}.lock", "w"))
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def copy_document(root: str, path: str) -> None:
    """Copy a small document of an output again."""
    (data,) = objects.read(path)
    with _new_file(copy_path(root, path)) as handle:
        handle.write(data)


class Uploads:
    """Uploads that go on while more is written.

    One is sent at a time, and one more may wait. Leaving the context waits for all of them.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="uploads")
        self._sending: deque[Future[None]] = deque()
        self._temporary: list[str] = []

    def __enter__(self) -> "Uploads":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            self._thread.shutdown(cancel_futures=True)
            for left in self._temporary:
                with contextlib.suppress(FileNotFoundError):
                    os.remove(left)

    def add(self, temporary: str, path: str, target: str) -> None:
        """Upload a temporary file, and then give it its name."""
        self._temporary.append(temporary)
        while len(self._sending) > 1:
            self._sending.popleft().result()
        self._sending.append(self._thread.submit(_send, temporary, path, target))

    def wait(self) -> None:
        """Wait for all.

        Raises:
            InputError, OSError: one failed. It left neither object nor copy.
        """
        while self._sending:
            self._sending.popleft().result()


def _send(temporary: str, path: str, target: str) -> None:
    try:
        with _explained(target):
            upload_file(temporary, path)
            os.replace(temporary, target)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)
    _use(target)


@contextlib.contextmanager
def write_through(root: str, path: str, uploads: Uploads | None = None) -> Iterator[files.Sink]:
    """Yield a sink to a file, and keep a copy.

    On an object store it is written here first, and uploaded when the block ends without an error:
    by `uploads`, if they are given.
    """
    if files.is_local(path):
        with files.atomic_write(path) as sink:
            yield sink
        return
    target = copy_path(root, path)
    temporary = f"{target}.{uuid.uuid4().hex}.tmp"
    with _new_file(temporary) as handle:
        yield files.Sink(handle)
    if uploads is None:
        _send(temporary, path, target)
    else:
        uploads.add(temporary, path, target)


def keep_copy(local: str, root: str, path: str) -> None:
    """Move a local file to where its object's copy belongs."""
    target = copy_path(root, path)
    with _explained(target):
        os.makedirs(os.path.dirname(target), mode=0o700, exist_ok=True)
        shutil.move(local, target)
    _use(target)


def upload_file(local: str, path: str) -> None:
    """Upload a local file to an object."""
    with open(local, "rb") as handle, objects.upload(path) as upload:
        # Whole parts, which are sent as they are.
        while piece := handle.read(PART):
            upload.write(piece)


def download_file(path: str, local: str) -> None:
    """Download an object that may change to a local file."""
    found = objects.stat(path)
    with _new_file(local) as handle:
        _download(path, found.bytes, handle, found.token)


# --- the user's tables


def _input_path(path: str, size: int, version: str) -> str:
    name = f"{objects.endpoint(path)} {path} {version} {size}"
    return str(cache_directory() / "inputs" / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.parquet")


def keep_inputs(found: Sequence[files.Found]) -> None:
    """Download the files of a user's table.

    `open_input` then opens the copies. Files are not copied where they would take more than half of
    the limit: those are read by ranges.
    """
    remote = [file for file in found if not files.is_local(file.path)]
    if not remote or sum(file.bytes for file in remote) > _limit() / 2:
        return
    _forget_unused()
    for file in remote:
        target = _input_path(file.path, file.bytes, file.version)
        _use(target)
        if not _has_size(target, file.bytes):
            with _locked(target):
                if not _has_size(target, file.bytes):
                    with _new_file(target, durable=True) as handle:
                        _download(file.path, file.bytes, handle, file.version)
            _use(target)


def open_input(path: str) -> BinaryIO:
    """Open a file of the user's for reading.

    It is the copy of its present version where `keep_inputs` made one on this machine.
    """
    if files.is_local(path):
        return files.open_read(path)
    found = objects.stat(path)
    target = _input_path(path, found.bytes, found.token)
    if _has_size(target, found.bytes):
        with contextlib.suppress(FileNotFoundError):
            return open(target, "rb")
    return files.open_read(path, found)


def _has_size(target: str, size: int) -> bool:
    try:
        return os.path.getsize(target) == size
    except OSError:
        return False


def scratch_directory(run_directory: str) -> str:
    """Return a local directory for what only one job needs."""
    if files.is_local(run_directory):
        return files.join(run_directory, "shuffle")
    _forget_scratch()
    return str(cache_directory() / "scratch" / f"{run_directory.rpartition('/')[2]}-{uuid.uuid4().hex[:8]}")


# --- forgetting


def _limit() -> float:
    text = os.environ.get("CAMENN_CACHE_GB", "")
    try:
        if not text:
            return min(LIMIT_GB * 1e9, shutil.disk_usage(_existing(cache_directory())).total / 2)
        return float(text) * 1e9
    except ValueError as error:
        raise InputError(f"CAMENN_CACHE_GB={text}: is no number. Give gigabytes, such as 100.") from error


def _existing(directory: Path) -> Path:
    while not directory.exists():
        directory = directory.parent
    return directory


def _use(target: str) -> None:
    # Beside the copy: its own times are part of what says that its checksum was verified.
    with contextlib.suppress(OSError):
        Path(target + USED).touch()


_held: dict[str, BinaryIO] = {}
_guard = threading.Lock()


def _hold(directory: Path) -> None:
    """Keep an output's copies from being forgotten.

    They stay for as long as this process lives. Who reads them opens them again and again by their names.
    """
    with _guard, contextlib.suppress(OSError):
        if str(directory) not in _held:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            handle = open(directory / IN_USE, "ab")  # noqa: SIM115 - the lock lasts as long as it is open
            fcntl.flock(handle, fcntl.LOCK_SH)
            _held[str(directory)] = handle


def _is_free(directory: Path, stack: contextlib.ExitStack) -> bool:
    """Lock an output's copies, unless a process reads them."""
    try:
        handle = stack.enter_context((directory / IN_USE).open("ab"))
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


@functools.cache
def _forget_unused() -> None:
    """Remove the least recently used copies.

    This is done once in a process, before it reads any.
    """
    copies, limit = [], time.time() - IN_USE_S
    for place in ("objects", "inputs"):
        for directory, _, names in os.walk(cache_directory() / place):
            for name in names:
                path = os.path.join(directory, name)
                with contextlib.suppress(OSError):
                    status = os.stat(path)
                    if name.endswith(USED) or name == IN_USE:
                        continue
                    if name.endswith(".tmp"):
                        # What a killed process left.
                        if status.st_mtime < limit:
                            os.remove(path)
                        continue
                    used = os.stat(path + USED).st_mtime if os.path.exists(path + USED) else status.st_mtime
                    copies.append((used, status.st_size, path))
    left = sum(size for _, size, _ in copies)
    free: dict[Path, bool] = {}
    with contextlib.ExitStack() as stack:
        for used, size, path in sorted(copies):
            if left <= _limit() or used > limit:
                return
            kind, name = Path(path).relative_to(cache_directory()).parts[:2]
            output = cache_directory() / kind / name
            if kind == "objects":
                if output not in free:
                    free[output] = _is_free(output, stack)
                if not free[output]:
                    continue
            for gone in (path, path + USED):
                with contextlib.suppress(OSError):
                    os.remove(gone)
            left -= size


@functools.cache
def _forget_scratch() -> None:
    """Remove what killed jobs left."""
    with contextlib.suppress(OSError):
        for entry in os.scandir(cache_directory() / "scratch"):
            if entry.stat().st_mtime < time.time() - 2 * IN_USE_S:
                shutil.rmtree(entry.path, ignore_errors=True)
