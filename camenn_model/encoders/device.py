"""Check of the device and precision before a worker computes.

A worker makes sure that it can honour the device and precision of the submission.
"""

import threading

import torch

from camenn_model.encoders.machine import DeviceError, has_native_bf16

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

LOADING = threading.Lock()
"""Held while a model is built: transformers changes torch's default dtype and its initialisers for
the whole process meanwhile, and runners load models on several threads of one process.
"""


def check_device(device: str, precision: str) -> None:
    """Check that this machine computes in `precision` on `device`.

    On CUDA its kernels are made repeatable.

    Raises:
        DeviceError: it does not. Nothing slower or less exact is put in its place.
    """
    if device == "cpu":
        if precision == "bf16" and not has_native_bf16():
            raise DeviceError(
                "this worker's processor has no bf16, and the job was submitted with it. Submit with "
                "--precision fp32, or give it workers alike."
            )
        return
    if not torch.cuda.is_available():
        raise DeviceError(
            f"this worker has no CUDA device, and the job was submitted with --device {device}. Submit with "
            "--device cpu, or give it GPU workers."
        )
    index = torch.device(device).index or 0
    if index >= torch.cuda.device_count():
        raise DeviceError(
            f"this worker has {torch.cuda.device_count()} CUDA devices, and the job was submitted with "
            f"--device {device}."
        )
    if precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise DeviceError(
            "this worker's GPU has no bf16, and the job was submitted with it. Submit with --precision fp32."
        )
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    # TF32 is neither of the two precisions.
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
