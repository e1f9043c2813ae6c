"""Device and precision of a machine, settled once at submission.

Nothing here imports torch, but to ask a GPU that is there.
"""

import ctypes
import os
import re
import shutil
from functools import lru_cache
from pathlib import Path

from schemas.errors import InputError

PRECISIONS = ("fp32", "bf16")


class DeviceError(InputError):
    """A device or precision that a machine cannot honour.

    The machine cannot compute on the device, or in the precision, that the job was submitted with.
    """


def _has_cuda() -> bool:
    try:
        # Asking torch takes seconds for its import. Without the driver's library the answer is known.
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    import torch

    return torch.cuda.is_available()


@lru_cache(maxsize=1)
def has_native_bf16() -> bool:
    """Tell whether this machine's processor multiplies bf16 itself.

    That is by AMX or AVX-512 BF16. Elsewhere bf16 is slower than fp32.
    """
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and bool({"amx_bf16", "avx512_bf16"} & set(cpuinfo.read_text().split()))


def has_compiler() -> bool:
    """Tell whether torch can compile kernels for the CPU here."""
    return any(shutil.which(name) for name in (os.environ.get("CXX") or "g++", "g++", "clang++"))


def resolve_device_precision(device: str, precision: str) -> tuple[str, str]:
    """Settle 'auto' of device and precision once, at submission.

    Returns ('cpu' | 'cuda' | 'cuda:N', 'fp32' | 'bf16'). A device that is named is not looked for
    here, as the workers may be other machines. They check it.

    Raises:
        DeviceError: no such device or precision.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise DeviceError(f"--device {device}: no such device. Use auto, cpu, cuda or cuda:N.")
    if precision not in ("auto", *PRECISIONS):
        raise DeviceError(f"--precision {precision}: no such precision. Use auto, {' or '.join(PRECISIONS)}.")
    if device == "auto":
        device = "cuda" if _has_cuda() else "cpu"
    if precision == "auto":
        precision = "bf16" if device != "cpu" or has_native_bf16() else "fp32"
    return device, precision
