import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from camenn_model.encoders import machine
from camenn_model.encoders.machine import DeviceError, resolve_device_precision
from camenn_model.encoders.spec import COMPILE_PAYS_AT, ImageSpec, TextSpec
from camenn_model.encoders.weights import WeightsError, hash_safetensors
from camenn_model.hashing import normalise_title
from schemas.errors import InputError
from tests.support.encoder_sources import PROJECT, minilm


def random_spec(source: str = "random:7", grid: int = 2, patch_size: int = 75, precision: str = "fp32") -> ImageSpec:
    return ImageSpec.resolve(source, grid=grid, patch_size=patch_size, device="cpu", precision=precision)


def test_normalise_title_cleans_space_and_accents() -> None:
    assert normalise_title(None) == normalise_title(" \t\n\u3000 ") == ""
    assert normalise_title("  red\u00a0 apple\n 1kg ") == "red apple 1kg"
    assert normalise_title("cre\u0300me") == "cr\u00e8me"
    assert normalise_title("红富士 🍎") == "红富士 🍎"


def test_resolve_device_precision_settles_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_has_cuda", lambda: False)
    monkeypatch.setattr(machine, "has_native_bf16", lambda: False)
    assert resolve_device_precision("auto", "auto") == ("cpu", "fp32")
    monkeypatch.setattr(machine, "has_native_bf16", lambda: True)
    assert resolve_device_precision("auto", "auto") == ("cpu", "bf16")
    assert resolve_device_precision("cpu", "fp32") == ("cpu", "fp32")
    assert resolve_device_precision("cuda:0", "auto") == ("cuda:0", "bf16")
    monkeypatch.setattr(machine, "_has_cuda", lambda: True)
    assert resolve_device_precision("auto", "auto") == ("cuda", "bf16")


def test_resolve_device_precision_refuses_the_unknown() -> None:
    with pytest.raises(DeviceError, match="--device tpu"):
        resolve_device_precision("tpu", "auto")
    with pytest.raises(DeviceError, match="--precision fp8"):
        resolve_device_precision("cpu", "fp8")


def test_hash_safetensors_sees_tensors_and_not_their_layout(tmp_path: Path) -> None:
    a, b = np.arange(6, dtype=np.float32).reshape(2, 3), np.ones(2, dtype=np.float16)
    hashes = []
    files: tuple[tuple[str, dict[str, np.ndarray], dict[str, str] | None], ...] = (
        ("1", {"a": a, "b": b}, None),
        ("2", {"b": b, "a": a}, {"note": "x"}),
        ("3", {"a": a.reshape(3, 2), "b": b}, None),
        ("4", {"a": a, "c": b}, None),
        ("5", {"a": a + 1, "b": b}, None),
    )
    for name, tensors, metadata in files:
        save_file(tensors, tmp_path / name, metadata)
        hashes.append(hash_safetensors(tmp_path / name, "--image_weights"))
    assert hashes[0] == hashes[1]
    assert len(set(hashes[1:])) == 4


@pytest.mark.parametrize("content", [b"", b"123", b"not a safetensors file at all", b"\xff" * 64])
def test_hash_safetensors_refuses_other_files(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "w.safetensors").write_bytes(content)
    with pytest.raises(WeightsError, match="--image_weights"):
        hash_safetensors(tmp_path / "w.safetensors", "--image_weights")


def test_hash_safetensors_refuses_a_cut_file(tmp_path: Path) -> None:
    save_file({"a": np.zeros(100)}, tmp_path / "w")
    (tmp_path / "w").write_bytes((tmp_path / "w").read_bytes()[:-8])
    with pytest.raises(WeightsError, match="not a whole"):
        hash_safetensors(tmp_path / "w", "--image_weights")


def test_image_spec_fingerprint_changes_with_everything_that_counts() -> None:
    spec = random_spec()
    others = [
        random_spec("random:8"),
        random_spec(grid=3),
        random_spec(patch_size=80),
        random_spec(precision="bf16"),
    ]
    assert len({spec.fingerprint, *(other.fingerprint for other in others)}) == 5
    alike = replace(spec, device="cuda", path="/elsewhere", batch_size=32, compile="on")
    assert alike.fingerprint == spec.fingerprint == random_spec().fingerprint
    assert len(spec.fingerprint) == 16
    assert (spec.shape, spec.side) == ((4, 1536), 150)
    assert "untrained" in spec.describe() and "random:7" in spec.describe()
    json.dumps(asdict(spec))


