"""Checksums of files that camenn wrote.

They are computed as files are written, and compared where they are opened.

A file's SHA-256 stands in the manifest or commit marker that lists it. JSON files that list others
carry a checksum of their own. A large file's checksum is verified once a week on each machine: the
result is cached under `CAMENN_CACHE` by device, inode, size and times, which every change through
the file system alters.
"""

import contextlib
import functools
import hashlib
import json
import os
import time
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from schemas.errors import InputError

CHECKSUM = "checksum"
"""Key of a JSON document's own checksum"""
REMEMBERED_BYTES = 2**20
"""The checksum of smaller files is verified in every run."""
REMEMBERED_S = 7 * 86_400.0
"""After a week a large file's checksum is verified again: disks lose data without reporting it to the file system."""
_BLOCK = 2**20
_THREADS = 4

_whole: set[tuple[tuple[int, ...], str]] = set()
"""(identity, SHA-256) of files that this process found whole"""


class DamagedError(InputError):
    """A file that differs from the one that camenn wrote.

    It is lost, truncated, or has other bytes.
    """


def file_sha256(path: str | Path) -> str:
    """Return the SHA-256 of a local file's bytes.

    It has 64 hex digits.
    """
    digest = hashlib.sha256()
    buffer = bytearray(_BLOCK)
    view = memoryview(buffer)
    with open(path, "rb", buffering=0) as handle:
        while count := handle.readinto(buffer):
            digest.update(view[:count])
    return digest.hexdigest()


def check_file(path: str | Path, size: int, sha256: str, remedy: str) -> None:
    """Check that a local file holds the bytes written.

    Args:
        path: of the file.
        size: bytes according to its manifest or marker.
        sha256: 64 hex digits, or '' where an earlier version of camenn wrote none. Then only the
            size is compared.
        remedy: sentence that says what to run again.

    Raises:
        DamagedError: it is gone, or has another size or other bytes.
    """
    try:
        status = os.stat(path)
    except FileNotFoundError as error:
        raise DamagedError(f"{path}: this file is gone (`camenn gc` removed it, or it was lost). {remedy}") from error
    if status.st_size != size:
        raise DamagedError(f"{path}: has {status.st_size:,} bytes, {size:,} were written. {remedy}")
    if not sha256:
        return
    identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    if (identity, sha256) in _whole:
        return
    memory = _memory_of(identity, sha256) if size >= REMEMBERED_BYTES else None
    if memory is None or not _is_remembered(memory):
        if file_sha256(path) != sha256:
            raise DamagedError(f"{path}: its bytes are not those that were written (SHA-256 differs). {remedy}")
        if memory is not None:
            _remember(memory)
    _whole.add((identity, sha256))


def check_files(entries: Iterable[tuple[str, int, str]], remedy: str) -> None:
    """Check several files, some at a time.

    Each is (path, bytes, SHA-256).

    Raises:
        DamagedError: for the first by order that is not whole, see `check_file`.
    """
    waiting = list(entries)
    if len(waiting) < 2:
        for path, size, sha256 in waiting:
            check_file(path, size, sha256, remedy)
        return
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        # Hashing releases Python's lock.
        for _ in pool.map(lambda entry: check_file(entry[0], entry[1], entry[2], remedy), waiting):
            pass


def cache_directory() -> Path:
    """Return the directory of this machine's cached results."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(os.environ.get("CAMENN_CACHE") or os.path.join(base, "camenn"))


def _memory_of(identity: tuple[int, ...], sha256: str) -> Path:
    name = hashlib.sha256(f"{identity}:{sha256}".encode()).hexdigest()[:32]
    return cache_directory() / "whole" / name


def _is_remembered(memory: Path) -> bool:
    try:
        age = time.time() - memory.stat().st_mtime
    except OSError:
        return False
    # A clock that was set back makes ages negative: then the cache is ignored.
    return 0 <= age < REMEMBERED_S


def _remember(memory: Path) -> None:
    # Without a cache directory, files are read again: slower, never wrong.
    with contextlib.suppress(OSError):
        memory.parent.mkdir(parents=True, exist_ok=True)
        memory.touch()
        _forget_old(memory.parent)


@functools.cache
def _forget_old(directory: Path) -> None:
    # Once per process.
    now = time.time()
    for entry in os.scandir(directory):
        if now - entry.stat().st_mtime > REMEMBERED_S:
            os.remove(entry.path)


# --- JSON documents


def document_checksum(value: dict[str, Any]) -> str:
    """Return the checksum of a JSON object without its own.

    It has 64 hex digits over the object's canonical text.
    """
    plain = {name: inner for name, inner in json.loads(json.dumps(value)).items() if name != CHECKSUM}
    return hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def dump_document(value: dict[str, Any]) -> bytes:
    """Return a JSON object as text with its own checksum."""
    return json.dumps(value | {CHECKSUM: document_checksum(value)}, indent=1, sort_keys=True).encode() + b"\n"


def parse_document(data: bytes, path: str | Path, fields: Collection[str], remedy: str) -> dict[str, Any]:
    """Parse a JSON object and check its own checksum.

    The checksum is left out of what is returned.

    Args:
        data: the file's contents.
        path: of the file, for the message.
        fields: every key that such a document may have. Older documents have no checksum, and are
            recognized by their keys.
        remedy: sentence that says what to do.

    Raises:
        DamagedError: it is no JSON object, has another key, or differs from what was written.
    """
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        fault = "it is empty" if not data.strip() else f"it is not JSON ({type(error).__name__})"
        raise DamagedError(f"{path}: {fault}: it was cut off or damaged. {remedy}") from error
    if not isinstance(value, dict):
        raise DamagedError(f"{path}: holds a {type(value).__name__} instead of an object. {remedy}")
    other = sorted(value.keys() - set(fields) - {CHECKSUM})
    if other:
        raise DamagedError(f"{path}: key '{other[0]}' does not belong there: it was damaged or changed. {remedy}")
    if CHECKSUM in value and value[CHECKSUM] != document_checksum(value):
        raise DamagedError(f"{path}: its text is not what was written (its checksum differs). {remedy}")
    value.pop(CHECKSUM, None)
    return value
