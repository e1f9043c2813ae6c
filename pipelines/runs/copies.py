"""Open what camenn_model reads, wherever it lies.

A shard set and a model package are read as local files. Of outputs on an object store, copies are
made on this machine (pipelines/io/cache.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from camenn_model.published import ListedFile
from pipelines.io import cache, files
from pipelines.runs.manifest import read_run, require_latest
from schemas.manifest import MANIFEST, RUNS, remedy

if TYPE_CHECKING:
    from camenn_model.data.shard_set import ShardSet
    from camenn_model.package import Package


@dataclass(frozen=True)
class RunCopies:
    """Copies of one run's files. See `camenn_model.published.Copies`."""

    root: str
    run: str

    @property
    def directory(self) -> str:
        """Return the local directory that stands for the output."""
        return cache.copy_root(self.root)

    def make(self, listed: Sequence[ListedFile], remedy: str) -> None:
        """Make the copies of some files."""
        cache.local_copies(
            self.root, [replace(entry, path=files.join(self.root, entry.path)) for entry in listed], remedy
        )

    def copy_manifest(self) -> None:
        """Make the copy of the run's manifest.

        Raises:
            DamagedError: it is lost or damaged.
        """
        # It carries its own checksum.
        read_run(self.root, self.run)
        cache.copy_document(self.root, files.join(self.root, RUNS, self.run, MANIFEST))


def open_shards(root: str, run: str | None = None) -> "ShardSet":
    """Open the published shard set of an output.

    `run`: the one that is published, where it is known already.

    Raises:
        InputError: nothing is published there, or another stage's output.
    """
    from camenn_model.data.shard_set import ShardSet

    if files.is_local(root):
        return ShardSet(root)
    copies = RunCopies(root, run or require_latest(root, "shards", "--shards").run)
    copies.copy_manifest()
    return ShardSet(root, copies)


def open_published_package(root: str) -> "Package":
    """Open the published model package of an output.

    Raises:
        InputError: nothing is published there, or another stage's output.
    """
    from camenn_model.package import open_package, read_package

    if files.is_local(root):
        return open_package(root)
    return read_package(package_directory(files.join(root, RUNS, require_latest(root, "train", "--model").run)))


def package_directory(directory: str) -> Path:
    """Return the local directory of a package.

    `directory` is that of its run, on a local disk or an object store.

    Raises:
        DamagedError: a file of it is lost or damaged.
    """
    if files.is_local(directory):
        return Path(directory)
    root, _, run = directory.rpartition(f"/{RUNS}/")
    copies = RunCopies(root, run)
    copies.copy_manifest()
    manifest = read_run(root, run)
    records = [record for table in manifest.tables for record in manifest.records(table)]
    cache.local_copies(root, records, remedy("train", ""))
    return Path(cache.copy_path(root, files.join(directory, MANIFEST))).parent
