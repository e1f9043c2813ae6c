"""Release freed memory to the system.

Allocators keep freed memory for reuse, but the next stage of a long-lived process may not reuse it.
"""

import ctypes
import sys

import pyarrow as pa


def release_memory() -> None:
    """Release unused memory to the system.

    Arrow and, on Linux, the C library hold it unused. Releasing takes milliseconds and touches no
    values.
    """
    pa.default_memory_pool().release_unused()
    if sys.platform == "linux":
        # Only glibc has it.
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
