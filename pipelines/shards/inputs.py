"""Open the inputs of one run of `camenn shards`."""

from dataclasses import asdict, dataclass

from pipelines.features.as_of import FEATURES_VERSION
from pipelines.inputs.data_tables import DataTables
from pipelines.runs.manifest import Manifest, request_fingerprint, require_latest
from pipelines.shards.options import ShardOptions


@dataclass(frozen=True, kw_only=True)
class ShardInputs:
    """The tables and the store that a run reads.

    No event has been read yet.
    """

    tables: DataTables
    store: Manifest
    fingerprints: dict[str, str]
    """Of each input, by name"""
    request: str


def open_inputs(options: ShardOptions) -> ShardInputs:
    """Find the tables and the store.

    Raises:
        InputError: one is missing or of the wrong kind.
    """
    tables = DataTables.find(options.data, options.timezone)
    store = require_latest(options.store, "embed", "--store")
    fingerprints = {name: source.fingerprint for name, source in tables.sources.items()}
    fingerprints["store"] = store.request
    return ShardInputs(
        tables=tables,
        store=store,
        fingerprints=fingerprints,
        request=request_fingerprint(fingerprints, {**asdict(options), "features": FEATURES_VERSION}),
    )
