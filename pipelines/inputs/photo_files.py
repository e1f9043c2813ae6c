"""The only access to a catalog's photos.

The module decides which addresses are allowed, and how the files there are opened.

`image_uri` comes with the catalog, from whoever writes listings, so it is untrusted. Nothing beyond
`--image_root` is read, nothing that is not a regular file, and no more than a photo's bytes.
"""

import fcntl
import functools
import os
import re
import stat
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from pipelines.inputs.photos import LIMITS, Defect
from pipelines.io import files, objects
from pipelines.io.object_client import ChangedError, Stat
from schemas.errors import InputError
from schemas.reasons import Reason

STORES = ("gs", "s3")
"""Schemes of object stores"""

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://|(data|file|https?|ftps?):", re.IGNORECASE)
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_READ = 2**20

_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}

RealDirectory = Callable[[str], str]
"""`os.path.realpath`, or one that remembers, for a caller with many photos"""


class UriDefect(Defect):
    """An address that is refused.

    `reason`: unsupported_scheme, outside_root or malformed_uri. `detail`: column, value and remedy,
    for a person.
    """


class FileDefect(Defect):
    """A defect of a file that cannot be a photo.

    It cannot be one whatever its bytes are.

    `reason`: not_a_file or too_many_bytes. `detail`: what was found at the address and what to do,
    for a person. The caller prefixes the address.
    """


def resolve_uri(uri: str, image_root: str, allow_absolute: bool, real_directory: RealDirectory | None = None) -> str:
    """Return the path to open for a catalog's `image_uri`.

    The path lies under `image_root`.

    An address of gs:// or s3:// is used unchanged, and must lie under an `image_root` of that
    scheme, bucket and prefix. With `allow_absolute`, an address may lead out of `image_root`, or be
    unrelated to it. Whether the file exists is not checked.

    Raises:
        UriDefect: another scheme, or one whose library is not installed. Also an address that
            leaves `image_root` (by '..', from the file system's root, through a symbolic link, to
            another bucket), or no path at all.
    """
    column = f"column 'image_uri': '{uri[:200]}'"
    if not uri.strip() or "\0" in uri:
        raise UriDefect(Reason.MALFORMED_URI, f"{column} is no path. Leave it null, or give a path under --image_root.")
    scheme = _SCHEME.match(uri)
    if scheme and (scheme[1] or scheme[2]).lower() not in STORES:
        remedy = "Copy the photo under --image_root, gs:// or s3:// and give that path."
        raise UriDefect(
            Reason.UNSUPPORTED_SCHEME,
            f"{column}: '{(scheme[1] or scheme[2]).lower()}' addresses are not read. {remedy}",
        )
    if scheme or not files.is_local(image_root):
        return _resolve_object(uri, column, image_root, allow_absolute)
    remedy = "Move the photo under --image_root, or pass --allow_absolute."
    if os.path.isabs(uri):
        if not allow_absolute:
            raise UriDefect(Reason.OUTSIDE_ROOT, f"{column} is an absolute path. {remedy}")
        return uri
    path = os.path.join(image_root, uri)
    if not allow_absolute:
        real = real_directory or os.path.realpath
        directory, name = os.path.split(path)
        # A directory holds many photos: its real path is resolved once, and a photo is only checked for being a link.
        if name in ("", ".", "..") or os.path.islink(path):
            found = os.path.realpath(path)
        else:
            found = os.path.join(real(directory), name)
        if not _is_below(found, real(image_root)):
            raise UriDefect(Reason.OUTSIDE_ROOT, f"{column} leads out of {image_root}. {remedy}")
    return path


def _resolve_object(uri: str, column: str, image_root: str, allow_absolute: bool) -> str:
    """Resolve an address in an object store.

    The address may also be relative to a root there.
    """
    remedy = "Copy the photo under --image_root, or pass --allow_absolute."
    if os.path.isabs(uri):
        if not allow_absolute:
            raise UriDefect(Reason.OUTSIDE_ROOT, f"{column} is an absolute path. {remedy}")
        return uri
    root = object_root(image_root)
    path = _lower_scheme(uri) if _SCHEME.match(uri) else f"{root}/{uri}"
    scheme, _, rest = path.partition("://")
    bucket, _, name = rest.partition("/")
    if not _BUCKET.fullmatch(bucket) or not name.strip("/"):
        raise UriDefect(
            Reason.MALFORMED_URI,
            f"{column} names no object. Give {scheme}://BUCKET/PATH, or a path under --image_root.",
        )
    # A store takes names literally, but not every client on the way to it does.
    if any(urllib.parse.unquote(part) in (".", "..") for part in name.split("/")):
        raise UriDefect(
            Reason.OUTSIDE_ROOT,
            f"{column} has '.' or '..' in it, which {scheme}:// does not know. Give the photo's own path.",
        )
    if not allow_absolute and not path.startswith(f"{root}/"):
        raise UriDefect(Reason.OUTSIDE_ROOT, f"{column} is not under {image_root}. {remedy}")
    missing = missing_library(scheme)
    if missing:
        raise UriDefect(Reason.UNSUPPORTED_SCHEME, f"{column}: {missing}")
    return path


def object_root(image_root: str) -> str:
    """Return a root as paths below it begin.

    It has no slash at its end.
    """
    root = image_root.rstrip("/")
    return root if files.is_local(root) else _lower_scheme(root)


def _lower_scheme(path: str) -> str:
    scheme, separator, rest = path.partition("://")
    return f"{scheme.lower()}{separator}{rest}"


