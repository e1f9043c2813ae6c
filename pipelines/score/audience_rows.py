"""Encode the audience rows of a run as arrays."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.features.time_index import Ints


@dataclass(frozen=True)
class AudienceRows:
    """All audience rows, encoded.

    Columns are [S] or [S, ·].
    """

    user: Ints
    store: Ints
    cats: Ints
    values: NDArray[np.float32]
    buckets: Ints
    history: NDArray[np.int32]
    kind: NDArray[np.int8]
    gap: NDArray[np.float32]

    def table(self) -> pa.Table:
        """Return the rows as a table for writing.

        Matrices become fixed-size lists.
        """
        columns: dict[str, pa.Array] = {}
        for name, array in vars(self).items():
            flat = pa.array(array.reshape(-1))
            columns[name] = flat if array.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, array.shape[1])
        return pa.table(columns)

    @classmethod
    def read(cls, table: pa.Table) -> "AudienceRows":
        """Read what `table` wrote."""

        def column(name: str) -> NDArray[Any]:
            array = table[name].combine_chunks()
            return (
                array.flatten().to_numpy().reshape(len(array), -1)
                if pa.types.is_fixed_size_list(array.type)
                else array.to_numpy()
            )

        return cls(**{name: column(name).copy() for name in cls.__dataclass_fields__})

    def batch(self, rows: slice) -> tuple[Any, Ints]:
        """Return some rows as a batch, with their histories' items.

        The result is (AudienceBatch, item rows of its histories).
        """
        from camenn_model.data.batching import audience_batch
        from camenn_model.data.examples import Histories

        history = Histories(self.history, self.kind, self.gap).take(rows)
        return audience_batch(self.cats[rows], self.values[rows], self.buckets[rows], history)
