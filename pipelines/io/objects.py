"""Read and write the objects of gs:// and s3://.

A process has one client for each scheme, made at the first access from the environment: see
docs/guides/object_stores.md. Threads share it, and a forked process makes its own.

Every error is a FileNotFoundError, a PermissionError, a ChangedError or an InputError, and names
bucket and key.
"""

import contextlib
import functools
import importlib
import os
import re
import threading
import uuid
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from pipelines.io.object_client import PART, SOCKETS, ChangedError, Client, Stat, Upload, attempt
from pipelines.io.object_file import ObjectFile
from schemas.errors import InputError

SCHEMES = {"gs": ("object_gs", "GsClient", "gcp"), "s3": ("object_s3", "S3Client", "aws")}
"""{scheme: (module, its client, the extra of setup.py that installs its library)}"""
NEVER = {"gs": "1", "s3": f'"{"0" * 32}"'}
"""{scheme: a token that no object of it has}"""
PAGE = 1000
"""Objects that a request lists or removes"""
THREADS = SOCKETS
"""That read several ranges of an object, or look at several objects"""

_clients: dict[tuple[str, tuple[str | None, ...]], Client] = {}
_lock = threading.Lock()
_ENVIRONMENT = ("STORAGE_EMULATOR_HOST", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3")


def _forget_clients() -> None:
    """Make new clients at the next access.

    A fork copies sockets that the parent still uses, and perhaps a lock that nobody will release.
    """
    global _clients, _lock
    _clients, _lock = {}, threading.Lock()


os.register_at_fork(after_in_child=_forget_clients)


def is_object(path: str) -> bool:
    """Return whether a path is of a scheme that this module reads."""
    scheme, separator, _ = path.partition("://")
    return bool(separator) and scheme in SCHEMES


def split(path: str) -> tuple[str, str, str]:
    """Split a path into (scheme, bucket, key).

    Raises:
        InputError: it is of another scheme, or names no bucket.
    """
    scheme, _, rest = path.partition("://")
    bucket, _, key = rest.partition("/")
    if scheme not in SCHEMES or not bucket:
        raise InputError(f"{path}: is no object's address. Give gs://BUCKET/NAME or s3://BUCKET/NAME.")
    return scheme, bucket, key


def missing_library(scheme: str) -> str | None:
    """Describe the library that a scheme lacks here, in one line, or return None."""
    module, _, extra = SCHEMES[scheme]
    try:
        importlib.import_module(f"pipelines.io.{module}")
    except ImportError as error:
        return (
            f"the library that reads {scheme}:// is not installed ({error.name}). "
            f"Install it: pip install 'camenn[{extra}]' -c constraints.txt"
        )
    return None


def _client(scheme: str) -> Client:
    key = (scheme, tuple(map(os.environ.get, _ENVIRONMENT)))
    with _lock:
        if key not in _clients:
            lacking = missing_library(scheme)
            if lacking:
                raise InputError(f"{scheme}://: {lacking}")
            module, name, _ = SCHEMES[scheme]
            _clients[key] = getattr(importlib.import_module(f"pipelines.io.{module}"), name)()
        return _clients[key]


def endpoint(path: str) -> str:
    """Return the address that requests for a path go to."""
    return _client(split(path)[0]).endpoint


def stat(path: str) -> Stat:
    """Look at an object.

    Raises:
        FileNotFoundError: there is none.
    """
    scheme, bucket, key = split(path)
    return attempt(path, lambda: _client(scheme).stat(bucket, key))


def exists(path: str) -> bool:
    """Return whether there is an object of that very name."""
    try:
        stat(path)
    except FileNotFoundError:
        return False
    return True


def list_objects(prefix: str) -> Iterator[Stat]:
    """Yield the objects whose paths begin with `prefix`.

    They come in the order of their names. A thousand take one request. Names are taken literally,
    and a slash is a character like others.

    Raises:
        InputError: there is no such bucket.
    """
    scheme, bucket, key = split(prefix)
    client, after = _client(scheme), None
    while True:
        page, after = attempt(prefix, functools.partial(client.page, bucket, key, PAGE, after))
        yield from page
        if after is None:
            return


def match(directory: str, pattern: str) -> Iterator[Stat]:
    """Yield the objects below a directory whose names match a pattern.

    `*` matches no slash, `**` does. The directory's name is taken literally.
    """
    parts = {"**": ".*", "*": "[^/]*"}
    name = "".join(parts.get(part, re.escape(part)) for part in re.split(r"(\*\*|\*)", pattern))
    root = f"{directory.rstrip('/')}/"
    wanted = re.compile(name, re.DOTALL)
    for found in list_objects(root + pattern.partition("*")[0]):
        if wanted.fullmatch(found.path.removeprefix(root)):
            yield found


def stat_all(paths: Iterable[str]) -> list[Stat]:
    """Look at several objects at once.

    Those that are not there are left out.
    """

    def look(path: str) -> Stat | None:
        try:
            return stat(path)
        except FileNotFoundError:
            return None

    wanted = list(paths)
    if len(wanted) < 2:
        return [found for found in map(look, wanted) if found]
    with ThreadPoolExecutor(min(THREADS, len(wanted))) as pool:
        return [found for found in pool.map(look, wanted) if found]


def read(path: str, ranges: Sequence[tuple[int, int]] | None = None, token: str | None = None) -> list[bytes]:
    """Read an object, whole or some ranges of it.

    Args:
        path: of the object.
        ranges: (start, stop) of bytes, within the object and not empty: a request each, several at
            once. None = all of it, as one piece.
        token: version that it must still have.

    Raises:
        FileNotFoundError: there is none.
        ChangedError: it is of another version.
    """
    scheme, bucket, key = split(path)

    def piece(where: tuple[int, int | None]) -> bytes:
        return attempt(path, lambda: _client(scheme).read(bucket, key, *where, token))

    if ranges is None:
        return [piece((0, None))]
    if len(ranges) < 2:
        return [piece(where) for where in ranges]
    with ThreadPoolExecutor(min(THREADS, len(ranges))) as pool:
        return list(pool.map(piece, ranges))


def read_ranges(wanted: Sequence[tuple[str, int, int]]) -> list[bytes]:
    """Read ranges of several objects.

    They are (path, start, stop). Errors are those of `read`.
    """
    if not wanted:
        return []
    with ThreadPoolExecutor(min(THREADS, len(wanted))) as pool:
        return list(pool.map(lambda where: read(where[0], [where[1:]])[0], wanted))


def read_end(path: str, most: int) -> tuple[Stat, bytes]:
    """Read the last `most` bytes of an object.

    They come with its size and token. It takes one request where looking first would take two. The
    time of the `Stat` is 0.

    Raises:
        FileNotFoundError: there is none.
    """
    scheme, bucket, key = split(path)
    return attempt(path, lambda: _client(scheme).tail(bucket, key, most))


def put(path: str, data: bytes) -> str:
    """Write an object, whatever is there. Returns its token."""
    scheme, bucket, key = split(path)
    return attempt(path, lambda: _client(scheme).put(bucket, key, data, None, ""))


def put_if(path: str, data: bytes, token: str | None = None) -> str:
    """Write an object if nobody else did. Returns its token.

    Of any number of writers at once, on any machines, exactly one succeeds, if each writes bytes of
    its own: an ETag of s3 is a checksum, so bytes that were there before bring their token back.

    Args:
        path: of the object.
        data: all of it.
        token: version that must be there. None = there must be none.

    Raises:
        ChangedError: something else is there. Nothing was written.
        InputError: the store has no conditional writes.
    """
    scheme, bucket, key = split(path)
    client, write_id = _client(scheme), uuid.uuid4().hex

    def write() -> str:
        return client.put(bucket, key, data, token or "", write_id)

    def write_again() -> str:
        try:
            return write()
        except ChangedError:
            # The answer to an earlier attempt may have been lost: then it is this write that is there.
            found = client.stat(bucket, key)
            if found.write_id != write_id:
                raise
            return found.token

    try:
        return attempt(path, write, again=write_again)
    except FileNotFoundError:
        # Some stores say so where a version was asked for, and nothing is there.
        raise ChangedError(path) from None


def delete(paths: Iterable[str]) -> None:
    """Remove objects.

    On s3 a thousand take one request, on gs each takes one. Missing ones are no error.
    """
    keys: dict[tuple[str, str], list[str]] = {}
    for path in paths:
        scheme, bucket, key = split(path)
        keys.setdefault((scheme, bucket), []).append(key)
    for (scheme, bucket), names in keys.items():
        client = _client(scheme)
        for start in range(0, len(names), PAGE):
            some = names[start : start + PAGE]
            attempt(f"{scheme}://{bucket}/{some[0]}", functools.partial(client.delete, bucket, some))


class UploadSink:
    """A binary handle whose bytes become an object.

    Parts are sent by threads while the next one is written.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._waiting: list[bytes] = []
        self._size = 0
        self._upload: Upload | None = None
        self._threads: ThreadPoolExecutor | None = None
        self._sending: deque[Future[None]] = deque()
        self._parts = 0

    def write(self, data: Any) -> int:
        """Write bytes and return how many."""
        view = memoryview(data).cast("B")
        size = len(view)
        # The last part waits for the end: an object of one part is written with one request.
        while self._size + len(view) > self._part_bytes:
            room = self._part_bytes - self._size
            self._waiting.append(bytes(view[:room]))
            view = view[room:]
            self._send()
        if view:
            # Bytes that nobody can change need no copy.
            self._waiting.append(data if isinstance(data, bytes) and len(view) == size else bytes(view))
            self._size += len(view)
        return size

    @property
    def _part_bytes(self) -> int:
        """Return the size of the next part: S3 takes 10,000 of them, so that they grow by the thousand."""
        return PART << (self._parts // 1_000)

    def _send(self) -> None:
        """Send what waits as a part."""
        if self._upload is None:
            scheme, bucket, key = split(self._path)
            self._upload = _client(scheme).upload(bucket, key)
            self._threads = ThreadPoolExecutor(self._upload.threads, thread_name_prefix="upload")
        assert self._threads is not None
        part = self._waiting[0] if len(self._waiting) == 1 else b"".join(self._waiting)
        self._waiting, self._size = [], 0
        # No more parts than threads are in memory, beside the one that is written.
        if len(self._sending) >= self._upload.threads:
            self._sending.popleft().result()
        self._parts += 1
        self._sending.append(self._threads.submit(self._upload.add, self._parts, part))

    def flush(self) -> None:
        """Do nothing: parts of an object are sent when they are full."""

    def finish(self) -> None:
        """Publish the object."""
        if self._upload is None:
            put(self._path, b"".join(self._waiting))
            return
        self._send()
        while self._sending:
            self._sending.popleft().result()
        self._upload.finish()
        self._end()

    def abort(self) -> None:
        """Drop what was sent."""
        if self._upload is not None:
            self._end()
            # The error that led here is the one to report. What stays is invisible.
            with contextlib.suppress(InputError, OSError):
                self._upload.abort()

    def _end(self) -> None:
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)


@contextlib.contextmanager
def upload(path: str) -> Iterator[UploadSink]:
    """Yield a handle to write an object of any size to.

    The object appears, whole, when the block ends without an error. Otherwise nothing changes.
    """
    sink = UploadSink(path)
    try:
        yield sink
        sink.finish()
    except BaseException:
        sink.abort()
        raise


def open_read(path: str, found: Stat | None = None) -> ObjectFile:
    """Open an object for reading.

    No request is made before the first access. `found`: what a listing said of it, which saves one.
    """
    return ObjectFile(path, read_end, read, found)
