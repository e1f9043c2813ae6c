"""An output belongs to one command.

A directory that holds anything else, or is read by the same command, is refused before anything is
written.
"""

import errno
import fcntl
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch

from camenn_model.tensors import save_tensors
from pipelines.cli import main
from pipelines.io import files
from pipelines.runs.manifest import Manifest
from pipelines.runs.outputs import find_foreign, hold_output
from pipelines.runs.publication import publish
from schemas.errors import InputError
from tests.support.encoder_sources import minilm
from tests.support.small_city import catalog_table, random_city, write_data, write_store


def tree(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*")}


def hold(root: Path, stage: str = "embed", **inputs: Path) -> None:
    with hold_output(str(root), "--store", stage, {f"--{name}": str(path) for name, path in inputs.items()}):
        pass


def test_a_data_directory_is_no_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`gc` once removed photos of a directory that was both."""
    data = write_data(tmp_path / "data", *random_city(0, clicks=3, orders=1))
    (data / "images").mkdir()
    (data / "images" / "1.jpg").write_bytes(b"photo")
    before = tree(data)
    flags = ["--image_weights", "random:0", "--text_encoder", str(minilm()), "--grid", "2", "--max_tokens", "16"]
    for extra in ([], ["--plan"]):
        assert main(["embed", "--data", str(data), "--store", str(data), *flags, *extra]) == 2
        assert f"--store {data}: is also --data" in capsys.readouterr().err
    (tmp_path / "link").symlink_to(data)
    assert main(["embed", "--data", str(tmp_path / "link"), "--store", str(data), *flags]) == 2
    assert tree(data) == before


@pytest.mark.parametrize(
    "name",
    ["catalog.parquet", "notes.txt", "images/1.jpg", "images/fruit/1.jpg", "titles/a.csv", "data/clicks.parquet"],
)
def test_a_directory_that_holds_something_else_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    before = tree(tmp_path)
    with pytest.raises(InputError, match="which camenn did not write. An output needs a directory of its own"):
        hold(tmp_path)
    assert tree(tmp_path) == before


def test_an_output_of_camenn_is_taken_again(tmp_path: Path) -> None:
    """Also an output of before outputs recorded their command, with any hidden files of the system."""
    store = write_store(tmp_path / "store", catalog_table())
    for kind in ("images", "titles"):
        # Fingerprints of encoders have 16 digits.
        (store / kind / f"fake-{kind}").rename(store / kind / "0123456789abcdef")
    (store / ".DS_Store").write_bytes(b"")
    (store / "latest.json.damaged").write_bytes(b"")
    assert find_foreign(str(store)) == []
    hold(store)
    assert files.is_own(str(store))
    hold(store)


def test_an_output_of_another_stage_is_refused(tmp_path: Path) -> None:
    publish(str(tmp_path), Manifest(stage="shards", run="a"))
    with pytest.raises(InputError, match="holds the output of `camenn shards`, not of `camenn score`"):
        hold(tmp_path, "score")


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def flock(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(InputError, match="its file system has no locks .*an output on another disk"):
        hold(tmp_path)


def test_an_output_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def makedirs(path: str, **_: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)

    monkeypatch.setattr(files, "make_directory", makedirs)
    with pytest.raises(InputError, match="cannot be written to .Read-only file system."):
        hold(tmp_path / "out")


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o002])
def test_files_have_the_permissions_that_umask_leaves(tmp_path: Path, mask: int) -> None:
    """Safetensors writes for its owner alone.

    A model that one user trains must be read by another who reads the tables.
    """
    before = os.umask(mask)
    try:
        save_tensors(tmp_path / "model.safetensors", {"a": torch.zeros(2)})
        files.write_json(str(tmp_path / "a.json"), {})
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == {"model.safetensors": 0o666 & ~mask, "a.json": 0o666 & ~mask}
