"""Give freed memory back to the system.

It was freed, but allocators keep it for later: between the stages of a long-lived process there is
no later.
"""

import ctypes
import sys

import pyarrow as pa


def release_memory() -> None:
    """Give unused memory back to the system.

    It is what Arrow and, on Linux, the C library hold unused. It takes milliseconds, and values are
    not touched.
    """
    pa.default_memory_pool().release_unused()
    if sys.platform == "linux":
        # Only glibc has it.
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