def test_image_spec_kernels_say_what_changes_last_bits() -> None:
    spec = random_spec()
    others = [replace(spec, batch_size=32), replace(spec, device="cuda:1"), replace(spec, precision="bf16")]
    assert len({spec.kernels(False), spec.kernels(True), *(other.kernels(False) for other in others)}) == 5
    assert replace(spec, device="cuda:0").kernels(False) == others[1].kernels(False)


def test_image_spec_refuses_batches_whose_bits_depend_on_threads() -> None:
    with pytest.raises(ValueError, match="at least 16"):
        replace(random_spec(), batch_size=15)


def test_image_spec_compiles_for_many_photos_only() -> None:
    spec = random_spec()
    enough = COMPILE_PAYS_AT // spec.shape[0]
    assert spec.pays_to_compile(enough) and not spec.pays_to_compile(enough - 1)
    assert not replace(spec, device="cuda").pays_to_compile(100 * enough)


def test_image_spec_refuses_what_is_out_of_range() -> None:
    with pytest.raises(InputError, match="--patch_size 74"):
        random_spec(patch_size=74)
    with pytest.raises(InputError, match="--grid 0"):
        random_spec(grid=0)


@pytest.mark.parametrize("source", ["random:", "random:-1", "random:x", "./none.safetensors", "/no/such/dir"])
def test_image_spec_names_the_flag_of_weights_that_are_not_there(source: str) -> None:
    with pytest.raises(WeightsError, match="--image_weights"):
        random_spec(source)


def test_image_spec_reads_no_pickle(tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_bytes(b"x")
    with pytest.raises(WeightsError, match="not a .safetensors"):
        random_spec(str(tmp_path / "w.pth"))
    with pytest.raises(WeightsError, match="model.safetensors"):
        random_spec(str(tmp_path))


def test_text_spec_describes_the_directory() -> None:
    spec = TextSpec.resolve(minilm(), max_tokens=20, device="cpu")
    assert spec.shape == (20, 384) and spec.buckets == (8, 16, 20)
    assert [spec.batch_size(bucket) for bucket in spec.buckets] == [64, 32, 25]
    assert (
        replace(spec, vocabulary_hash="x").fingerprint != spec.fingerprint != replace(spec, max_tokens=16).fingerprint
    )
    with pytest.raises(InputError, match="--max_tokens 2"):
        TextSpec.resolve(minilm(), max_tokens=2, device="cpu")


def test_text_spec_refuses_other_architectures(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "fnet"}))
    with pytest.raises(WeightsError, match="--text_encoder.*'fnet'.*Name an encoder of type bert,"):
        TextSpec.resolve(str(tmp_path), max_tokens=16, device="cpu")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "hidden_size": 8}))
    with pytest.raises(WeightsError, match="holds no model.safetensors"):
        TextSpec.resolve(str(tmp_path), max_tokens=16, device="cpu")
    with pytest.raises(WeightsError, match="--text_encoder"):
        TextSpec.resolve(str(tmp_path / "none"), max_tokens=16, device="cpu")


def test_specs_fail_in_seconds_without_the_hub_and_import_no_torch(tmp_path: Path) -> None:
    code = """
import sys
from camenn_model.encoders.spec import ImageSpec, TextSpec
from camenn_model.encoders.weights import WeightsError
for resolve in (
    lambda: ImageSpec.resolve("timm/inception_v4.tf_in1k", grid=4, patch_size=75, device="cpu", precision="auto"),
    lambda: ImageSpec.resolve("inception_v4.tf_in1k", grid=4, patch_size=75, device="cpu", precision="auto"),
    lambda: TextSpec.resolve("google-bert/bert-base-uncased", max_tokens=32, device="cpu"),
):
    try:
        resolve()
    except WeightsError as error:
        print(error)
assert "torch" not in sys.modules
"""
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["--image_weights", "--image_weights", "--text_encoder"]
    assert all("local path" in line for line in lines)
    assert time.monotonic() - started < 20
