"""`camenn score`: audience × listings → calibrated CVR, ranked; and what is wrong with which listing.

catalog, store ──► items, contents/ ─┐
logs ──► snapshot at the score's time ├──► Tile (listings × audience rows) ──► RankChunk ──► scores/score_date=.../
audience, model ─────────────────────┘
                             items ──► AlignListings ──► JudgeListings ──► listing_quality/score_date=.../
"""

import argparse
import datetime
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from camenn_model.feature_space import FeatureSpace, to_float
from pipelines import files
from pipelines.attribution import HOUR_US
from pipelines.audience import by_store, by_user, has_candidates, read_audience, read_candidates, score_time
from pipelines.console import closing_table, watch
from pipelines.dimensions import read_timezones, read_users
from pipelines.distribution import EDGES, histogram
from pipelines.events import read_times
from pipelines.examples import item_attributes
from pipelines.gates import NIGHTS, HeldBack, Night, check_night
from pipelines.items import CopyContents, contents_jobs, load_items, local_only
from pipelines.manifest import (
    Count,
    FinishRun,
    Manifest,
    add_files,
    check_accounting,
    check_reject_rate,
    new_run,
    publish,
    read_finished,
    read_latest,
    read_rejects,
    request_fingerprint,
    require_latest,
    write_manifest,
)
from pipelines.options import (
    add_common_flags,
    is_local_run,
    new_parser,
    open_pipeline,
    parse_with_beam,
    run_main,
    use_all_cores,
)
from pipelines.publication import published_manifests
from pipelines.score_tiles import AlignListings, AudienceRows, JudgeListings, RankChunk, ScoreTile, Tile, WorkerInput
from pipelines.snapshot import Log, Snapshot, audience_features, build_log
from pipelines.tables import Source, WriteTable, write_table
from schemas.audience import AUDIENCE, CANDIDATES
from schemas.catalog import CATALOG
from schemas.contract import InputError
from schemas.events import CLICKS, ORDERS
from schemas.rejects import REJECTS
from schemas.scores import LISTING_QUALITY, SCORES
from schemas.training import ITEMS

STAGE = "score"
TILE_ITEMS = 512
CHUNK_ROWS = 512
SPAN_ITEMS = 512
PAIRS_FOR_ALL_CORES = 200_000
"""Pairs from which worker processes, which take some ten seconds to start, pay."""


@dataclass(frozen=True, kw_only=True)
class ScoreOptions:
    """One score run, resolved."""

    data: str
    store: str
    model: str
    out: str
    score_date: str | None
    top_k: int
    audience: str
    timezone: str
    max_reject_rate: float


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Audience rows [first, last) and the listings that they meet."""

    audience: tuple[int, int]
    items: np.ndarray


def plan_chunks(audience: pa.Table, items: pa.Table, candidates: np.ndarray | None) -> list[Chunk]:
    """Cut the audience, ordered by store, into chunks that meet the same listings: their own store's, and those of no store."""
    item_store = items["store_id"].to_pandas()
    shared = item_store.isna().to_numpy()
    stores = audience["store_id"].to_pandas().to_numpy(dtype=object)
    edges = (
        np.flatnonzero(np.append(stores[1:] != stores[:-1], True)) + 1 if not shared.all() else np.array([len(stores)])
    )
    chunks = []
    start = 0
    for end in edges:
        mine = (
            np.flatnonzero(shared | (item_store == stores[start]).to_numpy(dtype=bool))
            if not shared.all()
            else np.arange(items.num_rows)
        )
        for first in range(start, int(end), CHUNK_ROWS):
            last = min(first + CHUNK_ROWS, int(end))
            met = mine
            if candidates is not None:
                asked = candidates[(candidates[:, 0] >= first) & (candidates[:, 0] < last), 1]
                met = np.intersect1d(mine, asked)
            if len(met):
                chunks.append(Chunk(audience=(first, last), items=met))
        start = int(end)
    return chunks


def cut_tiles(chunks: list[Chunk]) -> list[Tile]:
    """Tiles of at most 512 listings × 512 audience rows."""
    return [
        Tile(number, chunk.audience, chunk.items[first : first + TILE_ITEMS].astype(np.int32).tobytes())
        for number, chunk in enumerate(chunks)
        for first in range(0, len(chunk.items), TILE_ITEMS)
    ]


