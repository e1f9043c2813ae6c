"""Checkpoints and packages: safetensors and JSON, never pickle.

MODEL/runs/RUN/model.safetensors      averaged weights of the best evaluation
MODEL/runs/RUN/likeness.safetensors   which directions tell what is alike (features.json has the other features)
MODEL/runs/RUN/agreement.safetensors  what tells whether photo and title belong together
MODEL/runs/RUN/config.json features.json calibration.json metrics.json curves.csv
MODEL/checkpoints/*.safetensors       where a killed training goes on; removed when the package is written
"""

import hashlib
import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from camenn_model.calibration import PlattScaling
from camenn_model.config import ModelConfig
from camenn_model.feature_space import FeatureSpace
from camenn_model.integrity import DamagedError
from camenn_model.model import CameNN
from camenn_model.published import check_table_files, read_manifest, read_published
from schemas.contract import InputError
from schemas.manifest import MANIFEST, RUNS, remedy

VERSIONED = (
    "model.safetensors",
    "config.json",
    "features.json",
    "likeness.safetensors",
    "agreement.safetensors",
    "calibration.json",
)
"""Files that what a model says depends on"""

_HEADER = "camenn.document"
"""Key of a safetensors header: metadata, and the checksum of it and of the tensors, as JSON. One key, as several come in another order each time"""
_METADATA_OF_BEFORE = "camenn"
"""Key of the metadata alone, without a checksum, as earlier versions of camenn wrote it"""
_REMEDY = "Remove it and run `camenn train` again: a training that goes on from it begins anew."


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any] | None = None) -> None:
    """Write one safetensors file atomically; `metadata` is kept as JSON in its header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    # Tied or sliced tensors would share storage, which safetensors refuses: each entry gets its own.
    own = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    given = metadata or {}
    header = {_HEADER: json.dumps({"metadata": given, "sha256": _digest(own, given)}, sort_keys=True)}
    with open(temporary, "wb") as handle:
        mode = stat.S_IMODE(os.fstat(handle.fileno()).st_mode)
    save_file(own, temporary, metadata=header)
    # safetensors lets nobody else read what it writes, whatever the umask: others may score with the model as well as read the scores.
    os.chmod(temporary, mode)
    os.replace(temporary, path)


def _identity(path: Path) -> tuple[int, ...] | None:
    """What changes when another file takes a path; None where there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _digest(tensors: dict[str, Tensor], metadata: dict[str, Any]) -> str:
    """SHA-256 over metadata and over names, types, shapes and bytes of tensors, 64 hex digits."""
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name}:{tensor.dtype}:{tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, metadata) of a file that `save_tensors` wrote.

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
        # safetensors opens a file twice, and a training that runs has put a new one in its place between.
        return load_tensors(path)
    if not whole:
        raise DamagedError(f"{path}: is not what was written (its checksum differs). {_REMEDY}")
    return tensors, metadata


@dataclass(frozen=True)
class Package:
    """A trained model with all that scoring needs."""

    directory: Path
    config: ModelConfig
    space: FeatureSpace
    calibration: PlattScaling
    metrics: dict[str, Any]
    meta: dict[str, Any]

    @property
    def encoders(self) -> dict[str, Any]:
        """Fingerprint and description of the encoders whose embeddings it was trained on."""
        return dict(self.meta["encoders"])

    @property
    def version(self) -> str:
        """16 hex digits over all that predictions and judgements depend on."""
        digest = hashlib.sha256()
        for name in VERSIONED:
            digest.update((self.directory / name).read_bytes())
        return digest.hexdigest()[:16]

    def model(self) -> CameNN:
        """In eval mode, on the CPU.

        Raises:
            InputError: its tensors are not those of this version's model.
        """
        model = CameNN(self.config)
        tensors, _ = load_tensors(self.directory / "model.safetensors")
        own = model.state_dict()
        other = set(own.keys() ^ tensors.keys()) | {
            name for name in own.keys() & tensors.keys() if own[name].shape != tensors[name].shape
        }
        if other:
            raise InputError(
                f"{self.directory}: another version of camenn trained this model: {len(other)} of its tensors are not this version's ({min(other)}). "
                "Run `camenn train` again."
            )
        model.load_state_dict(tensors)
        return model.eval()


def open_package(root: str) -> Package:
    """The published package of `camenn train --out ROOT`.

    Raises:
        InputError: nothing is published there, or something else than a model.
    """
    latest = read_published(root, "train", "--model")
    return read_package(Path(root) / RUNS / latest["run"])


def read_package(directory: Path) -> Package:
    """The package in one run's directory.

    Raises:
        InputError: another version of camenn wrote it.
        DamagedError: a file of a finished run is lost or damaged.
    """
    if (directory / MANIFEST).exists():
        check_table_files(directory.parents[1], read_manifest(directory), None, remedy("train", ""))
    meta = json.loads((directory / "config.json").read_text())
    return Package(
        directory=directory,
        config=ModelConfig.from_json(json.dumps(meta["model"])),
        space=FeatureSpace.read(directory),
        calibration=PlattScaling.from_json((directory / "calibration.json").read_text()),
        metrics=json.loads((directory / "metrics.json").read_text()),
        meta=meta,
    )
