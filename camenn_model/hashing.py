"""Hash ids, contents and titles, identically on every machine."""

from __future__ import annotations

import hashlib
import unicodedata
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pandas.util import hash_array

if TYPE_CHECKING:
    pass


def content_key(data: bytes) -> str:
    """Hash the bytes of a photo or title.

    Returns 32 hex digits of sha256.
    """
    return hashlib.sha256(data).hexdigest()[:32]


def stable_hash(column: pa.ChunkedArray | pa.Array) -> NDArray[np.uint64]:
    """Hash each string to 64 bits, uint64 [n].

    Null hashes as the empty string. SipHash with pandas' fixed key, computed once per distinct
    value.
    """
    filled = pc.fill_null(column, "")
    encoded = pc.dictionary_encode(filled)
    if isinstance(encoded, pa.ChunkedArray):
        encoded = encoded.combine_chunks()
    if len(encoded) == 0:
        return np.zeros(0, dtype=np.uint64)
    values = np.asarray(encoded.dictionary.to_pylist(), dtype=object)
    return np.asarray(hash_array(values, categorize=False)[encoded.indices.to_numpy(zero_copy_only=False)])


def normalise_title(title: str | None) -> str:
    """Normalise a title as it is hashed and encoded.

    Unicode NFC, white space collapsed and stripped; '' = no text.
    """
    return " ".join(unicodedata.normalize("NFC", title or "").split())
