"""Distinguish a shard set's final days from its open days.

The module determines which days are final, which files a run keeps of the previous run, and which
part of the log each file belongs to.

A day is that of a session's start, UTC. It may change until attribution and late orders are over.
Then it is final, and the next run keeps its files unchanged, whatever the logs contain by then. The
labels of a day that is still open are computed again. Features keep the values from when a row was
first built.
"""

import datetime
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from camenn_model.data.shard_set import UNIT_ROWS, date_of
from camenn_model.hashing import stable_hash
from pipelines.features.as_of import FEATURES_VERSION
from pipelines.features.time_index import DAY_US, day_of
from pipelines.io import files
from pipelines.io.clock import can_be
from pipelines.io.rejects import keep_usable
from pipelines.io.tables import FileRecord, Slice, read_slice
from pipelines.runs.manifest import Manifest
from schemas.contract import Contract, check_output
from schemas.errors import InputError
from schemas.training import EXAMPLES

SAMPLE_SIZE = 16
"""Exposures of each day that are sampled and kept: the next run finds them again in a log that only grew."""
ROW_SETTINGS = ("attribution_hours", "history", "timezone")
"""Flags that rows depend on: days built under different values cannot be combined."""


def start_of(date: str) -> int:
    """Return a date's midnight, int64 microseconds.

    That is the midnight at which the date begins.
    """
    return (datetime.date.fromisoformat(date) - datetime.date(1970, 1, 1)).days * DAY_US


def read_starts(record: FileRecord) -> np.ndarray:
    """Read `session_start` of an example file, int64 microseconds."""
    starts = read_whole(record.path, ["session_start"])["session_start"]
    return starts.cast(pa.int64()).to_numpy()


def read_whole(path: str, columns: list[str] | None = None) -> pa.Table:
    """Read a file of ours, or some columns of it."""
    with files.open_read(path) as handle:
        return pq.ParquetFile(handle).read(columns=columns)


def write_part(directory: str, date: str, name: str, split: str, rows: pa.Table) -> FileRecord:
    """Write some of a day's examples, all of one split."""
    path = files.join(directory, f"date={date}", f"part-{name}.parquet")
    written = files.write_parquet(path, check_output(rows, EXAMPLES), row_group_size=UNIT_ROWS)
    return FileRecord.of("examples", path, rows.num_rows, written, split)


@dataclass(frozen=True, kw_only=True)
class Kept:
    """The part of the published run that stays."""

    frozen_before: int = 0
    """Sessions that started before are not built again, int64 microseconds"""
    records: list[FileRecord] = field(default_factory=list)
    """Example files of the final days"""
    open_paths: dict[str, list[str]] = field(default_factory=dict)
    """By date: example files of the days that may still change"""
    samples: dict[str, list[int]] = field(default_factory=dict)
    """By date: a sample of the log that these days were built from (`sample_days`)"""

    @property
    def dates(self) -> set[str]:
        """Return the dates of the final days."""
        return {date_of(record.path) for record in self.records}


def keep_days(latest: Manifest | None, settings: dict[str, object], as_of: int, late: int, out: str) -> Kept:
    """Return the part of the published run that stays.

    It is empty where there is no published run.

    Args:
        latest: manifest of the published run.
        settings: `ROW_SETTINGS` of this run.
        as_of: of this run.
        late: microseconds after a day's end until it is final: attribution window and late orders.
        out: the shard set, for messages.

    Raises:
        InputError: rows of this run would not fit those of the published one, or one of its files
            is lost or damaged.
    """
    if latest is None:
        return Kept()
    remedy = "Give --rebuild to build all days again, or another --out."
    for name, value in settings.items():
        if latest.options.get(name) != value:
            raise InputError(
                f"--{name} {value}: the days in {out} were built with {latest.options.get(name)}. {remedy}"
            )
    if latest.tables["examples"]["fingerprint"] != EXAMPLES.fingerprint() or "days" not in latest.options:
        raise InputError(f"--out {out}: its examples have the columns of another version of camenn. {remedy}")
    if latest.options["days"].get("features") != FEATURES_VERSION:
        raise InputError(f"--out {out}: another version of camenn computed its features in another way. {remedy}")
    before = int(latest.options["days"]["as_of"])
    if as_of < before:
        raise InputError(
            f"--as_of {np.datetime64(as_of, 'us')}: the days in {out} were built as of "
            f"{np.datetime64(before, 'us')}, which is later. {remedy}"
        )
    # All of them are checked, also those that this run does not read: it publishes them again.
    latest.check("examples")
    frozen_before = (before - late) // DAY_US * DAY_US
    final: list[FileRecord] = []
    open_paths: dict[str, list[str]] = {}
    for record in latest.records("examples"):
        date = date_of(record.path)
        if start_of(date) < frozen_before:
            final.append(record)
        else:
            open_paths.setdefault(date, []).append(record.path)
    return Kept(
        frozen_before=frozen_before,
        records=final,
        open_paths=open_paths,
        samples={date: list(found) for date, found in latest.options["days"].get("samples", {}).items()},
    )


