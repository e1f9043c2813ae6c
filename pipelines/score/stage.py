"""Run `camenn score`: rank listings by calibrated CVR.

It scores audience × listings to calibrated CVR, ranked. It also reports what is wrong with which
listing.

inputs ──► pairs ──► coverage ──► Beam job (pipelines/score/pipeline.py) ──► gates ──► publish
"""

import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.io import files
from pipelines.io.files import output_place
from pipelines.runner.beam import has_process_per_core, is_local_run, local_workers, use_all_cores
from pipelines.runner.console import NO_ROWS, watch
from pipelines.runner.log import stage_logger
from pipelines.runner.machine_needs import threads_of
from pipelines.runs.context import Outcome, Request, RunContext, open_run
from pipelines.runs.copies import open_shards
from pipelines.runs.manifest import Manifest, read_latest
from pipelines.runs.publication import published_manifests
from pipelines.score.coverage import cover_night
from pipelines.score.find_pairs import encode_audience, find_pairs
from pipelines.score.gates import (
    NIGHTS,
    OPTIONAL_TABLES,
    Coverage,
    Night,
    check_night,
    check_scores,
    count_flag,
    score_statistics,
)
from pipelines.score.inputs import STAGE, ScoreInputs, ScoreOptions, open_inputs
from pipelines.score.needs import worker_needs
from pipelines.score.pairs import Pairs
from pipelines.score.pipeline import Prepared, ScoreCatalog, prepare
from pipelines.score.tiles import WorkerInput, measure_pace
from schemas.audience import AUDIENCE
from schemas.manifest import RUNS
from schemas.rejects import REJECTS
from schemas.scores import LISTING_QUALITY, SCORES
from schemas.training import ITEMS

if TYPE_CHECKING:
    from camenn_model.config import ModelConfig
    from camenn_model.evaluation.challenge import Calibration
    from camenn_model.package import Package


_LOG = stage_logger(STAGE)
PAIRS_FOR_ALL_CORES = 200_000
"""Pairs from which worker processes, which take some ten seconds to start, pay."""
CONTRACTS = {contract.name: contract.fingerprint() for contract in (SCORES, LISTING_QUALITY, ITEMS, AUDIENCE, REJECTS)}
"""Of the tables that are published. Contents are the store's."""


def run(options: ScoreOptions, beam_flags: list[str], rerun: bool = False) -> dict[str, Any]:
    """Run the stage and publish.

    Returns the closing table.
    """
    started = time.monotonic()
    check_containers(options.out, beam_flags)
    inputs = open_inputs(options)
    request = Request(
        stage=STAGE,
        out=output_place(options.out, "--out"),
        tables={"--data": options.data},
        outputs={"--store": options.store, "--model": options.model, "--shards": options.shards},
        inputs=inputs.fingerprints,
        fingerprint=inputs.request,
        options=asdict(options),
        max_reject_rate=options.max_reject_rate,
        repeats="scores again",
    )
    with open_run(request, started=started, rerun=rerun) as context:
        if context.unchanged:
            return context.repeat_summary()
        pairs = find_pairs(options, inputs)
        coverage = cover_night(inputs, pairs)
        statistics = score_pairs(context, inputs, pairs, options.top_k, options.precision, beam_flags)
        calibration = judge_model(options.shards, inputs.package)
        return context.publish(describe_night(context, inputs, pairs, coverage, statistics, calibration))


def check_containers(out: str, beam_flags: list[str]) -> None:
    """Warn where each core would download the embeddings for itself."""
    if has_process_per_core(beam_flags) and not files.is_local(out):
        _LOG.warning(
            "Dataflow starts a container for each core, and each would download and keep all embeddings in use. Give "
            "--experiments=no_use_multiple_sdk_containers --number_of_worker_harness_threads=CORES: one container, "
            "whose threads share them. When that pays: docs/guides/dataflow.md"
        )


def warn_of_unread_contents(config: "ModelConfig", prepared: Prepared) -> None:
    """Warn where the catalog has photos, or titles, that the model never saw."""
    for kind, reads, records in (
        ("photos", config.reads_images, prepared.images),
        ("titles", config.reads_titles, prepared.titles),
    ):
        if records and not reads:
            _LOG.warning("the model was trained without %s, so those of the catalog are not read. Train again.", kind)


