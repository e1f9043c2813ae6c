"""Split clicks by time.

The parts are train, early stop, calibration and test.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from camenn_model.data.shard_set import date_of
from pipelines.features.time_index import DAY_US
from pipelines.io import files
from pipelines.io.tables import FileRecord
from pipelines.shards.final_days import start_of, write_part

EARLY_STOP_SHARE = 0.06
CALIBRATION_SHARE = 0.06


@dataclass(frozen=True, kw_only=True)
class SplitTimes:
    """Starts of the parts, int64 microseconds.

    Their order is train < gap < early_stop < calibration < gap < test.
    """

    gap: int
    early_stop: int
    calibration: int
    second_gap: int
    test: int

    def part(self, session_start: np.ndarray) -> np.ndarray:
        """Return the number of each session's part, int64 [n].

        Parts are numbered in order of time. There are two gaps.
        """
        edges = np.array([self.gap, self.early_stop, self.calibration, self.second_gap, self.test])
        return np.searchsorted(edges, session_start, side="right")

    def of(self, session_start: np.ndarray) -> np.ndarray:
        """Return the name of each session's part, object [n]."""
        names = np.array(["train", "gap", "early_stop", "calibration", "gap", "test"], dtype=object)
        return names[self.part(session_start)]


def split_times(clicked_at: np.ndarray, window: int, test_share: float) -> SplitTimes:
    """Find the times at which the parts are cut.

    The cut is by time, so that `test_share` of the clicks comes last, with the parts before it in
    order. A window's length of clicks lies unused before early stop and before test: labels of the
    earlier part are then known before the later part starts.

    Args:
        clicked_at: int64 microseconds [n >= 1], of clicks whose window is closed.
        window: attribution window, microseconds.
        test_share: share of clicks in `test`, 0 to 1.
    """
    times = np.sort(clicked_at)

    def at(share: float) -> int:
        return int(times[min(int(max(share, 0.0) * len(times)), len(times) - 1)])

    test = at(1 - test_share)
    second_gap = test - window
    share = float(np.searchsorted(times, second_gap)) / len(times)
    calibration = at(share - CALIBRATION_SHARE)
    early_stop = at(share - CALIBRATION_SHARE - EARLY_STOP_SHARE)
    return SplitTimes(
        gap=early_stop - window, early_stop=early_stop, calibration=calibration, second_gap=second_gap, test=test
    )


def split_records(records: list[FileRecord], splits: SplitTimes, directory: str) -> list[FileRecord]:
    """Enter final days under their present splits.

    A file that a split boundary cuts is written again, in pieces, under `directory`.
    """
    found = []
    for number, record in enumerate(records):
        day = start_of(date_of(record.path)) + np.array([0, DAY_US - 1])
        first, last = splits.part(day)
        if first == last:
            found.append(replace(record, split=str(splits.of(day)[0])))
            continue
        # A boundary cuts the day: the session times show whether it cuts the file.
        with files.open_read(record.path) as handle:
            pieces = list(cut_splits(pq.read_table(handle), splits))
        if len(pieces) == 1:
            found.append(replace(record, split=pieces[0][0]))
            continue
        found += [
            write_part(directory, date_of(record.path), f"kept-{number}-{piece}", split, rows)
            for piece, (split, rows) in enumerate(pieces)
        ]
    return found


def cut_splits(table: pa.Table, splits: SplitTimes) -> Iterator[tuple[str, pa.Table]]:
    """Cut rows by the split that they belong to.

    The rows are ordered by session_start. Yields (split, rows) for each part of the log.
    """
    start = table["session_start"].cast(pa.int64()).to_numpy()
    part = splits.part(start)
    bounds = np.concatenate([[0], np.flatnonzero(np.diff(part)) + 1, [len(part)]])
    for low, high in zip(bounds[:-1], bounds[1:], strict=True):
        if high > low:
            yield str(splits.of(start[low : low + 1])[0]), table.slice(low, high - low)