def sample_days(
    contract: Contract, slices: Iterable[Slice], latest: int, known: dict[str, list[int]] | None = None
) -> dict[str, list[int]]:
    """Take a bottom-k sample of each day's clicks.

    The sample (KMV) holds the `SAMPLE_SIZE` smallest of the numbers, uint64, of the day's clicks.
    Late clicks hardly change it.

    A click's number begins with 32 bits of its time's hash and ends with 32 of its exposure's.
    Exposures are hashed only where a time may be among the smallest.

    Args:
        contract: of clicks.
        slices: row groups to read.
        latest: clicks after it are impossible (`pipelines.io.clock.latest_time`).
        known: the sample of the other row groups.
    """
    found = {start_of(date) // DAY_US: np.array(numbers, dtype=np.uint64) for date, numbers in (known or {}).items()}
    names = ("exposure_id", "clicked_at")
    contract = replace(contract, columns=tuple(c for c in contract.columns if c.name in names))
    for where in slices:
        table = keep_usable(read_slice(where, contract, list(names)), contract)
        time = table["clicked_at"].cast(pa.int64()).to_numpy()
        possible = can_be(time, latest)
        if not possible.all():
            table, time = table.filter(pa.array(possible)), time[possible]
        mixed, day = mix(time), time // DAY_US
        for value in np.unique(day):
            rows = np.flatnonzero(day == value)
            rows = rows[mixed[rows] <= _least(mixed[rows], SAMPLE_SIZE)[-1]]
            exposure = stable_hash(table["exposure_id"].take(pa.array(rows)))
            numbers = mixed[rows] << np.uint64(32) | exposure & np.uint64(2**32 - 1)
            found[value] = np.unique(np.concatenate([found.get(value, numbers[:0]), numbers]))[:SAMPLE_SIZE]
    return {day_of(int(day) * DAY_US): [int(value) for value in values] for day, values in sorted(found.items())}


def mix(time: np.ndarray) -> np.ndarray:
    """Mix each time into 32 bits.

    Close times get distant values. The result is uint64 [n]. This is the finalizer of SplitMix64
    (Steele et al. 2014).
    """
    bits = time.astype(np.uint64)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (bits ^ (bits >> np.uint64(31))) >> np.uint64(32)


def _least(values: np.ndarray, count: int) -> np.ndarray:
    """Return the `count` smallest distinct values in order.

    All distinct values are returned where there are fewer.
    """
    size = 4 * count
    while size < len(values):
        # Values that stand several times may leave fewer distinct ones.
        least = np.unique(np.partition(values, size - 1)[:size])
        if len(least) >= count:
            return least[:count]
        size *= 4
    return np.unique(values)[:count]


def check_same_log(kept: Kept, now: dict[str, list[int]], out: str) -> None:
    """Check that final days are still those that were built.

    A log may grow, late clicks may arrive, and old days may leave it. But a final day's clicks must
    be those that it was built from.

    Raises:
        InputError: most exposures of a final day are not in the log any more.
    """
    # Part of the day at which the log begins may have left it.
    first = min(now, default="")
    for date in sorted((kept.dates & now.keys() & kept.samples.keys()) - {first}):
        known = kept.samples[date]
        # Late clicks push some of the smallest hashes out of the sample, and none of those below its end.
        end = now[date][-1] if len(now[date]) == SAMPLE_SIZE else np.inf
        expected = [value for value in known if value <= end]
        missing = len(set(expected) - set(now[date]))
        if expected and missing > len(expected) / 2:
            raise InputError(
                f"table 'clicks': the clicks of {date} are not those that {out} was built from: {missing} of "
                f"{len(expected)} sampled exposures are gone. "
                "Give --rebuild to build all days again, or another --out."
            )


def keep_features(rows: pa.Table, paths: list[str]) -> pa.Table:
    """Restore the features of an open day's earlier examples.

    Examples that earlier runs built keep those runs' features. Labels are the new ones.
    """
    if not paths or not rows.num_rows:
        return rows
    rows = check_output(rows, EXAMPLES)
    earlier = pa.concat_tables([read_whole(path) for path in paths])
    keys = pa.concat_tables([earlier.select(EXAMPLES.key), rows.select(EXAMPLES.key)]).to_pandas()
    group = keys.groupby(list(EXAMPLES.key), sort=False).ngroup().to_numpy()
    place = pd.Series(np.arange(earlier.num_rows), index=group[: earlier.num_rows])
    old = place.reindex(group[earlier.num_rows :]).to_numpy()
    known = ~np.isnan(old)
    stay = earlier.take(pa.array(old[known].astype(np.int64)))
    label = rows.column_names.index("label")
    stay = stay.set_column(label, rows.schema.field("label"), rows["label"].filter(pa.array(known)))
    return pa.concat_tables([stay, rows.filter(pa.array(~known))])


def delisted_items(items: pa.Table, earlier: list[str], kept: list[FileRecord]) -> pa.Table:
    """Return listings of final days that left the catalog.

    They are the listings of the earlier `items` files that final days refer to and the catalog no
    longer has.
    """
    if not earlier or not kept:
        return items.slice(0, 0)
    before = pa.concat_tables([read_whole(path) for path in earlier])
    gone = before.filter(pc.invert(pc.is_in(before["item_id"], items["item_id"].combine_chunks())))
    if not gone.num_rows:
        return items.slice(0, 0)
    wanted = pa.chunked_array(
        [pc.unique(read_whole(record.path, ["item_id"])["item_id"].combine_chunks()) for record in kept]
    ).unique()
    return gone.filter(pc.is_in(gone["item_id"], wanted)).select(items.column_names).cast(items.schema)
