"""Hold an output on an object store for one writer.

A lease is what `flock` is on a local disk: an object `OUT/.lease` that says who writes there. Its
holder writes it again every `RENEW` seconds. One that was not written for `TTL` seconds, by the
store's own clock, is free. Every write is conditional on the version that was there, so that of any
number of processes one succeeds.

It is never removed, as `.lock` of a local output is not: the stores of docs/guides/object_stores.md
do not all remove on a condition, and a removal without one could hit the next holder's.
"""

import contextlib
import datetime
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol, TypeVar

from pipelines.io import objects
from pipelines.io.object_client import ChangedError, no_conditions
from schemas.errors import InputError

LEASE = ".lease"
"""Name of the object in an output that its writer holds"""
TTL = 120.0
"""Seconds after which a lease that was not renewed is free"""
RENEW = 30.0
"""Seconds between renewals. A holder that finds its last one older renews before it goes on."""
_ROUNDING = 1.0
"""Seconds: times of s3 are whole, so that a difference of two may be wrong by this much"""
_ATTEMPTS = 5
"""To take a free lease that others take at the same time"""
T = TypeVar("T")


class InUseError(InputError):
    """Another process writes to an output."""


class LostLeaseError(InputError):
    """Another process took an output over from this one."""


class Writer(Protocol):
    """The right to write to an output, from `files.single_writer`."""

    def check(self) -> None:
        """Make sure that no other process has taken the output over.

        Raises:
            LostLeaseError: one has. Nothing more may be removed or published.
        """


class LockedWriter:
    """A writer whom the system's own lock protects, as long as it lives."""

    def check(self) -> None:
        """Do nothing: nobody takes a lock over."""


@dataclass(frozen=True)
class _Found:
    """A lease as it lies in the store."""

    holder: str
    by: str
    epoch: int
    seconds: float
    """After which it is free"""
    process: dict[str, Any] | None
    free: bool
    written_at: float
    token: str

    @property
    def until(self) -> str:
        end = datetime.datetime.fromtimestamp(self.written_at + self.seconds, datetime.UTC)
        return end.isoformat(timespec="seconds")


def _read(path: str) -> _Found | None:
    """Read a lease, or return None where there is none."""
    while True:
        try:
            stat = objects.stat(path)
            (data,) = objects.read(path, token=stat.token)
        except FileNotFoundError:
            return None
        except ChangedError:
            continue
        try:
            value = json.loads(data)
            said = (str(value["holder"]), str(value["by"]), int(value["epoch"]), float(value["seconds"]))
            process, free = value["process"], bool(value["free"])
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(
                f"{path}: is no lease of camenn ({type(error).__name__}). If no camenn process writes there, remove it."
            ) from error
        return _Found(*said, process, free, stat.written_at, stat.token)


@contextlib.contextmanager
def hold(root: str) -> Iterator["Lease"]:
    """Hold an output while a block runs.

    Raises:
        InUseError: another process holds it.
        InputError: nothing can be written there, or the store has no conditional writes.
    """
    lease = _acquire(root)
    try:
        lease.verify()
        lease.start()
        yield lease
    finally:
        lease.release()


def _acquire(root: str) -> "Lease":
    path = f"{root.rstrip('/')}/{LEASE}"
    for _ in range(_ATTEMPTS):
        found = _read(path)
        if found is not None and not _is_free(path, found):
            raise InUseError(
                f"{root}: another camenn process is writing there ({found.by}; its lease ends {found.until}, "
                "if it is not renewed). Wait for it to end, or choose another output."
            )
        lease = Lease(root, path, found.epoch + 1 if found else 1)
        with contextlib.suppress(ChangedError):
            lease.write(found.token if found else None)
            return lease
    raise InUseError(
        f"{root}: other camenn processes begin to write there at the same time. Wait for them to end, or choose "
        "another output."
    )


def _is_free(path: str, found: _Found) -> bool:
    if found.free or _is_gone(found.process):
        return True
    return store_time(path) - found.written_at > found.seconds + _ROUNDING


def store_time(path: str) -> float:
    """Return a store's time, seconds since 1970.

    It is that of a small object beside `path`, which is written and removed.
    """
    probe = f"{path}-{uuid.uuid4().hex}"
    objects.put(probe, b"")
    try:
        return objects.stat(probe).written_at
    finally:
        objects.delete([probe])


def try_conditions(root: str) -> list[float]:
    """Try what leases and publication need.

    It is tried on an object of its own.

    Returned are the seconds of each request.

    Raises:
        InputError: the store writes although a condition does not hold.
    """
    path = f"{root.rstrip('/')}/{LEASE}-{uuid.uuid4().hex}"
    seconds: list[float] = []

    def timed(request: Callable[[], T]) -> T:
        begun = time.monotonic()
        try:
            return request()
        finally:
            seconds.append(time.monotonic() - begun)

    def put(text: str, token: str | None) -> str:
        return timed(lambda: objects.put_if(path, text.encode(), token))

    def refused(token: str | None) -> None:
        with contextlib.suppress(ChangedError):
            put("this must not be written", token)
            raise no_conditions(root)

    # The client is made, and the connection opened, before anything is timed.
    objects.exists(path)
    try:
        first = put("first", None)
        refused(None)
        second = put("second", first)
        refused(first)
        (data,) = timed(lambda: objects.read(path, token=second))
        if data != b"second":
            raise InputError(f"{root}: the store does not return what was written last. Use another store.")
    finally:
        timed(lambda: objects.delete([path]))
    return seconds


