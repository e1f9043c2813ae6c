"""The record that a night leaves behind.

It is `WORK/nights/00000031/record.json` and `log.txt`, written as it goes, so that a night that was
killed shows how far it came. On an object store both are written whole each time: nothing can be
appended there.
"""

import contextlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from pipelines.io import clock, files
from pipelines.runner.log import stage_logger
from pipelines.runs.manifest import versions
from schemas.errors import InputError

NIGHTS = "nights"
RESERVED_BYTES = 64 * 2**10
"""A stage that fills the disk leaves no room for the record that reports it."""
_READ_THREADS = 8
RECORD = "record.json"
LOG = "log.txt"

DONE, UNCHANGED, NOT_DUE, GATED, FAILED, RUNNING = "done", "unchanged", "not due", "held back", "failed", "running"


@dataclass
class StageRecord:
    """One stage of a night."""

    stage: str
    status: str = RUNNING
    words: str = ""
    """What changed and what was left out, or what went wrong"""
    seconds: float = 0.0
    run: str | None = None
    """The run that is published after it"""
    summary: dict[str, Any] = field(default_factory=dict)


@dataclass
class Night:
    """A night's record. `directory`: where it is written."""

    number: int
    directory: str
    config: dict[str, Any]
    started_at: str = field(default_factory=clock.utc_stamp)
    finished_at: str | None = None
    exit_code: int | None = None
    """None = it runs, or was killed"""
    message: str = ""
    published: dict[str, Any] | None = None
    """Scores that readers see after it: run, at, hours since"""
    stages: list[StageRecord] = field(default_factory=list)

    def __post_init__(self) -> None:
        # No field: those make the record.
        self._lines: list[str] = []

    @property
    def path(self) -> str:
        """Return the path of the record."""
        return files.join(self.directory, RECORD)

    def write(self) -> None:
        """Write the record as it stands.

        A disk that is full must not keep a night from ending as it should, so that is said and no
        more.
        """
        record = asdict(self) | {"versions": versions()}
        for last in (False, True):
            try:
                files.write_document(self.path, record)
                return
            except (OSError, InputError) as error:
                if last or not self._release():
                    _say(f"{self.path} cannot be written: {error}")
                    return

    def reserve(self) -> None:
        """Reserve room on the disk for the record.

        The record gets it when there is no other. An object store is never full.
        """
        if not files.is_local(self.directory):
            return
        with contextlib.suppress(OSError), open(self._reserve, "wb") as handle:
            handle.write(os.urandom(RESERVED_BYTES))

    def _release(self) -> bool:
        """Give the reserved room back.

        It returns whether there was any.
        """
        if not files.is_local(self.directory):
            return False
        try:
            os.remove(self._reserve)
        except OSError:
            return False
        return True

    @property
    def _reserve(self) -> str:
        return files.join(self.directory, "reserve")

    def finish(self) -> None:
        """Write the record for the last time."""
        self.write()
        self._release()

    def log(self, text: str) -> None:
        """Write one line for whoever watches, and for the log."""
        path = files.join(self.directory, LOG)
        line = _say(text) + "\n"
        try:
            if files.is_local(path):
                with open(path, "a") as handle:
                    handle.write(line)
            else:
                self._lines.append(line)
                with files.atomic_write(path) as sink:
                    sink.write("".join(self._lines).encode())
        except (OSError, InputError) as error:
            _say(f"{path} cannot be written: {error}")


def _say(text: str) -> str:
    at = clock.utc_stamp()
    stage_logger("nightly").info("%s", text, extra={"at": at})
    return f"{at} nightly: {text}"


def read_nights(work: str) -> list[dict[str, Any]]:
    """Read the records of all nights, oldest first.

    A night that was cut off while it wrote its first one is left out.
    """
    found = sorted(files.match(files.join(work, NIGHTS), f"*/{RECORD}"), key=lambda file: file.path)
    with ThreadPoolExecutor(_READ_THREADS) as pool:
        return list(pool.map(read_night, (file.path for file in found)))


def read_night(path: str) -> dict[str, Any]:
    """Read one night's record.

    Raises:
        DamagedError: it is not what was written.
    """
    names = (*(entry.name for entry in fields(Night)), "versions")
    return files.read_document(path, names, "Remove the folder of that night: it only records what happened.")


def new_night(work: str, config: dict[str, Any]) -> tuple[Night, dict[str, Any] | None]:
    """Begin tonight's record.

    Returned are tonight's record, written, and the record of the night before. Numbers, not times,
    give the order: a clock may be set back.
    """
    before = read_nights(work)
    number = max((record["number"] for record in before), default=0) + 1
    night = Night(number, files.join(work, NIGHTS, f"{number:08d}"), config)
    files.make_directory(night.directory)
    night.write()
    night.reserve()
    return night, before[-1] if before else None
