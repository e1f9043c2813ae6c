"""Open the inputs of one run of `camenn shards`."""

from dataclasses import asdict, dataclass

import pyarrow as pa

from pipelines.features.as_of import FEATURES_VERSION
from pipelines.inputs.users_and_stores import read_timezones, read_users
from pipelines.io.tables import Source
from pipelines.runs.manifest import Manifest, request_fingerprint, require_latest
from pipelines.shards.options import ShardOptions
from schemas.catalog import CATALOG
from schemas.events import CLICKS, ORDERS


@dataclass(frozen=True, kw_only=True)
class ShardInputs:
    """The tables and the store that a run reads, found and checked.

    No event has been read yet.
    """

    catalog: Source
    clicks: Source
    orders: Source
    users: pa.Table
    timezones: dict[str, str]
    store: Manifest
    fingerprints: dict[str, str]
    """Of each input, by name"""
    request: str


def open_inputs(options: ShardOptions) -> ShardInputs:
    """Find the tables and the store.

    Raises:
        InputError: one is missing or of the wrong kind.
    """
    catalog, clicks, orders = (Source.find(options.data, contract) for contract in (CATALOG, CLICKS, ORDERS))
    users, users_source = read_users(options.data)
    timezones, stores_source = read_timezones(options.data, options.timezone)
    store = require_latest(options.store, "embed", "--store")
    sources = {"catalog": catalog, "clicks": clicks, "orders": orders, "users": users_source, "stores": stores_source}
    fingerprints = {name: source.fingerprint for name, source in sources.items() if source is not None}
    fingerprints["store"] = store.request
    return ShardInputs(
        catalog=catalog,
        clicks=clicks,
        orders=orders,
        users=users,
        timezones=timezones,
        store=store,
        fingerprints=fingerprints,
        request=request_fingerprint(fingerprints, {**asdict(options), "features": FEATURES_VERSION}),
    )
