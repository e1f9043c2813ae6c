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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from camenn_model.calibration import PlattScaling
from camenn_model.config import ModelConfig
from camenn_model.feature_space import FeatureSpace
from camenn_model.model import CameNN
from schemas.contract import InputError

VERSIONED = (
    "model.safetensors", "config.json", "features.json", "likeness.safetensors", "agreement.safetensors", "calibration.json",
)  # fmt: skip
"""Files that what a model says depends on"""


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any] | None = None) -> None:
    """Write one safetensors file atomically; `metadata` is kept as JSON in its header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    header = {"camenn": json.dumps(metadata or {})}
    # Tied or sliced tensors would share storage, which safetensors refuses: each entry gets its own.
    save_file(
        {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()},
        temporary,
        metadata=header,
    )
    os.replace(temporary, path)


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, metadata) of a file that `save_tensors` wrote.

    Raises:
        InputError: the file is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as handle:
            metadata = json.loads((handle.metadata() or {}).get("camenn", "{}"))
            return {name: handle.get_tensor(name) for name in handle.keys()}, metadata  # noqa: SIM118 - not a dict
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: cannot be read as safetensors ({error}). Train again, or give another directory."
        ) from error


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
    pointer = Path(root) / "latest.json"
    if not pointer.exists():
        raise InputError(
            f"--model {root}: nothing is published there (no latest.json). Run `camenn train` into it first."
        )
    latest = json.loads(pointer.read_text())
    if latest["stage"] != "train":
        raise InputError(
            f"--model {root}: holds the output of `camenn {latest['stage']}`, not of `camenn train`. Give another directory."
        )
    return read_package(Path(root) / "runs" / latest["run"])


def read_package(directory: Path) -> Package:
    """The package in one run's directory.

    Raises:
        InputError: another version of camenn wrote it.
    """
    meta = json.loads((directory / "config.json").read_text())
    return Package(
        directory=directory,
        config=ModelConfig.from_json(json.dumps(meta["model"])),
        space=FeatureSpace.read(directory),
        calibration=PlattScaling.from_json((directory / "calibration.json").read_text()),
        metrics=json.loads((directory / "metrics.json").read_text()),
        meta=meta,
    )
