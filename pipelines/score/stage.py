"""Run `camenn score`: rank listings by calibrated CVR.

It scores audience × listings to calibrated CVR, ranked. It also tells what is wrong with which
listing.

catalog, store ──► items, contents/ ─┐
logs ──► snapshot at the score's time ├──► Tile (listings × audience rows) ──► RankChunk ──► scores/score_date=.../
audience, model ─────────────────────┘
                             items ──► JudgeListings ──► listing_quality/score_date=.../
"""

import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import apache_beam as beam
import numpy as np
import pyarrow as pa

from pipelines.inputs.contents import CopyContents, contents_jobs
from pipelines.io import files
from pipelines.io.files import local_only
from pipelines.io.tables import WriteTable, write_table
from pipelines.runner.beam import is_local_run, local_workers, open_pipeline, use_all_cores
from pipelines.runner.console import NO_ROWS, watch
from pipelines.runner.exit_codes import GatesFailed
from pipelines.runner.memory import release_memory
from pipelines.runs.accounting import FinishRun, check_accounting, check_reject_rate, read_finished, read_rejects
from pipelines.runs.manifest import Manifest, add_files, new_run, read_latest, write_manifest
from pipelines.runs.outputs import hold_output
from pipelines.runs.publication import publish, published_manifests
from pipelines.score.coverage import cover_night
from pipelines.score.find_pairs import encode_audience, find_pairs
from pipelines.score.gates import (
    NIGHTS,
    OPTIONAL_TABLES,
    Night,
    check_night,
    check_scores,
    count_flag,
    score_statistics,
)
from pipelines.score.inputs import STAGE, ScoreOptions, open_inputs, user_fields
from pipelines.score.pairs import cut_tiles
from pipelines.score.snapshot import Snapshot, recent_activity
from pipelines.score.tiles import JudgeListings, RankChunk, ScoreTile, WorkerInput, measure_pace
from schemas.audience import AUDIENCE
from schemas.rejects import REJECTS
from schemas.scores import LISTING_QUALITY, SCORES
from schemas.training import ITEMS

if TYPE_CHECKING:
    from camenn_model.evaluation.challenge import Calibration
    from camenn_model.package import Package


PAIRS_FOR_ALL_CORES = 200_000
"""Pairs from which worker processes, which take some ten seconds to start, pay."""


