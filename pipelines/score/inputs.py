"""Read the inputs of the submitter of `camenn score`.

The run and `--plan` share the module.
"""

import datetime
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.inputs.data_tables import DataTables
from pipelines.inputs.logs import read_times
from pipelines.io import files
from pipelines.io.clock import latest_time
from pipelines.io.tables import Source
from pipelines.runs.copies import open_published_package
from pipelines.runs.manifest import Manifest, request_fingerprint, require_latest
from pipelines.score.audience import find_candidates, read_audience
from schemas.audience import AUDIENCE
from schemas.errors import InputError

if TYPE_CHECKING:
    from camenn_model.package import Package


STAGE = "score"


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
    """"fp32", or "bf16" where only listings that can be among a row's best are computed in fp32"""
    shards: str | None = None
    """Shard set on whose latest closed days the model must be calibrated, None = not checked"""


@dataclass(frozen=True, kw_only=True)
class ScoreInputs:
    """The inputs that a run reads, opened and checked.

    No event has been read yet.
    """

    tables: DataTables
    audience: pa.Table | None
    """The table `audience`, where it exists and is requested"""
    candidates: Source | None
    """The table `candidates`, where it exists"""
    store: Manifest
    model: str
    """Output that the package is published in"""
    package: "Package"
    sources: dict[str, Source]
    """The existing tables, by name"""
    fingerprints: dict[str, str]
    """By input: equal fingerprints in two runs mean that nothing changed"""
    request: str


def open_inputs(options: ScoreOptions) -> ScoreInputs:
    """Find the tables, the store and the model.

    It also checks that they fit together.

    Raises:
        InputError: one is missing or of the wrong kind, or the model was trained on other
            embeddings.
    """
    tables = DataTables.find(options.data, options.timezone)
    given = read_audience(options.data) if options.audience == "auto" else None
    store = require_latest(options.store, "embed", "--store")
    model = files.output_place(options.model, "--model")
    package = open_published_package(model)
    if package.config.attention != "prefix":
        raise InputError(
            f"--model {options.model}: was trained with --attention {package.config.attention}, with which "
            "nothing can be computed once for many pairs. Train with --attention prefix."
        )
    check_encoders(store, package.encoders, options.model)
    candidates = find_candidates(options.data)
    sources = tables.sources | ({"audience": given[1]} if given else {})
    fingerprints = {name: source.fingerprint for name, source in sources.items()}
    if candidates is not None:
        fingerprints["candidates"] = candidates.fingerprint
    fingerprints |= {"store": store.request, "model": package.version}
    if options.shards is not None:
        fingerprints["shards"] = require_latest(options.shards, "shards", "--shards").request
    return ScoreInputs(
        tables=tables,
        audience=given[0] if given else None,
        candidates=candidates,
        store=store,
        model=model,
        package=package,
        sources=sources,
        fingerprints=fingerprints,
        request=request_fingerprint(fingerprints, asdict(options)),
    )


def user_fields(users: pa.Table, audience: pa.Table) -> pa.Table:
    """Return the users' columns, a row for each audience row.

    They come from the users table. The audience's own columns take precedence.
    """
    place = pc.index_in(audience["user_id"], value_set=users["user_id"].combine_chunks()).combine_chunks()
    # A null user must not match a null key.
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


def check_encoders(store: Manifest, encoders: dict[str, Any], model: str) -> None:
    """Check that model and store have the same embeddings.

    Raises:
        InputError: the model was trained on other embeddings than the store's.
    """
    for kind in ("image", "text"):
        if store.options[kind]["fingerprint"] != encoders[kind]["fingerprint"]:
            raise InputError(
                f"--model {model}: was trained on embeddings of {encoders[kind]['description']}, the store's are "
                f"of {store.options[kind]['description']}. "
                "Embed with the model's encoders and flags, or train on shards of this store."
            )


def default_date(clicks: Source, orders: Source) -> str:
    """Return the day after the smaller of both logs' ends.

    All known events are then read.
    """
    latest = latest_time()
    ends = [times.max() for times in (read_times(clicks, latest), read_times(orders, latest)) if len(times)]
    if not ends:
        raise InputError(f"{clicks.files[0]}: both logs are empty. Give --score_date, or a log with rows.")
    end = datetime.datetime.fromtimestamp(int(min(ends)) / 1e6, tz=datetime.UTC).date()
    return (end + datetime.timedelta(days=1)).isoformat()