def encode_audience(
    audience: pa.Table, users: pa.Table, log: Log, space: FeatureSpace, weekday: int, history_length: int
) -> AudienceRows:
    """Audience rows as the model reads them; users' fields come from the users table, the audience's own columns go before."""
    user = log.user_codes(audience["user_id"].to_pylist())
    store = log.store_codes(audience["store_id"].to_pylist())
    place = pc.index_in(audience["user_id"], value_set=users["user_id"].combine_chunks()).combine_chunks()
    # A null user must not be found as a null key.
    place = pc.if_else(pc.is_null(audience["user_id"]).combine_chunks(), pa.scalar(None, pa.int32()), place)
    fields = users.take(place)
    for name in audience.column_names:
        if name not in AUDIENCE.names:
            column = audience[name].cast(pa.string())
            known = fields[name] if name in fields.column_names else pa.nulls(audience.num_rows, pa.string())
            merged = pc.coalesce(column, known)
            fields = fields.drop_columns([name]) if name in fields.column_names else fields
            fields = fields.append_column(name, merged)
    counts, history, kind, hours = audience_features(log, user, history_length)
    values, buckets = space.encode_numbers(("audience_counts",), counts)
    hour = to_float(audience["hour"]).astype(np.int64)
    cats = space.encode_audience(audience["user_id"], audience["store_id"], hour, np.full(len(hour), weekday), fields)
    gap = np.where(history >= 0, np.log1p(np.maximum(hours, 0)), 0).astype(np.float32)
    return AudienceRows(
        user=user,
        store=store,
        cats=cats,
        values=values,
        buckets=buckets,
        history=history,
        kind=kind.astype(np.int64),
        gap=gap,
    )


def check_encoders(store: Manifest, encoders: dict[str, Any], model: str) -> None:
    """Raises InputError where the model was trained on other embeddings than the store's."""
    for kind in ("image", "text"):
        if store.options[kind]["fingerprint"] != encoders[kind]["fingerprint"]:
            raise InputError(
                f"--model {model}: was trained on embeddings of {encoders[kind]['description']}, the store's are of {store.options[kind]['description']}. "
                "Embed with the model's encoders and flags, or train on shards of this store."
            )


def check_scores(cvr_range: tuple[float, float] | None, rows: int, expected_rows: int) -> None:
    """The first night's gates: something was scored, every audience row has an answer, and all values are probabilities.

    Raises:
        InputError: a gate failed; nothing is published.
    """
    if rows == 0 or cvr_range is None:
        raise InputError(
            "score: no pair was scored: no audience row meets any listing. Check store_id in catalog and audience. Nothing was published."
        )
    low, high = cvr_range
    if not (0.0 <= low <= high <= 1.0):
        raise InputError(
            f"score: cvr ranges from {low} to {high}: not probabilities. Nothing was published; train again."
        )
    if rows != expected_rows:
        raise RuntimeError(f"score: {rows} rows were written, {expected_rows} were due. Nothing was published.")


