"""What the submitter of `camenn score` reads, and which pairs there are to score: shared by the run and by `--plan`."""

import datetime
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from camenn_model.feature_space import to_float
from pipelines.attribution import HOUR_US
from pipelines.audience import by_store, by_user, has_candidates, read_audience, read_candidates, score_time
from pipelines.clock import latest_time
from pipelines.coverage import check_ids, check_meeting, id_joins
from pipelines.dimensions import read_timezones, read_users
from pipelines.events import read_times
from pipelines.examples import item_attributes
from pipelines.features import Ints
from pipelines.items import load_items, local_only
from pipelines.joins import Join
from pipelines.manifest import Count, Manifest, request_fingerprint, require_latest
from pipelines.score_tiles import AudienceRows, Tile
from pipelines.snapshot import Log, audience_features, build_log
from pipelines.tables import Source
from schemas.audience import AUDIENCE, CANDIDATES
from schemas.catalog import CATALOG
from schemas.contract import InputError
from schemas.events import CLICKS, ORDERS

if TYPE_CHECKING:
    from camenn_model.checkpoint import Package

STAGE = "score"
TILE_ITEMS = 512
CHUNK_ROWS = 512


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
    precision: str = "fp32"
    """"fp32", or "bf16" where only what can be among a row's best is computed in fp32"""
    shards: str | None = None
    """Shard set on whose latest closed days the model must be calibrated; None = not asked"""


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Audience rows [first, last) and the listings that they meet."""

    audience: tuple[int, int]
    items: Ints


@dataclass(frozen=True, kw_only=True)
class ScoreInputs:
    """What a run reads, opened and checked; no event has been read yet."""

    catalog: Source
    clicks: Source
    orders: Source
    users: pa.Table
    timezones: dict[str, str]
    audience: pa.Table | None
    """The table `audience`, where it is there and asked for"""
    store: Manifest
    package: "Package"
    sources: dict[str, Source]
    """The tables that are there, by name"""
    fingerprints: dict[str, str]
    """Of each input: those of one run and the next tell whether there is anything to do"""
    request: str


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """The pairs to score, and all that their features come from."""

    score_date: str
    weekday: int
    items: pa.Table
    audience: pa.Table
    """Ordered by store and audience_id"""
    log: Log
    candidates: Ints | None
    """Rows of (audience, item) that were asked for, int64 [n, 2]; None = all"""
    candidates_unknown: int
    chunks: list[Chunk]
    rejects: pa.Table
    counts: list[Count]
    joins: dict[str, Join]
    """How the ids of the tables join, by the gate's name"""

    met: Ints
    """How many listings each audience row is scored against, int64 [S]"""

    @property
    def count(self) -> int:
        """Pairs that are computed."""
        return self.rows(0)

    def rows(self, top_k: int) -> int:
        """Rows that scores must have: per audience row the smaller of top_k (0 = all) and the listings it meets."""
        return int(np.minimum(self.met, top_k).sum() if top_k else self.met.sum())


def open_inputs(options: ScoreOptions) -> ScoreInputs:
    """Find the tables, the store and the model, and check that they fit together.

    Raises:
        InputError: one is missing or of the wrong kind, or the model was trained on other embeddings.
    """
    from camenn_model.checkpoint import open_package

    catalog, clicks, orders = (Source.find(options.data, contract) for contract in (CATALOG, CLICKS, ORDERS))
    users, users_source = read_users(options.data)
    timezones, stores_source = read_timezones(options.data, options.timezone)
    given = read_audience(options.data) if options.audience == "auto" else None
    store = require_latest(options.store, "embed", "--store")
    package = open_package(local_only(options.model, "--model"))
    if package.config.attention != "prefix":
        raise InputError(
            f"--model {options.model}: was trained with --attention {package.config.attention}, with which nothing can be computed once for many pairs. Train with --attention prefix."
        )
    check_encoders(store, package.encoders, options.model)
    optional = {"users": users_source, "stores": stores_source, "audience": given[1] if given else None}
    sources = {"catalog": catalog, "clicks": clicks, "orders": orders}
    sources |= {name: source for name, source in optional.items() if source is not None}
    fingerprints = {name: source.fingerprint for name, source in sources.items()}
    if has_candidates(options.data):
        fingerprints["candidates"] = Source.find(options.data, CANDIDATES).fingerprint
    fingerprints |= {"store": store.request, "model": package.version}
    if options.shards is not None:
        fingerprints["shards"] = require_latest(options.shards, "shards", "--shards").request
    return ScoreInputs(
        catalog=catalog,
        clicks=clicks,
        orders=orders,
        users=users,
        timezones=timezones,
        audience=given[0] if given else None,
        store=store,
        package=package,
        sources=sources,
        fingerprints=fingerprints,
        request=request_fingerprint(fingerprints, asdict(options)),
    )


