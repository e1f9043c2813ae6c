"""Write and read files of tensors: safetensors with a checksum."""

import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from camenn_model.integrity import DamagedError

_HEADER = "camenn.document"
"""Key of a safetensors header: metadata, and the checksum of it and of the tensors, as JSON. It is
one key, as the order of several is not reproducible
"""
_METADATA_OF_BEFORE = "camenn"
"""Key of the metadata alone, without a checksum, as earlier versions of camenn wrote it"""
_REMEDY = "Remove it and run `camenn train` again: a training that would resume from it starts again."


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any] | None = None) -> None:
    """Write one safetensors file atomically.

    `metadata` is kept as JSON in its header.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    # Tied or sliced tensors would share storage, which safetensors refuses: each entry gets its own.
    own = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    given = metadata or {}
    header = {_HEADER: json.dumps({"metadata": given, "sha256": _digest(own, given)}, sort_keys=True)}
    with open(temporary, "wb") as handle:
        mode = stat.S_IMODE(os.fstat(handle.fileno()).st_mode)
    save_file(own, temporary, metadata=header)
    # safetensors makes its files readable by their owner alone, whatever the umask: others who may
    # read the scores may also score with the model.
    os.chmod(temporary, mode)
    os.replace(temporary, path)


def _identity(path: Path) -> tuple[int, ...] | None:
    """Return the identity of a path's file.

    It changes when another file takes the path. It is None where there is no file.
    """
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _digest(tensors: dict[str, Tensor], metadata: dict[str, Any]) -> str:
    """Return the SHA-256 of tensors and metadata.

    It is over metadata and over names, types, shapes and bytes of tensors, 64 hex digits.
    """
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name}:{tensor.dtype}:{tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Load (tensors, metadata) of a `save_tensors` file.

    Raises:
        DamagedError: the file is missing or damaged.
    """
    before = _identity(path)
    try:
        with safe_open(path, framework="pt") as handle:
            header = handle.metadata() or {}
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 - not a dict
            given = json.loads(header.get(_HEADER) or "{}")
            metadata = given["metadata"] if _HEADER in header else json.loads(header.get(_METADATA_OF_BEFORE, "{}"))
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise DamagedError(f"{path}: cannot be read as safetensors ({error}). {_REMEDY}") from error
    whole = not header.keys() - {_HEADER, _METADATA_OF_BEFORE} and (
        _HEADER not in header or given.get("sha256") == _digest(tensors, metadata)
    )
    if not whole and _identity(path) != before:
        # safetensors opens a file twice, and a running training has replaced it in between.
        return load_tensors(path)
    if not whole:
        raise DamagedError(f"{path}: is not what was written (its checksum differs). {_REMEDY}")
    return tensors, metadata
