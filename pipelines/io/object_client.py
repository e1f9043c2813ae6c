"""Shared parts of the object stores' clients."""

import contextlib
import errno
import posixpath
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from schemas.errors import InputError

ATTEMPTS = 8
"""Of one request, before the command gives up"""
FIRST_WAIT, LONGEST_WAIT = 0.25, 8.0
"""Seconds between attempts: doubled each time, half of it by chance. About 24 s in all."""
CONNECT_TIMEOUT, READ_TIMEOUT = 10, 60
"""Seconds"""
SOCKETS = 4
"""Connections of a process to one store, at most: requests beyond them wait"""
PART = 5 * 2**20
"""Bytes of the first parts of an upload. S3 takes parts of at least 5 MiB; gs a multiple of 256 KiB."""
TRANSIENT = frozenset({408, 429, 500, 502, 503, 504})
"""HTTP statuses after which the same request is sent again"""
WRITE_ID = "camenn-write"
"""Metadata of an object that was written on a condition: which write it comes from"""

TYPES = {".html": "text/html; charset=utf-8", ".json": "application/json", ".txt": "text/plain; charset=utf-8"}
"""Ending of a name -> content type, by which a browser shows a report, or a log, instead of saving it"""

T = TypeVar("T")


def content_type(key: str) -> str:
    """Return the content type of an object's name."""
    return TYPES.get(posixpath.splitext(key)[1], "application/octet-stream")


@dataclass(frozen=True)
class Stat:
    """An object that is there."""

    path: str
    bytes: int
    written_at: float
    """Seconds since 1970, UTC, by the store's clock"""
    token: str
    """Changes whenever other bytes are written: an ETag (s3), a generation (gs)"""
    write_id: str = ""
    """See `WRITE_ID`. Listings leave it out."""


CHANGED = "was written by another process meanwhile"


class ChangedError(OSError):
    """An object is not in the state that a write or a read asked for."""

    def __init__(self, path: str) -> None:
        super().__init__(errno.EEXIST, CHANGED, path)


class TransientError(Exception):
    """A request failed in a way that may pass: it is sent again."""


class Upload(Protocol):
    """An upload in parts, which nobody sees before it is finished.

    It repeats failed requests itself: what may be sent again differs between stores.
    """

    threads: int
    """That may send parts at once"""

    def add(self, number: int, part: bytes) -> None:
        """Send one part, of which the first has number 1. All but the last have a multiple of `PART` bytes."""

    def finish(self) -> None:
        """Publish what was sent."""

    def abort(self) -> None:
        """Drop what was sent."""


class Client(Protocol):
    """A store's client: one request a call, errors as this module names them.

    `TransientError` is for `attempt`, around the call. Threads may share a client, processes not.
    """

    scheme: str
    endpoint: str
    """Address that requests go to"""

    def stat(self, bucket: str, key: str) -> Stat:
        """Look at one object."""

    def page(self, bucket: str, prefix: str, most: int, after: str | None) -> tuple[list[Stat], str | None]:
        """List up to `most` objects below a prefix.

        Returned are they, and where the next page begins.
        """

    def read(self, bucket: str, key: str, start: int, stop: int | None, token: str | None) -> bytes:
        """Read bytes `start` to `stop`.

        They are of the version `token`. None = to the end.
        """

    def tail(self, bucket: str, key: str, most: int) -> tuple[Stat, bytes]:
        """Read the last `most` bytes, or all.

        The time of the `Stat` is 0.
        """

    def put(self, bucket: str, key: str, data: bytes, token: str | None, write_id: str) -> str:
        """Write an object.

        `token`: None = whatever is there, '' = nothing, else that version.
        """

    def delete(self, bucket: str, keys: Sequence[str]) -> None:
        """Remove objects, at most 1,000. Missing ones are no error."""

    def upload(self, bucket: str, key: str) -> Upload:
        """Begin an upload in parts."""


def attempt(path: str, request: Callable[[], T], *, again: Callable[[], T] | None = None) -> T:
    """Send a request until it works, waiting longer each time.

    Args:
        path: for the message.
        request: to send.
        again: what to do instead from the second time on, where the first one may have arrived.

    Raises:
        InputError: it failed `ATTEMPTS` times.
    """
    wait = FIRST_WAIT
    for _ in range(ATTEMPTS - 1):
        try:
            return request()
        except TransientError:
            time.sleep(wait * random.uniform(0.5, 1))
        wait = min(2 * wait, LONGEST_WAIT)
        request = again or request
    with last_attempt(path):
        return request()


@contextlib.contextmanager
def last_attempt(path: str) -> Iterator[None]:
    """Report a failure that is not repeated any more."""
    try:
        yield
    except TransientError as error:
        raise InputError(
            f"{path}: the store does not answer, however often it is asked ({error}). Look at the network, and at "
            "the endpoint in the environment, then run again."
        ) from error


def missing(path: str) -> FileNotFoundError:
    """Return the error of an object that is not there."""
    return FileNotFoundError(errno.ENOENT, "there is no such object", path)


def refused(path: str, why: str) -> PermissionError:
    """Return the error of a store that refuses access."""
    return PermissionError(errno.EACCES, f"the store refuses access ({why})", path)


def no_bucket(scheme: str, bucket: str, endpoint: str) -> InputError:
    """Return the error of a bucket that is not there."""
    where = f" at {endpoint}" if endpoint else ""
    return InputError(f"{scheme}://{bucket}: there is no such bucket{where}. Check the name, or make it.")


def no_conditions(path: str) -> InputError:
    """Return the error of a store that lacks conditional writes."""
    return InputError(
        f"{path}: the store has no conditional writes, without which two writers at once would harm each other. "
        "Use a store that has them (docs/guides/object_stores.md)."
    )


def whole(path: str, data: bytes, wanted: int) -> bytes:
    """Return bytes that were read, if all are there.

    Raises:
        TransientError: the connection ended before them.
    """
    if len(data) != wanted:
        raise TransientError(f"{len(data):,} of {wanted:,} bytes of {path} came")
    return data
