"""Encode a field's values: vocabularies, hashed ids, buckets of numbers."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from camenn_model.hashing import stable_hash

MISSING, RARE = 0, 1
QUANTILE_BUCKETS = 16
MAX_VOCABULARY = 4_096
MIN_ID_CLICKS = 5
"""Clicks in training below which an id shares the bucket of rare ones: fewer are indistinguishable from noise."""
ID_TABLE = 65_536


@dataclass(frozen=True)
class Vocabulary:
    """Values of a categorical column.

    Code 0 = null or unknown, else 1 + place in `values`.
    """

    values: tuple[str, ...]

    @property
    def size(self) -> int:
        """Return the rows of the embedding table."""
        return max(2, 1 + len(self.values))

    @classmethod
    def fit(cls, column: pa.ChunkedArray | pa.Array) -> "Vocabulary":
        """Fit on the most frequent values.

        They are at most 4,096, ordered by name. Ties in frequency go to the first by name.
        """
        counts = column.to_pandas().value_counts().sort_index().sort_values(ascending=False, kind="stable")
        return cls(tuple(sorted(str(value) for value in counts.index[:MAX_VOCABULARY])))

    def encode(self, column: pa.ChunkedArray | pa.Array) -> NDArray[np.int64]:
        """Return codes, int64 [n]."""
        found = pc.index_in(column.cast(pa.string()), value_set=pa.array(self.values, pa.string()))
        codes = pc.add(pc.fill_null(found, -1), 1)
        codes = codes.to_numpy(zero_copy_only=False) if isinstance(codes, pa.Array) else codes.to_numpy()
        # index_in finds a null value only if the vocabulary holds one, and it never does.
        return codes.astype(np.int64)


@dataclass(frozen=True)
class HashedIds:
    """Frequent ids, by their hashes, in a bounded table.

    Code 0 = dropped out, 1 = rare.
    """

    frequent: tuple[int, ...]
    table: int

    @property
    def size(self) -> int:
        """Return the rows of the embedding table."""
        return self.table + 2

    @classmethod
    def fit(cls, column: pa.ChunkedArray | pa.Array) -> "HashedIds":
        """Fit on the ids that are frequent in training.

        They have at least `MIN_ID_CLICKS` rows in the training part. The table has two slots for
        each, at most 65,536.
        """
        hashes, counts = np.unique(stable_hash(column), return_counts=True)
        frequent = hashes[counts >= MIN_ID_CLICKS]
        return cls(tuple(int(value) for value in frequent), int(min(ID_TABLE, max(2, 2 * len(frequent)))))

    def encode(self, column: pa.ChunkedArray | pa.Array) -> NDArray[np.int64]:
        """Return codes, int64 [n].

        The code of a null id is 0.
        """
        hashes = stable_hash(column)
        frequent = np.isin(hashes, np.asarray(self.frequent, dtype=np.uint64))
        codes = np.where(frequent, 2 + (hashes % np.uint64(self.table)).astype(np.int64), RARE)
        return np.where(np.asarray(pc.is_null(column)), MISSING, codes)


@dataclass(frozen=True)
class Numeric:
    """Bucket boundaries, normaliser and range of a numeric column.

    NaN is bucket 0. A common value has a bucket of its own, and quantiles divide the others.

    A value beyond the training range is clipped to its end. A slope would extrapolate there without
    data, and some columns leave the range as the log grows, such as a listing's age. Of a column
    that was never known in training the range is empty, and each value is missing: nothing was
    learned of it.
    """

    boundaries: tuple[float, ...]
    log: bool
    mean: float
    std: float
    lowest: float
    highest: float

    @property
    def size(self) -> int:
        """Return the number of buckets.

        The one for missing values is included.
        """
        return len(self.boundaries) + 2

    @classmethod
    def fit(cls, values: NDArray[np.float32]) -> "Numeric":
        """Fit buckets and normaliser on values.

        There are at most 16 common values, and 16 quantiles of the others. log1p is applied where
        values are non-negative and span more than a fixed factor.
        """
        finite = values[np.isfinite(values)].astype(np.float64)
        if not len(finite):
            return cls((), False, 0.0, 1.0, 0.0, -1.0)
        distinct, counts = np.unique(finite, return_counts=True)
        # Most counts are 0 most of the time: a value that alone would fill whole quantile buckets
        # gets one of its own, and the others share the rest.
        common = distinct[counts > len(finite) / QUANTILE_BUCKETS]
        rest = finite[~np.isin(finite, common)]
        quantiles = (
            np.quantile(rest, np.linspace(0, 1, QUANTILE_BUCKETS + 1)[1:], method="lower") if len(rest) else rest
        )
        below = distinct[np.maximum(np.searchsorted(distinct, common) - 1, 0)]
        boundaries = tuple(float(b) for b in np.unique(np.concatenate([quantiles, common, below]))[:-1])
        lowest, highest = float(distinct[0]), float(distinct[-1])
        log = lowest >= 0 and highest > 5
        shown = np.log1p(finite) if log else finite
        return cls(boundaries, log, float(shown.mean()), float(max(shown.std(), 1e-6)), lowest, highest)

    def encode(self, values: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Return normalised values and buckets.

        Values are float32 [n], clipped to ±5, 0 where missing. Buckets are int64 [n].
        """
        missing = ~np.isfinite(values) | (self.lowest > self.highest)
        safe = np.clip(np.where(missing, self.lowest, values).astype(np.float64), self.lowest, self.highest)
        shown = np.log1p(safe) if self.log else safe
        normalised = np.clip((shown - self.mean) / self.std, -5, 5)
        buckets = np.searchsorted(np.asarray(self.boundaries), safe, side="left") + 1
        return np.where(missing, 0, normalised).astype(np.float32), np.where(missing, MISSING, buckets).astype(np.int64)


def to_float(column: pa.ChunkedArray | pa.Array) -> NDArray[np.float32]:
    """Convert to float32 [n], null as NaN."""
    return pd.to_numeric(column.to_pandas()).to_numpy(dtype=np.float32, na_value=np.nan)
