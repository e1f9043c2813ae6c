"""A training for an output on an object store: what stays on this machine, and what a failing store means."""

from pathlib import Path

import pytest

from camenn_model.integrity import DamagedError
from pipelines.io import cache, files
from pipelines.io.lease import LockedWriter
from pipelines.train import stage, workplace
from schemas.errors import InputError

OUT = "s3://bucket/model"
RUN = "runs/20240101T000000-aaaaaa"


@pytest.fixture(autouse=True)
def removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A store that holds nothing and answers no upload; the fixture is what was removed there."""
    found: list[str] = []

    def fail(local: str, path: str) -> None:
        raise InputError(f"{path}: the store does not answer")

    monkeypatch.setenv("CAMENN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "copy_root", lambda root: str(tmp_path / "copies"))
    monkeypatch.setattr(cache, "upload_file", fail)
    monkeypatch.setattr(files, "find", lambda paths: [])
    monkeypatch.setattr(files, "delete", found.extend)
    monkeypatch.setattr(workplace, "UPLOAD_EVERY_S", 0.0)
    return found


def test_checkpoints_stay_until_the_model_is_published(removed: list[str], caplog: pytest.LogCaptureFixture) -> None:
    checkpoints = workplace.checkpoints_of(OUT, LockedWriter())
    checkpoints.path.parent.mkdir(parents=True)
    checkpoints.path.write_bytes(b"weights")
    # A store that does not answer for a while ends no training.
    checkpoints.saved()
    assert "stays on this machine" in caplog.text
    # The package may still fail to be uploaded: the next run goes on from here.
    checkpoints.finished()
    assert checkpoints.path.read_bytes() == b"weights" and removed == []
    assert workplace.checkpoints_of(OUT, LockedWriter()).path == checkpoints.path
    checkpoints.discard()
    assert not checkpoints.path.exists() and removed == [f"{OUT}/checkpoints/main.safetensors"]


def test_checkpoints_of_a_local_output_go_with_the_package(tmp_path: Path) -> None:
    checkpoints = workplace.checkpoints_of(str(tmp_path / "model"), LockedWriter())
    checkpoints.path.parent.mkdir(parents=True)
    checkpoints.path.write_bytes(b"weights")
    checkpoints.finished()
    assert not checkpoints.path.parent.exists()


def test_packages_of_killed_trainings_are_removed(tmp_path: Path) -> None:
    left = workplace.workplace(OUT) / RUN
    left.mkdir(parents=True)
    workplace.clear_workplace(OUT)
    assert not left.exists()
    local = tmp_path / "model" / RUN
    local.mkdir(parents=True)
    workplace.clear_workplace(str(tmp_path / "model"))
    assert local.is_dir()


def test_a_store_that_does_not_answer_says_nothing_of_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise it would be trained again, or replaced without a comparison."""

    def fail(error: InputError) -> None:
        def package_directory(directory: str) -> Path:
            raise error

        monkeypatch.setattr(stage, "package_directory", package_directory)

    fail(InputError("the store does not answer"))
    with pytest.raises(InputError, match="does not answer"):
        stage.is_readable(f"{OUT}/{RUN}")
    fail(DamagedError("config.json: this file is gone"))
    assert not stage.is_readable(f"{OUT}/{RUN}")
