"""One hash of ids for all: the same on every machine, in every process and in every version. For size, not for secrecy: whoever guesses an id knows its hash."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pandas.util import hash_array


def stable_hash(column: pa.ChunkedArray | pa.Array) -> NDArray[np.uint64]:
    """64-bit hash of each string, uint64 [n]; null hashes as the empty string. SipHash with pandas' fixed key, computed once per distinct value."""
    filled = pc.fill_null(column, "")
    encoded = pc.dictionary_encode(filled)
    if isinstance(encoded, pa.ChunkedArray):
        encoded = encoded.combine_chunks()
    if len(encoded) == 0:
        return np.zeros(0, dtype=np.uint64)
    values = np.asarray(encoded.dictionary.to_pylist(), dtype=object)
    return np.asarray(hash_array(values, categorize=False)[encoded.indices.to_numpy(zero_copy_only=False)])
