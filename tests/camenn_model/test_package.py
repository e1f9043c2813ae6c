"""Files of tensors and packages: the inputs of a version, refused files, and atomic writes."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from camenn_model import tensors as tensor_files
from camenn_model.calibration import PlattScaling
from camenn_model.model.camenn import CameNN
from camenn_model.package import VERSIONED, Package, open_package
from camenn_model.tensors import load_tensors, save_tensors
from schemas.errors import InputError
from tests.support.random_batches import tiny_config


@pytest.fixture
def package(tmp_path: Path) -> Package:
    """A package's directory with an untrained model; the other files stand there for the version."""
    config = tiny_config()
    save_tensors(tmp_path / "model.safetensors", dict(CameNN(config).state_dict()))
    for name in ("config.json", "features.json", "likeness.safetensors", "agreement.safetensors"):
        (tmp_path / name).write_text(name)
    (tmp_path / "calibration.json").write_text(PlattScaling(slope=0.9).to_json())
    no_space: Any = None
    return Package(tmp_path, config, no_space, PlattScaling(slope=0.9), {}, {})


def test_the_version_is_of_all_that_predictions_depend_on(package: Package) -> None:
    """Another calibration gives other scores, which must not carry the same version."""
    needed = {"config.json", "features.json", "likeness.safetensors", "agreement.safetensors", "calibration.json"}
    assert set(VERSIONED) == needed | {"model.safetensors"}
    versions = {package.version}
    for name in sorted(VERSIONED):
        path = package.directory / name
        before = path.read_bytes()
        path.write_bytes(before + b" ")
        versions.add(package.version)
        path.write_bytes(before)
    assert len(versions) == 1 + len(VERSIONED)
    (package.directory / "metrics.json").write_text("{}")
    assert package.version in versions


def test_the_model_of_a_package_drops_nothing_out(package: Package) -> None:
    model = package.model()
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("harm", ["gone", "surplus", "shape"])
def test_tensors_of_another_version_are_named(package: Package, harm: str) -> None:
    path = package.directory / "model.safetensors"
    tensors, header = load_tensors(path)
    name = "cvr_tower.head.weight"
    if harm == "gone":
        del tensors[name]
    elif harm == "surplus":
        name = "cvr_tower.another"
        tensors[name] = torch.zeros(3)
    else:
        tensors[name] = tensors[name].T
    save_tensors(path, tensors, header)
    with pytest.raises(InputError, match=f"1 of its tensors are not this version's .{name}.*camenn train"):
        package.model()


def test_a_file_is_replaced_only_by_a_whole_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "main.safetensors"
    save_tensors(path, {"a": torch.arange(5)}, {"step": 1})

    def cut_off(tensors: dict[str, Any], target: Path, metadata: dict[str, str]) -> None:
        Path(target).write_bytes(b"half of")
        raise OSError("No space left on device")

    monkeypatch.setattr(tensor_files, "save_file", cut_off)
    with pytest.raises(OSError, match="No space left"):
        save_tensors(path, {"a": torch.arange(9)}, {"step": 2})
    tensors, metadata = load_tensors(path)
    assert tensors["a"].tolist() == [0, 1, 2, 3, 4] and metadata == {"step": 1}


def test_what_is_no_model_is_refused(tmp_path: Path, package: Package) -> None:
    root = tmp_path / "models"
    root.mkdir()
    with pytest.raises(InputError, match="nothing is published there.*camenn train"):
        open_package(str(root))
    (root / "latest.json").write_text(json.dumps({"stage": "score", "run": "r", "manifest": "runs/r/manifest.json"}))
    with pytest.raises(InputError, match="output of `camenn score`, not of `camenn train`"):
        open_package(str(root))
    with pytest.raises(InputError, match="cannot be read as safetensors"):
        replace(package, directory=root).model()