class Lease:
    """A lease that this process holds.

    A thread renews it. Neither a forked process nor a worker holds it.
    """

    def __init__(self, root: str, path: str, epoch: int) -> None:
        self.root, self.path, self.epoch = root, path, epoch
        self._holder = uuid.uuid4().hex
        self._token: str | None = None
        self._renewed = (0.0, 0.0)
        self._lost = ""
        self._lock = threading.Lock()
        self._end = threading.Event()
        self._pid = os.getpid()
        self._thread = threading.Thread(target=self._keep, name=f"lease of {root}", daemon=True)

    def __reduce__(self) -> NoReturn:
        """Refuse to be sent to a worker."""
        raise TypeError("a lease belongs to one process")

    def write(self, token: str | None, *, free: bool = False) -> None:
        """Write the lease, if `token` is there.

        Raises:
            ChangedError: something else is there.
        """
        begun = _clocks()
        self._token = objects.put_if(self.path, self._document(free), token)
        self._renewed = begun

    def _document(self, free: bool) -> bytes:
        value = {
            "by": f"process {os.getpid()} on {socket.gethostname()}",
            "epoch": self.epoch,
            "free": free,
            "holder": self._holder,
            # An ETag is a checksum: each write needs bytes of its own.
            "nonce": uuid.uuid4().hex,
            "process": _this_process(),
            "seconds": TTL,
        }
        return json.dumps(value, indent=1, sort_keys=True).encode() + b"\n"

    def verify(self) -> None:
        """Make sure that the store refuses what it must.

        Raises:
            InputError: it wrote although the condition did not hold.
        """
        for token in (None, objects.NEVER[objects.split(self.path)[0]]):
            with contextlib.suppress(ChangedError):
                objects.put_if(self.path, self._document(free=True), token)
                self._lost = "there are no leases in this store"
                objects.delete([self.path])
                raise no_conditions(self.root)

    def start(self) -> None:
        """Begin to renew it."""
        self._thread.start()

    def _keep(self) -> None:
        while not self._end.wait(RENEW):
            # Without an answer from the store the lease may still be ours: `check` asks again.
            with self._lock, contextlib.suppress(InputError, OSError):
                if not self._lost and not self._end.is_set():
                    self._renew()

    def check(self) -> None:
        """Make sure that no other process has taken the output over.

        It costs nothing where the last renewal is young enough, and a request otherwise.

        Raises:
            LostLeaseError: one has.
        """
        if os.getpid() != self._pid:
            raise RuntimeError("a forked process does not hold its parent's lease")
        with self._lock:
            if self._lost:
                raise LostLeaseError(self._lost)
            limit = RENEW
            while self._age() > limit:
                self._renew()
                # What was sent again and again may be as old as its first attempt.
                limit = TTL / 2

    def _age(self) -> float:
        return max(now - then for now, then in zip(_clocks(), self._renewed, strict=True))

    def _renew(self, *, free: bool = False) -> None:
        token = self._token
        for _ in range(_ATTEMPTS):
            with contextlib.suppress(ChangedError):
                self.write(token, free=free)
                return
            found = _read(self.path)
            if found is None or found.holder != self._holder:
                break
            # The answer to an earlier renewal was lost for good.
            token = found.token
        taken = f"another camenn process ({found.by}) took this output over" if found else "the lease was removed"
        self._lost = (
            f"{self.root}: {taken}. This process had not renewed its lease in time: it was stopped, asleep or without "
            f"a network for more than {TTL:.0f} s. It removed and published nothing more. Run the command again."
        )
        raise LostLeaseError(self._lost)

    def release(self) -> None:
        """Let others have the output.

        Where another process took it over meanwhile, that one keeps it.
        """
        if os.getpid() != self._pid:
            return
        self._end.set()
        # It ends by itself where the store does not answer. What ended the block is the error to report.
        with self._lock, contextlib.suppress(InputError, OSError):
            if not self._lost:
                self._renew(free=True)


_BOOT_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
"""Runs while the machine sleeps. The monotonic clock of Linux does not, that of macOS does."""


def _clocks() -> tuple[float, float]:
    """Return two times in seconds: a clock that is never set, and the machine's own."""
    return time.clock_gettime(_BOOT_CLOCK), time.time()


def _started(pid: int) -> str:
    """Return when a process began, in ticks since the machine's start.

    Raises:
        OSError: it is gone, or is not shown.
    """
    # The second field, the program's name, is in brackets and may hold anything.
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]


def _this_process() -> dict[str, Any] | None:
    """Name this process among all that a machine ever ran.

    Only Linux tells: elsewhere it is None, and a lease ends by time alone.
    """
    try:
        if os.readlink("/proc/self") != str(os.getpid()):
            # /proc shows another namespace's processes.
            return None
        return {
            "boot": Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
            "host": socket.gethostname(),
            "namespace": os.readlink("/proc/self/ns/pid"),
            "pid": os.getpid(),
            "started": _started(os.getpid()),
        }
    except OSError:
        return None


def _is_gone(process: Any) -> bool:
    """Return whether a process ran on this very machine, and certainly runs no more."""
    here = _this_process()
    if here is None or not isinstance(process, dict):
        return False
    if any(process.get(name) != here[name] for name in ("boot", "host", "namespace")):
        return False
    pid = process.get("pid")
    if not isinstance(pid, int) or pid < 1:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    try:
        return _started(pid) != process.get("started")
    except OSError:
        # Another user's process may be hidden.
        return False