def run(options: ScoreOptions, beam_flags: list[str], rerun: bool = False) -> dict[str, Any]:
    """Run the stage and publish.

    Returns the closing table.
    """
    started = time.monotonic()
    out = local_only(options.out, "--out")
    inputs = open_inputs(options)
    package = inputs.package
    given = {"--data": options.data, "--store": options.store, "--model": options.model, "--shards": options.shards}
    read = [path for path in (options.store, options.model, options.shards) if path is not None]
    with files.shared_reader(*read), hold_output(out, "--out", STAGE, given):
        latest = read_latest(out)
        if latest is not None and latest.request == inputs.request and not rerun:
            print(
                f"score: inputs and flags are those of run {latest.run}: nothing to do (--rerun scores again)",
                file=sys.stderr,
            )
            return {**latest.summary, "unchanged": True, "seconds": round(time.monotonic() - started, 1)}
        pairs = find_pairs(options, inputs)
        items, audience, chunks, score_date = pairs.items, pairs.audience, pairs.chunks, pairs.score_date
        run_name, directory = new_run(out)
        coverage = cover_night(inputs, pairs, user_fields(inputs, audience))
        rows = encode_audience(inputs, pairs)
        Snapshot.build(pairs.log).write(files.join(directory, "snapshot"))
        asked = pairs.candidates if pairs.candidates is not None else np.zeros((0, 2), dtype=np.int64)
        written = [
            write_table(directory, "items", items),
            write_table(directory, "audience", audience.select(AUDIENCE.names).cast(AUDIENCE.schema)),
        ]
        write_table(directory, "audience_features", rows.table())
        write_table(directory, "activity", pa.table(recent_activity(pairs.log)))
        write_table(directory, "candidate_rows", pa.table({"audience": asked[:, 0], "item": asked[:, 1]}))
        if pairs.rejects.num_rows:
            written.append(write_table(directory, "rejects", pairs.rejects))
        jobs, kept = contents_jobs(inputs.store, items, latest, out, directory)
        contents = [CopyContents.copy(job) for job in jobs]
        paths = {
            kind: tuple(r.path for r in (*contents, *kept) if r.table == f"contents_{kind}")
            for kind in ("images", "titles")
        }
        release_memory()
        # Once, not in every worker: it needs the whole catalog.
        write_table(directory, "told", judge_catalog(package, items, paths))
        release_memory()
        n_pairs = pairs.count
        local = is_local_run(beam_flags)
        if n_pairs > PAIRS_FOR_ALL_CORES:
            beam_flags = use_all_cores(beam_flags)
        with (
            watch("score", n_pairs, "pairs", local) as progress,
            open_pipeline(beam_flags) as pipeline,
        ):
            worker = WorkerInput(
                directory=directory,
                model=str(package.directory),
                images=paths["images"],
                titles=paths["titles"],
                top_k=options.top_k,
                precision=options.precision,
                progress=progress,
            )
            scores = (
                pipeline
                | "Tiles" >> beam.Create(cut_tiles(chunks))
                | "SpreadTiles" >> beam.Reshuffle()
                | "ScoreTile" >> beam.ParDo(ScoreTile(worker))
                | "ByChunk" >> beam.GroupByKey()
                | "RankChunk" >> beam.ParDo(RankChunk(directory, options.top_k, package.version))
                | "WriteScores" >> WriteTable(SCORES, files.join(directory, "scores", f"score_date={score_date}"))
            )
            quality = (
                pipeline
                | "WholeCatalog" >> beam.Create([None])
                | "JudgeListings" >> beam.ParDo(JudgeListings(directory, package.version))
                | "WriteQuality"
                >> WriteTable(LISTING_QUALITY, files.join(directory, "listing_quality", f"score_date={score_date}"))
            )
            submitted = pipeline | "SubmittersFiles" >> beam.Create([*written, *contents, *kept])
            tallies = pipeline | "SubmittersCounts" >> beam.Create(pairs.counts)
            {
                "files": [scores, quality, submitted] | "AllFiles" >> beam.Flatten(),
                "counts": tallies,
            } | "Finish" >> FinishRun(directory)
        records, found = read_finished(directory)
        check_accounting(found)
        check_reject_rate(found, options.max_reject_rate, read_rejects(records))
        due = pairs.rows(options.top_k)
        statistics = score_statistics([r.path for r in records if r.table == "scores"])
        check_scores(statistics["range"], sum(r.rows for r in records if r.table == "scores"), due)
        manifest = Manifest(
            stage=STAGE,
            run=run_name,
            request=inputs.request,
            inputs=inputs.fingerprints,
            options=asdict(options) | {"score_date": score_date},
            counts=found,
        )
        contracts = {c.name: c.fingerprint() for c in (SCORES, LISTING_QUALITY, ITEMS, AUDIENCE, REJECTS)} | {
            "contents_images": "",
            "contents_titles": "",
        }
        add_files(manifest, contracts, records)
        manifest.seconds = time.monotonic() - started
        manifest.summary = {
            "rows_in": audience.num_rows,
            "rows_out": manifest.rows("scores"),
            "rejected": sum(row.get("rejected", 0) for row in found.values()),
            "encoded_images": 0,
            "encoded_titles": 0,
            "score_date": score_date,
            "listings": items.num_rows,
            "pairs": n_pairs,
            "candidates_unknown": pairs.candidates_unknown,
            "mean_cvr": statistics["mean"],
            "lowest_cvr": statistics["range"][0],
            "highest_cvr": statistics["range"][1],
            "flagged_mismatch": count_flag([r.path for r in records if r.table == "listing_quality"], "mismatch"),
            "model_version": package.version,
            "seconds": round(manifest.seconds, 1),
            "pairs_per_second": round(n_pairs / manifest.seconds),
            "run": run_name,
            "out": options.out,
            "scores": files.join(directory, "scores"),
            "listing_quality": files.join(directory, "listing_quality"),
        }
        night = Night(
            listings=items.num_rows,
            audience_rows=audience.num_rows,
            rows=manifest.rows("scores"),
            mean_cvr=statistics["mean"],
            model=package.version,
            coverage={one.name: one.counts() for one in coverage},
            tables=tuple(name for name in OPTIONAL_TABLES if name in inputs.fingerprints),
            histogram=tuple(
                (int(place), int(statistics["histogram"][place])) for place in np.flatnonzero(statistics["histogram"])
            ),
        )
        manifest.options["night"] = asdict(night)
        nights = [Night.of_manifest(earlier) for earlier in published_manifests(out, NIGHTS)]
        calibration = judge_model(options, package)
        manifest.summary["calibration"] = calibration.to_json() if calibration is not None else None
        gates = check_night(night, [earlier for earlier in nights if earlier is not None], calibration, coverage)
        manifest.gates = [gate.to_json() for gate in gates]
        failed = [gate.words for gate in gates if not gate.passed]
        if failed:
            write_manifest(out, manifest)
            stays = "Nothing is published yet" if latest is None else "The scores of before stay published"
            raise GatesFailed(
                f"run {run_name} is finished, but {'; '.join(failed)}. {stays}. "
                f"Look at {directory}; if it is right: camenn publish {directory} --force --reason TEXT"
            )
        publish(out, manifest)
    return manifest.summary


