"""Find the pairs to score, and check that ids join.

A pair is an audience row and a listing that it meets.
"""

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from camenn_model.data.field_encoders import to_float
from pipelines.features.as_of import item_attributes
from pipelines.features.time_index import HOUR_US
from pipelines.inputs.items import load_items
from pipelines.runs.accounting import Count
from pipelines.score.audience import by_store, by_user, read_candidates, score_time
from pipelines.score.audience_rows import AudienceRows
from pipelines.score.coverage import check_ids, check_meeting, id_joins
from pipelines.score.inputs import STAGE, ScoreInputs, ScoreOptions, default_date, user_fields
from pipelines.score.pairs import Pairs, listings_met, plan_chunks
from pipelines.score.snapshot import Log, audience_features, build_log
from schemas.errors import InputError

if TYPE_CHECKING:
    from camenn_model.package import Package


def find_pairs(options: ScoreOptions, inputs: ScoreInputs) -> Pairs:
    """Find the pairs to score.

    Catalog, logs and audience are read for it.

    Raises:
        InputError: there is nothing to score, or two tables write ids differently.
    """
    tables = inputs.tables
    score_date = options.score_date or default_date(tables.clicks, tables.orders)
    moment, weekday = score_time(score_date)
    items, catalog_rejects, catalog_counts = load_items(STAGE, tables.catalog, inputs.store)
    if items.num_rows == 0:
        raise InputError(f"{tables.catalog.files[0]}: table 'catalog' has no usable row: there is nothing to score.")
    window = int(float(inputs.package.meta["attribution_hours"]) * HOUR_US)
    log, log_rejects, log_counts = build_log(
        STAGE, tables.clicks, tables.orders, items["item_id"], item_attributes(items), moment, window
    )
    audience = inputs.audience if inputs.audience is not None else make_audience(options, items, log, tables.timezones)
    if not audience.num_rows:
        named = (
            f"{options.data}: table 'audience' has no row"
            if inputs.audience is not None
            else (
                f"--audience {options.audience}: neither catalog nor logs name a "
                f"{'user who was active in the 28 days' if options.audience == 'users' else 'store'} before "
                f"{score_date}"
            )
        )
        raise InputError(
            f"{named}: there is nobody to score for. Give a table 'audience' with rows, or another --audience."
        )
    audience = audience.sort_by([("store_id", "ascending"), ("audience_id", "ascending")])
    candidates = None
    if inputs.candidates is not None:
        candidates = read_candidates(inputs.candidates, audience["audience_id"], items["item_id"])
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
                f"{candidates.file}: none of {candidates.rows:,} rows of table 'candidates' is a pair to score: "
                f"{candidates.unknown:,} name an audience_id or item_id that is not there, "
                f"{elsewhere:,} a listing of another store than the audience row's. Write ids as in tables "
                "'audience' and 'catalog'."
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
        fields=user_fields(tables.users, audience),
        log=log,
        candidates=asked,
        candidates_unknown=candidates.unknown if candidates else 0,
        chunks=chunks,
        met=met,
        joins=joins,
        rejects=pa.concat_tables([catalog_rejects, *log_rejects]),
        counts=[*counts, *log_counts, *(Count("catalog", where, n) for where, n in catalog_counts.items())],
    )


def encode_audience(package: "Package", pairs: Pairs) -> AudienceRows:
    """Encode the audience rows as the model reads them."""
    audience, space = pairs.audience, package.space
    user = pairs.log.user_codes(audience["user_id"].to_pylist())
    store = pairs.log.store_codes(audience["store_id"].to_pylist())
    counts, history, kind, hours = audience_features(pairs.log, user, package.config.history_length)
    values, buckets = space.encode_numbers(("audience_counts",), counts)
    hour = to_float(audience["hour"]).astype(np.int64)
    cats = space.encode_audience(
        audience["user_id"],
        audience["store_id"],
        hour,
        np.full(len(hour), pairs.weekday),
        pairs.fields,
    )
    gap = np.where(history >= 0, np.log1p(np.maximum(hours, 0)), 0).astype(np.float32)
    return AudienceRows(
        user=user,
        store=store,
        cats=cats,
        values=values,
        buckets=buckets,
        history=history,
        kind=kind,
        gap=gap,
    )


def make_audience(options: ScoreOptions, items: pa.Table, log: Log, timezones: dict[str, str]) -> pa.Table:
    """Make the audience where the data directory has none.

    It has active users, or every store at every 4-hour bucket.
    """
    if options.audience == "users":
        return by_user(log, timezones, options.timezone)
    listed = set(pc.drop_null(items["store_id"]).to_pylist())
    return by_store(sorted(listed | set(log.stores)) if items["store_id"].null_count else sorted(listed))