def _is_below(path: str, directory: str) -> bool:
    return path.startswith(directory.rstrip(os.sep) + os.sep)


def check_root_scheme(image_root: str) -> None:
    """Refuse a root from which no photo could be read.

    This is done before any work is.

    Raises:
        InputError: another scheme than gs:// and s3://, or one whose library is not installed.
    """
    if files.is_local(image_root):
        return
    scheme = image_root.partition("://")[0].lower()
    if scheme not in STORES:
        raise InputError(
            f"--image_root {image_root}: '{scheme}' addresses are not read. Give a directory, gs:// or s3://."
        )
    missing = missing_library(scheme)
    if missing:
        raise InputError(f"--image_root {image_root}: {missing}")


missing_library = functools.cache(objects.missing_library)
"""Asked for each photo: where an import failed, Python would try again each time"""


@dataclass(frozen=True)
class PhotoFiles:
    """A reader of photos by the addresses of a catalog.

    Args:
        image_root: directory or gs:// or s3:// prefix that addresses are relative to.
        allow_absolute: whether an address may lead out of `image_root`.
    """

    image_root: str
    allow_absolute: bool

    def resolve(self, uri: str, real_directory: RealDirectory | None = None) -> str:
        """Return the path of a photo.

        It raises as `resolve_uri` does.
        """
        return resolve_uri(uri, self.image_root, self.allow_absolute, real_directory)

    def read(self, path: str, found: Stat | None = None) -> bytes:
        """Read the bytes of a photo whose path `resolve` gave.

        `found`: what is known of an object.

        Raises:
            UriDefect: the file that was opened lies elsewhere: a link was put on the way to it in
                between.
            FileDefect: it is no file, or larger than a photo may be.
            OSError: it is not there, or cannot be read.
        """
        if self.allow_absolute or not files.is_local(path):
            return read_photo(path, found=found)
        directory = os.open(self.image_root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            return read_photo(path, within=_path_of(directory))
        finally:
            os.close(directory)


class PhotoStatus(NamedTuple):
    """What is known of a photo that was not opened."""

    bytes: int
    written_at: float
    """Time of its last change, seconds since 1970, UTC"""
    found: Stat | None = None
    """Of an object: the same, with its version"""

    @property
    def version(self) -> str | None:
        """Return an object's version, which changes whenever its bytes do."""
        return self.found.token if self.found is not None else None


def photo_status(path: str) -> PhotoStatus:
    """Look at a photo without opening it.

    Raises:
        FileDefect: it is no file, or larger than a photo may be.
        OSError: it is not there, or cannot be looked at.
    """
    if files.is_local(path):
        status = os.stat(path)
        _check_status(status)
        return PhotoStatus(status.st_size, status.st_mtime)
    return object_status(objects.stat(path))


def object_status(found: Stat) -> PhotoStatus:
    """Return the status of a photo that is an object.

    Raises:
        FileDefect: it is larger than a photo may be.
    """
    _check_size(found.bytes)
    return PhotoStatus(found.bytes, found.written_at, found)


def read_photo(path: str, within: str | None = None, found: Stat | None = None) -> bytes:
    """Read the bytes of a photo.

    Of a file larger than the limit, one byte beyond the limit is read and no more.

    Args:
        path: of the photo.
        within: path, as the kernel knows it, of a directory that a local file must lie in once it
            is open.
        found: what is known of an object, which saves a request.

    Raises:
        UriDefect, FileDefect, OSError: see `PhotoFiles.read`.
    """
    if not files.is_local(path):
        try:
            data = _read_object(path, found)
        except ChangedError:
            # It was replaced since it was looked at.
            data = _read_object(path, None)
        _check_size(len(data))
        return data
    # Opening a device may have side effects.
    _check_status(os.stat(path))
    # A FIFO that took the file's place would wait for a writer, for ever.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    try:
        _check_status(os.fstat(descriptor))
        real = _path_of(descriptor) if within is not None else None
        if within is not None and real is not None and not _is_below(real, within):
            raise UriDefect(
                Reason.OUTSIDE_ROOT, f"column 'image_uri': {path} leads out of {within}. Move the photo into it."
            )
        pieces, left = [], LIMITS.bytes + 1
        # The size of the open file is not trusted: it may grow meanwhile, and some of the kernel's files have no end.
        while left and (piece := os.read(descriptor, min(_READ, left))):
            pieces.append(piece)
            left -= len(piece)
    finally:
        os.close(descriptor)
    _check_size(LIMITS.bytes + 1 - left)
    return b"".join(pieces)


def _read_object(path: str, found: Stat | None) -> bytes:
    with objects.open_read(path, found) as handle:
        return handle.read(LIMITS.bytes + 1)


def _check_status(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "no file")
        raise FileDefect(Reason.NOT_A_FILE, f"is {kind}. Put the photo itself there, or fix the address.")
    _check_size(status.st_size)


def _check_size(size: int) -> None:
    if size > LIMITS.bytes:
        raise FileDefect(Reason.TOO_MANY_BYTES, f"has more than {LIMITS.bytes:,} bytes. Upload a smaller photo.")


def _path_of(descriptor: int) -> str | None:
    """Return an open file's path as the kernel knows it.

    It is None where the kernel does not report one.
    """
    get_path = getattr(fcntl, "F_GETPATH", None)
    if get_path is not None:
        return os.fsdecode(fcntl.fcntl(descriptor, get_path, bytes(1024)).rstrip(b"\0"))
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except OSError:
        return None