def score_pairs(
    context: RunContext, inputs: ScoreInputs, pairs: Pairs, top_k: int, precision: str, beam_flags: list[str]
) -> dict[str, Any]:
    """Score the pairs in a Beam job.

    It is checked that each has its score. Returns the scores' `score_statistics`.
    """
    local = is_local_run(beam_flags)
    prepared = prepare(inputs, pairs, context.latest, context.request.out, context.directory, local=local)
    warn_of_unread_contents(inputs.package.config, prepared)
    if pairs.count > PAIRS_FOR_ALL_CORES:
        beam_flags = use_all_cores(beam_flags)
    with watch(STAGE, pairs.count, "pairs", local) as progress:
        worker = WorkerInput(
            directory=context.directory,
            out=context.request.out,
            model=files.join(inputs.model, RUNS, inputs.package.directory.name),
            images=prepared.images,
            titles=prepared.titles,
            by_ranges=prepared.by_ranges,
            top_k=top_k,
            precision=precision,
            progress=progress,
        )
        job = ScoreCatalog(pairs=pairs, worker=worker, records=prepared.records, model_version=inputs.package.version)
        context.run_job(beam_flags, "Score" >> job)
    statistics = score_statistics(context.paths("scores"))
    check_scores(statistics["range"], context.rows("scores"), pairs.rows(top_k))
    return statistics


def describe_night(
    context: RunContext,
    inputs: ScoreInputs,
    pairs: Pairs,
    coverage: list[Coverage],
    statistics: dict[str, Any],
    calibration: "Calibration | None",
) -> Outcome:
    """Compare the scores with earlier nights, and describe them."""
    night = Night(
        listings=pairs.items.num_rows,
        audience_rows=pairs.audience.num_rows,
        rows=context.rows("scores"),
        mean_cvr=statistics["mean"],
        model=inputs.package.version,
        coverage={one.name: one.counts() for one in coverage},
        tables=tuple(name for name in OPTIONAL_TABLES if name in inputs.fingerprints),
        histogram=tuple(
            (int(place), int(statistics["histogram"][place])) for place in np.flatnonzero(statistics["histogram"])
        ),
    )
    nights = [Night.of_manifest(earlier) for earlier in published_manifests(context.request.out, NIGHTS)]
    before = [earlier for earlier in nights if earlier is not None]

    def summarise(manifest: Manifest) -> dict[str, Any]:
        return {
            "rows_in": night.audience_rows,
            "rows_out": night.rows,
            "rejected": sum(row.get("rejected", 0) for row in context.counts.values()),
            "encoded_images": 0,
            "encoded_titles": 0,
            "score_date": pairs.score_date,
            "listings": night.listings,
            "pairs": pairs.count,
            "candidates_unknown": pairs.candidates_unknown,
            "mean_cvr": statistics["mean"],
            "lowest_cvr": statistics["range"][0],
            "highest_cvr": statistics["range"][1],
            "flagged_mismatch": count_flag(context.paths("listing_quality"), "mismatch"),
            "model_version": night.model,
            "seconds": round(manifest.seconds, 1),
            "pairs_per_second": round(pairs.count / manifest.seconds),
            "run": context.name,
            "out": context.request.out,
            "scores": files.join(context.directory, "scores"),
            "listing_quality": files.join(context.directory, "listing_quality"),
            "calibration": calibration.to_json() if calibration is not None else None,
        }

    return Outcome(
        records=context.records,
        contracts=CONTRACTS | {"contents_images": "", "contents_titles": ""},
        options={"score_date": pairs.score_date, "night": asdict(night)},
        gates=check_night(night, before, calibration, coverage),
        summarise=summarise,
    )


def judge_model(shards: str | None, package: "Package") -> "Calibration | None":
    """Measure the model's calibration on recent closed days.

    These are the latest closed days of the shard set, where one is given.
    """
    if shards is None:
        return None
    from camenn_model.evaluation.challenge import judge_calibration

    return judge_calibration(package, open_shards(shards))


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
                encode_audience(inputs.package, pairs),
                pairs.chunks[0].items,
                options.precision,
                options.top_k,
            )
            / workers,
            "a tile scored just now; start-up is not in it",
        )
    needs = {}
    if not (files.is_local(options.out) and is_local_run(beam_flags)):
        place, threads = files.output_place(options.out, "--out"), threads_of(beam_flags)
        needs = worker_needs(inputs, pairs, latest, place, options.precision, options.top_k, threads).lines()
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
        **needs,
        "seconds": round(time.monotonic() - started, 1),
        "out": options.out,
    }