def run(options: ScoreOptions, beam_flags: list[str], rerun: bool = False) -> dict[str, Any]:
    """Run the stage and publish; returns the closing table."""
    from camenn_model.checkpoint import open_package

    started = time.monotonic()
    out = local_only(options.out, "--out")
    catalog, clicks, orders = (Source.find(options.data, contract) for contract in (CATALOG, CLICKS, ORDERS))
    users, users_source = read_users(options.data)
    timezones, stores_source = read_timezones(options.data, options.timezone)
    given = read_audience(options.data) if options.audience == "auto" else None
    store = require_latest(options.store, "embed", "--store")
    package = open_package(local_only(options.model, "--model"))
    check_encoders(store, package.encoders, options.model)
    sources = {
        "catalog": catalog,
        "clicks": clicks,
        "orders": orders,
        "users": users_source,
        "stores": stores_source,
        "audience": given[1] if given else None,
    }
    inputs = {name: source.fingerprint for name, source in sources.items() if source is not None}
    if has_candidates(options.data):
        inputs["candidates"] = Source.find(options.data, CANDIDATES).fingerprint
    inputs |= {"store": store.request, "model": package.version}
    request = request_fingerprint(inputs, asdict(options))
    with files.single_writer(out):
        latest = read_latest(out)
        if latest is not None and latest.request == request and not rerun:
            print(
                f"score: inputs and flags are those of run {latest.run}: nothing to do (--rerun scores again)",
                file=sys.stderr,
            )
            return {**latest.summary, "unchanged": True, "seconds": round(time.monotonic() - started, 1)}
        score_date = options.score_date or default_date(clicks, orders)
        moment, weekday = score_time(score_date)
        run_name, directory = new_run(out)
        items, catalog_rejects, catalog_counts = load_items(STAGE, catalog, store)
        if items.num_rows == 0:
            raise InputError(f"{catalog.files[0]}: table 'catalog' has no usable row: there is nothing to score.")
        window = int(float(package.meta["attribution_hours"]) * HOUR_US)
        log, log_rejects, log_counts = build_log(
            STAGE, clicks, orders, items["item_id"], item_attributes(items), moment, window
        )
        audience = (given[0] if given else make_audience(options, items, log, timezones)).sort_by(
            [("store_id", "ascending"), ("audience_id", "ascending")]
        )
        candidates = read_candidates(options.data, audience["audience_id"], items["item_id"])
        chunks = plan_chunks(audience, items, candidates[0] if candidates else None)
        rows = encode_audience(audience, users, log, package.space, weekday, package.config.history_length)
        Snapshot.build(log).write(files.join(directory, "snapshot"))
        pairs = candidates[0] if candidates else np.zeros((0, 2), dtype=np.int64)
        written = [
            write_table(directory, "items", items),
            write_table(directory, "audience", audience.select(AUDIENCE.names).cast(AUDIENCE.schema)),
        ]
        write_table(directory, "audience_features", rows.table())
        write_table(directory, "candidate_rows", pa.table({"audience": pairs[:, 0], "item": pairs[:, 1]}))
        rejects = pa.concat_tables([catalog_rejects, *log_rejects])
        if rejects.num_rows:
            written.append(write_table(directory, "rejects", rejects))
        counts = [*log_counts, *(Count("catalog", where, n) for where, n in catalog_counts.items())]
        jobs, kept = contents_jobs(store, items, latest, out, directory)
        contents = [CopyContents.copy(job) for job in jobs]
        paths = {
            kind: tuple(r.path for r in (*contents, *kept) if r.table == f"contents_{kind}")
            for kind in ("images", "titles")
        }
        n_pairs = sum((c.audience[1] - c.audience[0]) * len(c.items) for c in chunks)
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
                | "Spans"
                >> beam.Create(
                    [(first, min(first + SPAN_ITEMS, items.num_rows)) for first in range(0, items.num_rows, SPAN_ITEMS)]
                )
                | "SpreadSpans" >> beam.Reshuffle()
                | "AlignListings" >> beam.ParDo(AlignListings(worker))
                | "WholeCatalog" >> beam.GroupByKey()
                | "JudgeListings" >> beam.ParDo(JudgeListings(directory, package.version))
                | "WriteQuality"
                >> WriteTable(LISTING_QUALITY, files.join(directory, "listing_quality", f"score_date={score_date}"))
            )
            submitted = pipeline | "SubmittersFiles" >> beam.Create([*written, *contents, *kept])
            tallies = pipeline | "SubmittersCounts" >> beam.Create(counts)
            {
                "files": [scores, quality, submitted] | "AllFiles" >> beam.Flatten(),
                "counts": tallies,
            } | "Finish" >> FinishRun(directory)
        records, found = read_finished(directory)
        check_accounting(found)
        check_reject_rate(found, options.max_reject_rate, read_rejects(records))
        due = expected_rows(chunks, options.top_k, candidates[0] if candidates else None)
        statistics = score_statistics([r.path for r in records if r.table == "scores"])
        check_scores(statistics["range"], sum(r.rows for r in records if r.table == "scores"), due)
        manifest = Manifest(
            stage=STAGE,
            run=run_name,
            request=request,
            inputs=inputs,
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
            "candidates_unknown": candidates[2] if candidates else 0,
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
            histogram=tuple(
                (int(place), int(statistics["histogram"][place])) for place in np.flatnonzero(statistics["histogram"])
            ),
        )
        manifest.options["night"] = asdict(night)
        nights = [
            earlier.options["night"] for earlier in published_manifests(out, NIGHTS) if "night" in earlier.options
        ]
        gates = check_night(night, [Night.from_json(value) for value in nights])
        manifest.gates = [gate.to_json() for gate in gates]
        failed = [gate.words for gate in gates if not gate.passed]
        if failed:
            write_manifest(out, manifest)
            raise HeldBack(
                f"run {run_name} is finished, but {'; '.join(failed)}. The scores of before stay published. "
                f"Look at {directory}; if it is right: camenn publish {directory} --force --reason TEXT"
            )
        publish(out, manifest)
    return manifest.summary


def make_audience(options: ScoreOptions, items: pa.Table, log: Log, timezones: dict[str, str]) -> pa.Table:
    """The audience where the data directory has none: active users, or every store at every 4-hour bucket."""
    if options.audience == "users":
        return by_user(log, timezones, options.timezone)
    listed = set(pc.drop_null(items["store_id"]).to_pylist())
    return by_store(sorted(listed | set(log.stores)) if items["store_id"].null_count else sorted(listed))


