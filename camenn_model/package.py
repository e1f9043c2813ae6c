"""Checkpoints and packages: safetensors and JSON, never pickle.

MODEL/runs/RUN/model.safetensors      averaged weights of the best evaluation
MODEL/runs/RUN/likeness.safetensors   directions of the listings' similarity
                                      (features.json has the other features)
MODEL/runs/RUN/agreement.safetensors  regression for whether photo and title belong together
MODEL/runs/RUN/config.json features.json calibration.json metrics.json curves.csv
MODEL/checkpoints/*.safetensors       where a killed training goes on
                                      (removed when the package is written)
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from camenn_model.calibration import PlattScaling
from camenn_model.config import ModelConfig
from camenn_model.data.feature_space import FeatureSpace
from camenn_model.model.camenn import CameNN
from camenn_model.published import check_table_files, read_manifest, read_published
from camenn_model.tensors import load_tensors
from schemas.errors import InputError
from schemas.manifest import MANIFEST, RUNS, remedy

VERSIONED = (
    "model.safetensors",
    "config.json",
    "features.json",
    "likeness.safetensors",
    "agreement.safetensors",
    "calibration.json",
)
"""Files that a model's predictions depend on"""


@dataclass(frozen=True)
class Package:
    """A trained model with everything that scoring needs."""

    directory: Path
    config: ModelConfig
    space: FeatureSpace
    calibration: PlattScaling
    metrics: dict[str, Any]
    meta: dict[str, Any]

    @property
    def encoders(self) -> dict[str, Any]:
        """Return the encoders whose embeddings it was trained on.

        They come with fingerprint and description.
        """
        return dict(self.meta["encoders"])

    @property
    def version(self) -> str:
        """Return 16 hex digits that identify the package.

        They hash everything that predictions and judgements depend on.
        """
        digest = hashlib.sha256()
        for name in VERSIONED:
            digest.update((self.directory / name).read_bytes())
        return digest.hexdigest()[:16]

    def model(self) -> CameNN:
        """Load the model in eval mode, on the CPU.

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
                f"{self.directory}: another version of camenn trained this model: {len(other)} "
                f"of its tensors are not this version's ({min(other)}). "
                "Run `camenn train` again."
            )
        model.load_state_dict(tensors)
        return model.eval()


def open_package(root: str) -> Package:
    """Open the published package of `camenn train --out ROOT`.

    Raises:
        InputError: nothing is published there, or another stage's output.
    """
    latest = read_published(root, "train", "--model")
    return read_package(Path(root) / RUNS / latest["run"])


def read_package(directory: Path) -> Package:
    """Read the package in one run's directory.

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
