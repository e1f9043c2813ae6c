"""Wire the Beam steps that encode photos and titles.

They encode a catalog's distinct photos and titles.
"""

from dataclasses import dataclass
from typing import Any

import apache_beam as beam

from pipelines.embed.encode import EncodeContents
from pipelines.embed.options import EmbedJob
from pipelines.embed.resolve import CleanRows, ResolveItems
from pipelines.io import files
from pipelines.io.shuffle import ShuffleByBucket
from pipelines.io.tables import ReadTable, WriteTable
from pipelines.runs.store import IMAGES, TITLES, Part, merge_parts
from schemas.embeddings import EMBEDDED_ITEMS
from schemas.rejects import DEFECTS, REJECTS

ROWS_PER_FILE = 32_768
"""Of the run's own tables: what a worker holds until it writes."""


@dataclass
class EmbedCatalog(beam.PTransform[beam.Pipeline, Any]):
    """The whole stage as one composite.

    The catalog goes in. Store parts and the run's tables come out. It yields what `FinishRun`
    wants.
    """

    job: EmbedJob

    def expand(self, pipeline: beam.Pipeline) -> Any:
        job, options = self.job, self.job.options
        clean = (
            pipeline
            | "ReadCatalog" >> ReadTable(job.source)
            | "Clean" >> beam.ParDo(CleanRows()).with_outputs("rejects", "counts", main="rows")
        )
        if job.previous is None:
            previous = pipeline | "NoPreviousItems" >> beam.Create([])
        else:
            previous = pipeline | "ReadPrevious" >> ReadTable(job.previous) | "DropSlice" >> beam.Values()
        resolved = (
            {"catalog": clean.rows, "previous": previous}
            | "ByItem" >> ShuffleByBucket({"catalog": "item_id", "previous": "item_id"}, job.buckets, "zstd")
            | "Resolve"
            >> beam.ParDo(
                ResolveItems(options.image_root, options.allow_absolute, job.photo_listing, job.plan)
            ).with_outputs("images", "titles", "rejects", "counts", main="items")
        )
        images = resolved.images | "EncodeImages" >> EncodeContents(IMAGES, job)
        titles = resolved.titles | "EncodeTitles" >> EncodeContents(TITLES, job)
        counts = [clean.counts, resolved.counts]
        if job.plan:
            counts += [images["counts"], titles["counts"]]
            written = pipeline | "NoFiles" >> beam.Create([])
        else:
            rejects = [clean.rejects, resolved.rejects] | "MergeRejects" >> beam.Flatten()
            tables = [
                (resolved.items, "Items", EMBEDDED_ITEMS),
                (rejects, "Rejects", REJECTS),
                (images["unread"], "Unread", DEFECTS),
            ]
            written = [
                *(
                    rows
                    | f"Write{name}" >> WriteTable(contract, files.join(job.run_directory, name.lower()), ROWS_PER_FILE)
                    for rows, name, contract in tables
                ),
                images["files"],
                titles["files"],
            ] | "MergeFiles" >> beam.Flatten()
        return {"files": written, "counts": counts | "MergeCounts" >> beam.Flatten()}


class MergeParts(beam.DoFn):
    """A step that merges small parts of a directory.

    It takes a directory and some of its small parts, and writes one part with their contents, in
    the store.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # Beam's own has no annotations

    def process(self, element: tuple[str, list[Part]]) -> None:
        directory, group = element
        merge_parts(directory, group)