def judge_catalog(package: "Package", items: pa.Table, paths: dict[str, tuple[str, ...]]) -> pa.Table:
    """Judge each listing by all listings together.

    The result has the columns of `CatalogFeatures`, and of `Judgement`.
    """
    from camenn_model.data.item_table import ItemTable

    table = ItemTable.of_files(items, paths["images"], paths["titles"], package.config)
    judgement = table.judge(package.space.agreement)
    return pa.table({"price_alike": table.alike_prices(package.space.likeness), **vars(judgement)})


def judge_model(options: ScoreOptions, package: "Package") -> "Calibration | None":
    """Measure the model's calibration on recent closed days.

    These are the latest closed days of the shard set, where one is given.
    """
    if options.shards is None:
        return None
    from camenn_model.data.shard_set import ShardSet
    from camenn_model.evaluation.challenge import judge_calibration

    return judge_calibration(package, ShardSet(options.shards))


def plan(options: ScoreOptions, beam_flags: list[str]) -> dict[str, Any]:
    """Report what `run` would have to do.

    Returns the closing table. Logs are read. Nothing is scored or written.
    """
    started = time.monotonic()
    inputs = open_inputs(options)
    latest = read_latest(options.out)
    pairs = find_pairs(options, inputs)
    pace, source = None, None
    if latest is not None and latest.summary.get("pairs"):
        pace, source = latest.seconds / latest.summary["pairs"], f"run {latest.run}"
    elif is_local_run(beam_flags) and pairs.count:
        workers = local_workers(use_all_cores(beam_flags) if pairs.count > PAIRS_FOR_ALL_CORES else beam_flags)
        pace, source = (
            measure_pace(
                inputs.package,
                pairs.items,
                encode_audience(inputs, pairs),
                pairs.chunks[0].items,
                options.precision,
                options.top_k,
            )
            / workers,
            "a tile scored just now; start-up is not in it",
        )
    return {
        **NO_ROWS,
        "rows_in": pairs.audience.num_rows,
        "score_date": pairs.score_date,
        "listings": pairs.items.num_rows,
        "pairs": pairs.count,
        "rows_out": pairs.rows(options.top_k),
        "rejected": pairs.rejects.num_rows,
        "nothing_to_do": latest is not None and latest.request == inputs.request,
        "score_seconds": None if pace is None else round(pace * pairs.count, 3),
        "estimated_from": source,
        "seconds": round(time.monotonic() - started, 1),
        "out": options.out,
    }
