"""Find, merge and drop parts of two generations.

A generation is the embeddings of one encoder: photos have one, titles another.
"""

from dataclasses import dataclass

import apache_beam as beam

from pipelines.embed.options import EmbedOptions, store_place
from pipelines.embed.pipeline import MergeParts
from pipelines.io import files
from pipelines.io.lease import Writer
from pipelines.io.tables import FileRecord
from pipelines.runner.beam import open_pipeline
from pipelines.runs.publication import published_manifests
from pipelines.runs.store import IMAGES, TITLES, Part, drop_replaced, list_parts, plan_merges
from schemas.manifest import KEEP

KINDS = (IMAGES, TITLES)
Parts = dict[str, list[Part]]
"""By kind"""


@dataclass(frozen=True)
class Generations:
    """The generations of the store that a run's encoders write."""

    store: str
    directories: dict[str, str]
    """Kind -> directory"""
    contracts: dict[str, str]
    """Table -> fingerprint of its contract"""

    @classmethod
    def of(cls, options: EmbedOptions) -> "Generations":
        """Return the generations of the options' encoders."""
        places = {kind: store_place(options, kind) for kind in KINDS}
        contracts = {contract.name: contract.fingerprint() for _, contract in places.values()}
        return cls(options.store, {kind: directory for kind, (directory, _) in places.items()}, contracts)

    def open(self) -> Parts:
        """Make missing directories, and list the committed parts."""
        for directory in self.directories.values():
            files.make_directory(directory)
            files.mark_own(directory)
        return self.list_parts()

    def list_parts(self) -> Parts:
        """List the committed parts."""
        return {kind: list_parts(directory) for kind, directory in self.directories.items()}

    def merge_small(self, parts: Parts, beam_flags: list[str]) -> Parts:
        """Merge small parts where there are many.

        This is a job of its own: what is encoded tonight is whole before, and is merged tonight
        too. Returns the parts after it.
        """
        groups = [(self.directories[kind], group) for kind, found in parts.items() for group in plan_merges(found)]
        if not groups:
            return parts
        with open_pipeline(beam_flags) as pipeline:
            pipeline | "PlanMerges" >> beam.Create(groups) | beam.Reshuffle() | "MergeParts" >> beam.ParDo(MergeParts())
        return self.list_parts()

    def drop_replaced(self, new: Parts, writer: Writer) -> None:
        """Remove replaced parts.

        Parts stay that a run lists which may be published again. `new` are this run's: what was
        written and merged tonight was never listed. `writer` is checked before each removal.
        """
        listed = {
            path
            for manifest in published_manifests(self.store, KEEP)
            for name in ("image_embeddings", "title_embeddings")
            for path in manifest.listed(name)
        }
        for kind, directory in self.directories.items():
            # What was published may be published again, as far back as `camenn gc` keeps it.
            drop_replaced(directory, listed, unseen={part.name for part in new[kind]}, writer=writer)

    def seconds_each(self, kind: str) -> float | None:
        """Return the seconds that one worker took for one content.

        None means that none was encoded.
        """
        parts = [part for part in list_parts(self.directories[kind]) if part.seconds]
        contents = sum(part.rows + len(part.failures) for part in parts)
        return sum(part.seconds for part in parts) / contents if contents else None


def part_records(parts: Parts) -> list[FileRecord]:
    """Return the parts as files of a manifest's tables."""
    return [
        FileRecord(f"{kind[:-1]}_embeddings", part.path, part.rows, part.bytes, sha256=part.sha256)
        for kind, found in parts.items()
        for part in found
    ]