def find_pairs(options: ScoreOptions, inputs: ScoreInputs) -> Pairs:
    """Read catalog, logs and audience, and tell which pairs there are.

    Raises:
        InputError: nothing is there to score, or ids are written otherwise in one table than in another.
    """
    score_date = options.score_date or default_date(inputs.clicks, inputs.orders)
    moment, weekday = score_time(score_date)
    items, catalog_rejects, catalog_counts = load_items(STAGE, inputs.catalog, inputs.store)
    if items.num_rows == 0:
        raise InputError(f"{inputs.catalog.files[0]}: table 'catalog' has no usable row: there is nothing to score.")
    window = int(float(inputs.package.meta["attribution_hours"]) * HOUR_US)
    log, log_rejects, log_counts = build_log(
        STAGE, inputs.clicks, inputs.orders, items["item_id"], item_attributes(items), moment, window
    )
    audience = inputs.audience if inputs.audience is not None else make_audience(options, items, log, inputs.timezones)
    if not audience.num_rows:
        named = (
            f"{options.data}: table 'audience' has no row"
            if inputs.audience is not None
            else f"--audience {options.audience}: neither catalog nor logs name a {'user who was active in the 28 days' if options.audience == 'users' else 'store'} before {score_date}"
        )
        raise InputError(
            f"{named}: there is nobody to score for. Give a table 'audience' with rows, or another --audience."
        )
    audience = audience.sort_by([("store_id", "ascending"), ("audience_id", "ascending")])
    candidates = read_candidates(options.data, audience["audience_id"], items["item_id"])
    joins = id_joins(inputs, audience, items, log, log_counts, candidates)
    check_ids(joins)
    asked = candidates.pairs if candidates else None
    chunks = plan_chunks(audience, items, asked)
    met = listings_met(chunks, asked, audience.num_rows)
    counts = [
        Count("audience", "in", audience.num_rows),
        Count("audience", "out", int((met > 0).sum())),
        Count("audience", "no_listing", int((met == 0).sum())),
    ]
    if candidates:
        computed = int(met.sum())
        elsewhere = len(candidates.pairs) - computed
        if not computed:
            raise InputError(
                f"{candidates.file}: none of {candidates.rows:,} rows of table 'candidates' is a pair to score: {candidates.unknown:,} name an audience_id or item_id that is not there, "
                f"{elsewhere:,} a listing of another store than the audience row's. Write ids as in tables 'audience' and 'catalog'."
            )
        counts += [
            Count("candidates", "in", candidates.rows),
            Count("candidates", "unknown_id", candidates.unknown),
            Count("candidates", "duplicates", candidates.copies),
            Count("candidates", "other_store", elsewhere),
            Count("candidates", "out", computed),
        ]
    else:
        check_meeting(met, joins["store_id"])
    return Pairs(
        score_date=score_date,
        weekday=weekday,
        items=items,
        audience=audience,
        log=log,
        candidates=asked,
        candidates_unknown=candidates.unknown if candidates else 0,
        chunks=chunks,
        met=met,
        joins=joins,
        rejects=pa.concat_tables([catalog_rejects, *log_rejects]),
        counts=[*counts, *log_counts, *(Count("catalog", where, n) for where, n in catalog_counts.items())],
    )