def default_date(clicks: Source, orders: Source) -> str:
    """The day after the smaller of both logs' ends: everything known is read."""
    ends = [times.max() for times in (read_times(clicks, "clicked_at"), read_times(orders, "ordered_at")) if len(times)]
    if not ends:
        raise InputError(f"{clicks.files[0]}: both logs are empty. Give --score_date, or a log with rows.")
    end = datetime.datetime.fromtimestamp(int(min(ends)) / 1e6, tz=datetime.UTC).date()
    return (end + datetime.timedelta(days=1)).isoformat()


def expected_rows(chunks: list[Chunk], top_k: int, candidates: np.ndarray | None) -> int:
    """Rows that scores must have: per audience row the smaller of top_k and the listings it meets."""
    total = 0
    for chunk in chunks:
        first, last = chunk.audience
        if candidates is None:
            met = np.full(last - first, len(chunk.items))
        else:
            pairs = candidates[(candidates[:, 0] >= first) & (candidates[:, 0] < last)]
            pairs = pairs[np.isin(pairs[:, 1], chunk.items)]
            met = np.bincount(pairs[:, 0] - first, minlength=last - first)
        total += int(np.minimum(met, top_k).sum() if top_k else met.sum())
    return total


def score_statistics(paths: list[str]) -> dict[str, Any]:
    """Mean, range and histogram of the written cvr column, file by file; a null or NaN raises."""
    total, rows, low, high = 0.0, 0, np.inf, -np.inf
    counts = np.zeros(len(EDGES) + 1, dtype=np.int64)
    for path in paths:
        with files.open_read(path) as handle:
            cvr = pq.read_table(handle, columns=["cvr"])["cvr"].to_numpy()
        if not np.isfinite(cvr).all():
            raise InputError(f"{path}: cvr holds values that are not finite. Nothing was published; train again.")
        total, rows = total + float(cvr.sum(dtype=np.float64)), rows + len(cvr)
        low, high = min(low, float(cvr.min(initial=np.inf))), max(high, float(cvr.max(initial=-np.inf)))
        counts += histogram(cvr.astype(np.float64))
    return {"mean": total / rows if rows else 0.0, "range": (low, high) if rows else None, "histogram": counts}


def count_flag(paths: list[str], flag: str) -> int:
    """Listings that carry a flag."""
    count = 0
    for path in paths:
        with files.open_read(path) as handle:
            count += sum(flag in flags for flags in pq.read_table(handle, columns=["flags"])["flags"].to_pylist())
    return count


def build_parser() -> argparse.ArgumentParser:
    """The flags of `camenn score`."""
    parser = new_parser(
        STAGE, "Score listings for an audience as of a date, judge the listings' photos and titles, and publish both."
    )
    parser.add_argument(
        "--data",
        required=True,
        help="data directory with catalog, clicks, orders and, optionally, users, stores, audience, candidates",
    )
    parser.add_argument("--store", required=True, help="embedding store that `camenn embed` wrote")
    parser.add_argument("--model", required=True, help="model directory that `camenn train` wrote")
    parser.add_argument("--out", required=True, help="scores; made if it is not there")
    parser.add_argument(
        "--score_date",
        help="score as of this date's start, UTC; nothing at or after it is read (default: the day after the logs end)",
    )
    parser.add_argument(
        "--top_k", type=int, default=100, help="listings kept for each audience row, 0 = all (default %(default)s)"
    )
    parser.add_argument(
        "--audience",
        default="auto",
        choices=("auto", "stores", "users"),
        help="auto: the table `audience` or else stores; stores: every store at every 4-hour bucket; users: those active in the last 28 days (default %(default)s)",
    )
    parser.add_argument(
        "--timezone",
        default="UTC",
        help="IANA zone of stores that the table `stores` does not name (default %(default)s)",
    )
    parser.add_argument("--rerun", action="store_true", help="score again although neither inputs nor flags changed")
    add_common_flags(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Parse, run, print."""
    a, beam_flags = parse_with_beam(build_parser(), argv)
    if a.top_k < 0:
        raise InputError(f"--top_k {a.top_k}: must be 0 (all) or more.")
    options = ScoreOptions(
        data=files.absolute(a.data), store=files.absolute(a.store), model=files.absolute(a.model), out=files.absolute(a.out), score_date=a.score_date, top_k=a.top_k, audience=a.audience,
        timezone=a.timezone, max_reject_rate=a.max_reject_rate,
    )  # fmt: skip
    closing_table(STAGE, run(options, beam_flags, rerun=a.rerun), as_json=a.json)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
