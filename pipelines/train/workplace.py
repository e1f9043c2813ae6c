"""Give a training its place on this machine.

A training writes its checkpoints and its package as local files. On an object store they are
uploaded from there: checkpoints every few minutes, the package before it is published.
"""

import hashlib
import os
import shutil
import time
from pathlib import Path

from camenn_model.integrity import cache_directory
from camenn_model.training.checkpoints import Checkpoints
from pipelines.io import cache, files
from pipelines.io.lease import LostLeaseError, Writer
from pipelines.io.tables import FileRecord
from pipelines.runner.log import stage_logger
from pipelines.runs.outputs import CHECKPOINTS
from pipelines.train.options import STAGE
from schemas.errors import InputError
from schemas.manifest import RUNS

UPLOAD_EVERY_S = 180.0
"""Seconds between uploads of checkpoints"""


def workplace(out: str) -> Path:
    """Return the local directory that a training writes to.

    It is `out` itself on a local disk. Elsewhere it stays the same from run to run, so that a killed
    training goes on from what it wrote last.
    """
    if files.is_local(out):
        return Path(out)
    place = cache.copy_root(out)
    return cache_directory() / "training" / hashlib.sha256(place.encode()).hexdigest()[:16]


def checkpoints_of(out: str, writer: Writer | None) -> Checkpoints:
    """Return the checkpoints of an output.

    `writer`: the right to write to it, None in a process that uploads nothing.
    """
    directory = workplace(out) / CHECKPOINTS
    if files.is_local(out):
        return Checkpoints(directory)
    return UploadedCheckpoints(directory, files.join(out, CHECKPOINTS), writer)


class UploadedCheckpoints(Checkpoints):
    """Checkpoints that are uploaded every few minutes.

    Args:
        directory: on this machine.
        place: of the copies on the object store.
        writer: whose process uploads them, and removes them in the end. It is checked before, so that
            a training whose output another process took over ends. None = this process does not.
    """

    def __init__(self, directory: Path, place: str, writer: Writer | None) -> None:
        super().__init__(directory)
        self.place, self.writer = place, writer
        self.uploaded = time.monotonic()
        self._fetch()

    @property
    def _remote(self) -> str:
        return files.join(self.place, self.path.name)

    def _fetch(self) -> None:
        """Download the latest one, unless a later one is here.

        A training that was killed on another machine goes on here.
        """
        found = files.find([self._remote])
        if found and (not self.path.exists() or self.path.stat().st_mtime < found[0].written_at):
            self.directory.mkdir(parents=True, exist_ok=True)
            cache.download_file(self._remote, str(self.path))

    def saved(self) -> None:
        """Upload it, if the last upload was long ago.

        A store that does not answer for a while ends no training of hours: it is tried again later.

        Raises:
            LostLeaseError: another process took the output over.
        """
        if self.writer is None or time.monotonic() - self.uploaded < UPLOAD_EVERY_S:
            return
        self.uploaded = time.monotonic()
        try:
            self.writer.check()
            cache.upload_file(str(self.path), self._remote)
        except LostLeaseError:
            raise
        except (InputError, OSError) as error:
            stage_logger(STAGE).warning("the checkpoint is not uploaded, and stays on this machine: %s", error)

    def finished(self) -> None:
        """Keep them: the package is not published yet."""

    def discard(self) -> None:
        """Remove them, here and there.

        What cannot be removed does no harm: another training does not go on from it.
        """
        super().discard()
        if self.writer is not None:
            try:
                self.writer.check()
                files.delete([self._remote])
            except (InputError, OSError) as error:
                stage_logger(STAGE).warning("%s stays there: %s", self._remote, error)


def clear_workplace(out: str) -> None:
    """Remove packages that a killed training left on this machine."""
    if not files.is_local(out):
        shutil.rmtree(workplace(out) / RUNS, ignore_errors=True)


def upload_package(local: Path, out: str, directory: str, names: list[str]) -> list[FileRecord]:
    """Upload a package to its run's directory in `out`.

    The local files become this machine's copies of it: `score` reads them next. Nothing is done on
    a local disk, where both are one. Returns the files with their checksums.
    """
    from camenn_model.integrity import file_sha256

    records = [
        FileRecord(
            name, files.join(directory, name), 0, os.path.getsize(local / name), sha256=file_sha256(local / name)
        )
        for name in names
    ]
    if not files.is_local(directory):
        for record in records:
            cache.upload_file(str(local / record.table), record.path)
            cache.keep_copy(str(local / record.table), out, record.path)
        shutil.rmtree(local)
    return records