def user_fields(inputs: ScoreInputs, audience: pa.Table) -> pa.Table:
    """Return the users' columns, a row for each audience row: they come from the users table, the audience's own go before."""
    users = inputs.users
    place = pc.index_in(audience["user_id"], value_set=users["user_id"].combine_chunks()).combine_chunks()
    # A null user must not be found as a null key.
    place = pc.if_else(pc.is_null(audience["user_id"]).combine_chunks(), pa.scalar(None, pa.int32()), place)
    fields = users.take(place)
    for name in audience.column_names:
        if name not in AUDIENCE.names:
            column = audience[name]
            known = fields[name] if name in fields.column_names else pa.nulls(audience.num_rows, pa.string())
            merged = pc.coalesce(column, known)
            fields = fields.drop_columns([name]) if name in fields.column_names else fields
            fields = fields.append_column(name, merged)
    return fields


def encode_audience(inputs: ScoreInputs, pairs: Pairs) -> AudienceRows:
    """Audience rows as the model reads them."""
    audience, space = pairs.audience, inputs.package.space
    user = pairs.log.user_codes(audience["user_id"].to_pylist())
    store = pairs.log.store_codes(audience["store_id"].to_pylist())
    counts, history, kind, hours = audience_features(pairs.log, user, inputs.package.config.history_length)
    values, buckets = space.encode_numbers(("audience_counts",), counts)
    hour = to_float(audience["hour"]).astype(np.int64)
    cats = space.encode_audience(
        audience["user_id"],
        audience["store_id"],
        hour,
        np.full(len(hour), pairs.weekday),
        user_fields(inputs, audience),
    )
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


def plan_chunks(audience: pa.Table, items: pa.Table, candidates: Ints | None) -> list[Chunk]:
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


def listings_met(chunks: list[Chunk], candidates: Ints | None, audience_rows: int) -> Ints:
    """How many listings each audience row is scored against, int64 [S]."""
    met = np.zeros(audience_rows, dtype=np.int64)
    for chunk in chunks:
        first, last = chunk.audience
        if candidates is None:
            met[first:last] = len(chunk.items)
        else:
            pairs = candidates[(candidates[:, 0] >= first) & (candidates[:, 0] < last)]
            pairs = pairs[np.isin(pairs[:, 1], chunk.items)]
            met[first:last] = np.bincount(pairs[:, 0] - first, minlength=last - first)
    return met


def check_encoders(store: Manifest, encoders: dict[str, Any], model: str) -> None:
    """Raises InputError where the model was trained on other embeddings than the store's."""
    for kind in ("image", "text"):
        if store.options[kind]["fingerprint"] != encoders[kind]["fingerprint"]:
            raise InputError(
                f"--model {model}: was trained on embeddings of {encoders[kind]['description']}, the store's are of {store.options[kind]['description']}. "
                "Embed with the model's encoders and flags, or train on shards of this store."
            )


def make_audience(options: ScoreOptions, items: pa.Table, log: Log, timezones: dict[str, str]) -> pa.Table:
    """The audience where the data directory has none: active users, or every store at every 4-hour bucket."""
    if options.audience == "users":
        return by_user(log, timezones, options.timezone)
    listed = set(pc.drop_null(items["store_id"]).to_pylist())
    return by_store(sorted(listed | set(log.stores)) if items["store_id"].null_count else sorted(listed))


def default_date(clicks: Source, orders: Source) -> str:
    """The day after the smaller of both logs' ends: everything known is read."""
    latest = latest_time()
    ends = [times.max() for times in (read_times(clicks, latest), read_times(orders, latest)) if len(times)]
    if not ends:
        raise InputError(f"{clicks.files[0]}: both logs are empty. Give --score_date, or a log with rows.")
    end = datetime.datetime.fromtimestamp(int(min(ends)) / 1e6, tz=datetime.UTC).date()
    return (end + datetime.timedelta(days=1)).isoformat()
