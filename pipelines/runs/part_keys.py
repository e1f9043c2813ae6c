"""Keys files: parts of the store without their embeddings.

Each committed part `part-X.parquet` has a small file `part-X.keys.parquet` beside it, some 100 bytes
a row, so that whoever asks what is stored does not open the part. Parts of earlier versions of
camenn have none: then the part itself is read.
"""

import hashlib
import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from camenn_model.integrity import DamagedError
from pipelines.io import files
from pipelines.io.files import Written
from pipelines.io.tables import open_parquet
from schemas.embeddings import ROW_GROUP_COLUMN
from schemas.manifest import remedy

_GROUP = pa.field(ROW_GROUP_COLUMN, pa.int32(), nullable=False)
KEYS_ENDING = ".keys.parquet"


def keys_path(part: str) -> str:
    """Return the path of a part's keys file."""
    return part.removesuffix(".parquet") + KEYS_ENDING


def marker_path(part: str) -> str:
    """Return the path of a part's commit marker."""
    return part.removesuffix(".parquet") + ".json"


def files_of_part(path: str) -> tuple[str, str, str]:
    """Return a part, its keys file and its marker.

    `path` is one of them. In this order they may be removed: the marker vouches for the others.
    """
    for ending in (KEYS_ENDING, ".parquet", ".json"):
        if path.endswith(ending):
            part = path.removesuffix(ending) + ".parquet"
            return part, keys_path(part), marker_path(part)
    raise ValueError(f"{path}: is no file of a part")


def write_keys(part: str, rows: pa.Table, row_group: int) -> Written:
    """Write a part's keys file.

    `rows`: the part's columns without `embedding`, in its order. `row_group`: rows of each of its
    row groups but the last.
    """
    group = pa.array(np.arange(rows.num_rows, dtype=np.int32) // row_group)
    keys = rows.replace_schema_metadata(None).append_column(_GROUP, group)
    return files.write_parquet(keys_path(part), keys, durable=True)


def read_keys(path: str, size: int, sha256: str, columns: list[str]) -> pa.Table:
    """Read columns of a keys file.

    It is read whole and held against its checksum.

    Raises:
        DamagedError: it is gone, or is not what was written.
    """
    advice = remedy("embed", "image_keys")
    try:
        with files.open_read(path) as handle:
            data = handle.read()
    except FileNotFoundError as error:
        raise DamagedError(f"{path}: this file is gone (`camenn gc` removed it, or it was lost). {advice}") from error
    if len(data) != size or hashlib.sha256(data).hexdigest() != sha256:
        raise DamagedError(f"{path}: its bytes are not those that were written (size or SHA-256 differs). {advice}")
    return pq.read_table(io.BytesIO(data), columns=columns)


def read_part(path: str, columns: list[str]) -> pa.Table:
    """Read the same of a part without keys file.

    Row groups are included.
    """
    with files.open_read(path) as handle:
        parquet = open_parquet(handle)
        table = parquet.read(columns=[name for name in columns if name != ROW_GROUP_COLUMN])
        rows = [parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)]
    if ROW_GROUP_COLUMN in columns:
        groups = np.repeat(np.arange(len(rows), dtype=np.int32), rows)
        table = table.append_column(_GROUP, pa.array(groups))
    return table.replace_schema_metadata(None)
