"""Prepare what workers read, and score pairs with it.

audience, catalog, log ──► snapshot, audience_features, activity, candidate_rows, catalog_features ─┐
store ──► contents/                                                                                  │
tiles (listings × audience rows) ──► ScoreTile ──► RankChunk ──► scores/score_date=.../ ◄────────────┤
items ──► JudgeListings ──► listing_quality/score_date=.../ ◄────────────────────────────────────────┘
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import apache_beam as beam
import numpy as np
import pyarrow as pa

from pipelines.inputs.contents import CopyContents, contents_jobs
from pipelines.io import cache, files
from pipelines.io.tables import FileRecord, WriteTable, write_table
from pipelines.runner.memory import release_memory
from pipelines.runs.manifest import Manifest
from pipelines.score.audience_rows import AudienceRows
from pipelines.score.find_pairs import encode_audience
from pipelines.score.inputs import ScoreInputs
from pipelines.score.pairs import Pairs, cut_tiles, ranges_pay
from pipelines.score.snapshot import Snapshot, recent_activity
from pipelines.score.tiles import AGAIN, JudgeListings, RankChunk, ScoreTile, WorkerInput
from schemas.audience import AUDIENCE
from schemas.scores import LISTING_QUALITY, SCORES

if TYPE_CHECKING:
    from camenn_model.package import Package


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """The files that workers read, under the run's directory.

    `records`: the files of it that are published. `images`, `titles`: the files of `contents/`.
    `by_ranges`: whether workers read single rows of those, and copy none.
    """

    records: list[FileRecord]
    images: tuple[FileRecord, ...]
    titles: tuple[FileRecord, ...]
    by_ranges: bool


def prepare(
    inputs: ScoreInputs, pairs: Pairs, latest: Manifest | None, out: str, directory: str, *, local: bool
) -> Prepared:
    """Write what workers read.

    Contents that the published run has already are kept, and not copied from the store again.
    `local`: whether the workers are on this machine, which has copies of all contents.
    """
    encoded = encode_audience(inputs.package, pairs)
    write_submitters_tables(encoded, pairs, directory)
    audience = pairs.audience.select(AUDIENCE.names).cast(AUDIENCE.schema)
    records = [write_table(directory, "items", pairs.items), write_table(directory, "audience", audience)]
    if pairs.rejects.num_rows:
        records.append(write_table(directory, "rejects", pairs.rejects))
    jobs, kept = contents_jobs(inputs.store, pairs.items, latest, out, directory, keep=True)
    with cache.Uploads() as uploads:
        contents = [*(CopyContents.copy(job, uploads) for job in jobs), *kept]
    images, titles = (
        tuple(record for record in contents if record.table == f"contents_{kind}") for kind in ("images", "titles")
    )
    release_memory()
    # Once, not in every worker: it needs the whole catalog.
    copies = (cache.local_copies(out, records, AGAIN) for records in (images, titles))
    write_table(directory, "catalog_features", compare_listings(inputs.package, pairs.items, *copies))
    release_memory()
    sizes = [(sum(file.rows for file in kind), sum(file.bytes for file in kind)) for kind in (images, titles)]
    by_ranges = not local and not files.is_local(out) and ranges_pay(pairs.chunks, encoded.history, sizes)
    return Prepared(records=[*records, *contents], images=images, titles=titles, by_ranges=by_ranges)


def write_submitters_tables(encoded: AudienceRows, pairs: Pairs, directory: str) -> None:
    """Write what was computed from the logs, for workers alone."""
    Snapshot.build(pairs.log).write(files.join(directory, "snapshot"))
    wanted = pairs.candidates if pairs.candidates is not None else np.zeros((0, 2), dtype=np.int64)
    write_table(directory, "audience_features", encoded.table())
    write_table(directory, "activity", pa.table(recent_activity(pairs.log)))
    write_table(directory, "candidate_rows", pa.table({"audience": wanted[:, 0], "item": wanted[:, 1]}))


def compare_listings(package: "Package", items: pa.Table, images: list[str], titles: list[str]) -> pa.Table:
    """Compare each listing with all others.

    The result has the columns of `CatalogFeatures` and of `Judgement`.
    """
    from camenn_model.data.item_table import ItemTable

    table = ItemTable.of_files(items, images, titles, package.config)
    judgement = table.judge(package.space.agreement)
    return pa.table({"price_alike": table.alike_prices(package.space.likeness), **vars(judgement)})


@dataclass
class ScoreCatalog(beam.PTransform[Any, Any]):
    """The job: tiles to ranked scores, listings to flags."""

    pairs: Pairs
    worker: WorkerInput
    records: list[FileRecord]
    model_version: str

    def expand(self, pipeline: beam.Pipeline) -> Any:
        worker, date, version = self.worker, f"score_date={self.pairs.score_date}", self.model_version
        scores = (
            pipeline
            | "Tiles" >> beam.Create(cut_tiles(self.pairs.chunks))
            | "SpreadTiles" >> beam.Reshuffle()
            | "ScoreTile" >> beam.ParDo(ScoreTile(worker))
            | "ByChunk" >> beam.GroupByKey()
            | "RankChunk" >> beam.ParDo(RankChunk(worker.directory, worker.top_k, version))
            | "WriteScores" >> WriteTable(SCORES, files.join(worker.directory, "scores", date))
        )
        quality = (
            pipeline
            | "WholeCatalog" >> beam.Create([None])
            | "JudgeListings" >> beam.ParDo(JudgeListings(worker.directory, version))
            | "WriteQuality" >> WriteTable(LISTING_QUALITY, files.join(worker.directory, "listing_quality", date))
        )
        submitted = pipeline | "SubmittersFiles" >> beam.Create(self.records)
        return {
            "files": [scores, quality, submitted] | "AllFiles" >> beam.Flatten(),
            "counts": pipeline | "SubmittersCounts" >> beam.Create(self.pairs.counts),
        }
