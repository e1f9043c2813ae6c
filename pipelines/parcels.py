"""Tables on their way through a shuffle: as Arrow IPC bytes, or as places in files.

FnApiRunner holds every shuffle in memory, several times over. On a machine's own disk a shuffle need not travel: workers append their tables to files of the
run's scratch directory, and what is shuffled is where they lie. Other runners spill by themselves, and their workers may not share a disk: there the bytes travel.
"""

import os
import uuid
from typing import BinaryIO

import pyarrow as pa

from pipelines import files

Parcel = bytes | tuple[str, int, int]
"""Arrow IPC bytes, or (path, offset, length) of them. A tuple, as Beam codes those of plain values quickly."""


class Packer:
    """Packs tables into parcels; travels to workers, and opens its file there.

    Args:
        scratch: directory of the files, on a disk that all workers share; None = parcels are bytes.
        compression: lz4 is the faster one, zstd the smaller.
    """

    def __init__(self, scratch: str | None, compression: str = "lz4") -> None:
        self.scratch, self.compression = scratch, compression
        self._file: BinaryIO | None = None

    def __getstate__(self) -> dict[str, object]:
        return {"scratch": self.scratch, "compression": self.compression, "_file": None}

    def pack(self, table: pa.Table) -> Parcel:
        """The table's parcel; it can be unpacked at once."""
        data = files.ipc_bytes(table, self.compression)
        if self.scratch is None:
            return data
        if self._file is None:
            os.makedirs(self.scratch, exist_ok=True)
            # A name of its own: a bundle that is tried again leaves the first attempt's file alone.
            self._file = open(os.path.join(self.scratch, f"{uuid.uuid4().hex}.arrows"), "ab")  # noqa: SIM115 - closed by `close`
        start = self._file.tell()
        self._file.write(data)
        self._file.flush()
        return (self._file.name, start, len(data))

    def close(self) -> None:
        """End the file; the next table begins another one."""
        if self._file is not None:
            self._file.close()
            self._file = None


def unpack(parcel: Parcel) -> pa.Table:
    """The table of a parcel."""
    if isinstance(parcel, tuple):
        path, start, length = parcel
        with open(path, "rb") as handle:
            handle.seek(start)
            parcel = handle.read(length)
    return files.ipc_table(parcel)
