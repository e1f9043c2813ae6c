"""Find, merge and drop parts of two generations.

A generation is the embeddings of one encoder: photos have one, titles another.
"""

import functools
from dataclasses import dataclass, field

import apache_beam as beam

from pipelines.embed.options import EmbedOptions, store_place
from pipelines.embed.pipeline import MergeParts
from pipelines.io import files
from pipelines.io.lease import Writer
from pipelines.io.tables import FileRecord
from pipelines.runner.beam import open_pipeline
from pipelines.runs.publication import published_manifests
from pipelines.runs.store import (
    IMAGES,
    TITLES,
    Part,
    all_parts,
    drop_replaced,
    plan_merges,
    standing_parts,
)
from schemas.embeddings import embedding_keys, keys_table
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
    known: Parts = field(default_factory=dict)
    """All that was found by the last listing, replaced parts included"""

    @classmethod
    def of(cls, options: EmbedOptions) -> "Generations":
        """Return the generations of the options' encoders."""
        places = {kind: store_place(options, kind) for kind in KINDS}
        contracts = {
            contract.name: contract.fingerprint()
            for _, embeddings in places.values()
            for contract in (embeddings, embedding_keys(embeddings))
        }
        return cls(options.store, {kind: directory for kind, (directory, _) in places.items()}, contracts)

    def open(self) -> Parts:
        """Make missing directories, and list the committed parts."""
        parts = self.list_parts()
        for kind, directory in self.directories.items():
            files.make_directory(directory)
            # Of an object store, a marker that was read proves the same, and saves a request.
            if files.is_local(directory) or not parts[kind]:
                files.mark_own(directory)
        return parts

    def list_parts(self) -> Parts:
        """List the committed parts.

        Markers that this run read before are not read again: nobody else writes there meanwhile.
        """
        for kind, directory in self.directories.items():
            self.known[kind] = all_parts(directory, self.known.get(kind, ()))
        return {kind: standing_parts(found) for kind, found in self.known.items()}

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

        Parts stay that a run lists which may be published again. `new` are this run's. `writer` is
        checked before anything is removed.
        """

        @functools.cache
        def listed() -> set[str]:
            # What was published may be published again, as far back as `camenn gc` keeps it.
            return {
                path
                for manifest in published_manifests(self.store, KEEP)
                for name in ("image_embeddings", "title_embeddings")
                for path in manifest.listed(name)
            }

        for kind, parts in self.known.items():
            # What was written and merged tonight was never listed.
            drop_replaced(parts, listed, unseen={part.name for part in new[kind]}, writer=writer)

    def seconds_each(self, kind: str) -> float | None:
        """Return the seconds that one worker took for one content.

        None means that none was encoded.
        """
        parts = [part for part in standing_parts(self.known[kind]) if part.seconds]
        contents = sum(part.rows + len(part.failures) for part in parts)
        return sum(part.seconds for part in parts) / contents if contents else None


def part_records(parts: Parts) -> list[FileRecord]:
    """Return parts and keys files as a manifest's files."""
    records = []
    for kind, found in parts.items():
        table = f"{kind[:-1]}_embeddings"
        records += [part.record(table) for part in found]
        records += [part.keys_record(keys_table(table)) for part in found if part.keys_bytes]
    return records
