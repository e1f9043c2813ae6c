import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from camenn_model.encoders import device, inception_v4
from camenn_model.encoders.inception_v4 import InceptionV4Encoder, fold_batch_norm, round_filters
from camenn_model.encoders.machine import DeviceError, has_native_bf16
from camenn_model.encoders.random_weights import generate_patches
from camenn_model.encoders.spec import ImageSpec
from camenn_model.encoders.weights import WeightsError
from pipelines.inputs.photos import decode_image, grid_patches
from tests.support.encoder_sources import PROJECT, grocery_photos, grocery_weights

BATCH = 16
"""Small, so that the tests are quick; the rules are the same."""


def spec_of(source: str, precision: str = "auto") -> ImageSpec:
    spec = ImageSpec.resolve(source, grid=2, patch_size=75, device="cpu", precision=precision)
    return replace(spec, batch_size=BATCH)


@pytest.fixture(scope="module")
def encoder() -> InceptionV4Encoder:
    return InceptionV4Encoder(spec_of("random:7"))


@pytest.fixture(scope="module")
def patches() -> np.ndarray:
    """uint8 [20, 75, 75, 3]"""
    values = generate_patches(np.random.default_rng(1), 20, 75).permute(0, 2, 3, 1).numpy()
    return np.round((values + 1) * 127.5).astype(np.uint8)


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return (a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))


def test_image_encoder_gives_float16_of_any_count(encoder: InceptionV4Encoder, patches: np.ndarray) -> None:
    features = encoder.encode(patches)
    assert features.shape == (20, 1536) and features.dtype == np.float16
    assert encoder.encode(patches[:0]).shape == (0, 1536)
    assert encoder.fingerprint == encoder.spec.fingerprint


def test_image_encoder_refuses_other_shapes(encoder: InceptionV4Encoder, patches: np.ndarray) -> None:
    with pytest.raises(ValueError, match="expected uint8"):
        encoder.encode(patches.astype(np.float32))
    with pytest.raises(ValueError, match="expected uint8"):
        encoder.encode(patches[:, :74])


@pytest.mark.parametrize(
    "precision",
    ["fp32", pytest.param("bf16", marks=pytest.mark.skipif(not has_native_bf16(), reason="no native bf16"))],
)
def test_image_encoder_bits_do_not_depend_on_neighbours(precision: str, patches: np.ndarray) -> None:
    encoder = InceptionV4Encoder(spec_of("random:7", precision))
    together = encoder.encode(patches)
    order = np.random.default_rng(0).permutation(20)
    assert (encoder.encode(patches[order]) == together[order]).all()
    alone = np.concatenate([encoder.encode(patches[row : row + 1]) for row in (0, 15, 16, 19)])
    assert (alone == together[[0, 15, 16, 19]]).all()


def test_image_encoder_bits_do_not_depend_on_threads(encoder: InceptionV4Encoder, patches: np.ndarray) -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = encoder.encode(patches[:8])
        torch.set_num_threads(2)
        assert (encoder.encode(patches[:8]) == one).all()
    finally:
        torch.set_num_threads(threads)


def test_random_weights_tell_images_apart(encoder: InceptionV4Encoder, patches: np.ndarray) -> None:
    features = encoder.encode(patches).astype(np.float32)
    assert 0.05 < features.std() < 100
    between = cosines(features[:, None], features[None])
    assert np.median(between[~np.eye(20, dtype=bool)]) < 0.9
    assert features.std(axis=0).mean() > 0.05


def test_random_weights_differ_by_seed(encoder: InceptionV4Encoder, patches: np.ndarray) -> None:
    other = InceptionV4Encoder(spec_of("random:8"))
    assert cosines(other.encode(patches[:4]), encoder.encode(patches[:4])).max() < 0.9
    assert other.fingerprint != encoder.fingerprint


@pytest.mark.slow
def test_random_weights_are_the_same_in_another_process_with_other_threads(
    encoder: InceptionV4Encoder, patches: np.ndarray, tmp_path: Path
) -> None:
    np.save(tmp_path / "patches.npy", patches[:4])
    code = """
import sys
import numpy as np
import torch
from tests.camenn_model.encoders.test_inception_v4 import InceptionV4Encoder, spec_of
torch.set_num_threads(3)
encoder = InceptionV4Encoder(spec_of("random:7"))
np.save(sys.argv[1] + "/features.npy", encoder.encode(np.load(sys.argv[1] + "/patches.npy")))
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=PROJECT, check=True)
    assert (np.load(tmp_path / "features.npy") == encoder.encode(patches[:4])).all()


def test_fold_batch_norm_changes_nothing_but_rounding(patches: np.ndarray) -> None:
    torch.manual_seed(0)
    model = timm.create_model("inception_v4", num_classes=0).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.01, 0.03)
            module.weight.data.uniform_(0.5, 1.5)
    pixels = torch.from_numpy(patches[:4]).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.inference_mode():
        before = model(pixels)
        fold_batch_norm(model)
        after = model(pixels)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3 * before.abs().max().item())


def test_image_encoder_refuses_weights_of_another_model(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file({"features.0.conv.weight": torch.zeros(32, 3, 3, 3)}, path)
    with pytest.raises(WeightsError, match="--image_weights.*lacks"):
        InceptionV4Encoder(spec_of(str(path)))


def test_image_encoder_refuses_weights_that_changed_since_submission(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file({"a": torch.zeros(3)}, path)
    spec = spec_of(str(path))
    save_file({"a": torch.ones(3)}, path)
    with pytest.raises(WeightsError, match="submitted with"):
        InceptionV4Encoder(spec)


def test_image_encoder_refuses_what_the_worker_cannot_honour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "has_native_bf16", lambda: False)
    with pytest.raises(DeviceError, match="no bf16"):
        InceptionV4Encoder(spec_of("random:7", "bf16"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match="no CUDA"):
        InceptionV4Encoder(replace(spec_of("random:7", "fp32"), device="cuda"))


def test_round_filters_keeps_sums_and_moves_no_weight_by_more_than_a_step() -> None:
    weights = (
        torch.randn(16, 8, 3, 3, generator=torch.Generator().manual_seed(0))
        * torch.logspace(-6, 1, 16)[:, None, None, None]
    )
    weights[0, 0] = 0
    weights[1, 1, 0, 0] = 2.0**-130
    rounded, nearest = round_filters(weights), weights.bfloat16().float()
    assert (rounded.bfloat16().float() == rounded).all(), "values of bfloat16"
    steps = rounded.bfloat16().view(torch.int16).int() - nearest.bfloat16().view(torch.int16).int()
    assert steps.abs().max() == 1
    assert ((rounded - weights).abs() <= 2.0**-7 * weights.abs() + 2.0**-133).all()
    errors = [(values - weights).sum((2, 3)).abs() for values in (rounded, nearest)]
    assert (errors[0] <= errors[1] + 1e-12).all() and errors[0].mean() < errors[1].mean() / 4


def test_image_encoder_that_must_compile_and_cannot_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, patches: np.ndarray, encoder: InceptionV4Encoder
) -> None:
    monkeypatch.setattr(inception_v4, "has_compiler", lambda: False)
    with pytest.raises(DeviceError, match="no C\\+\\+ compiler"):
        InceptionV4Encoder(replace(spec_of("random:7"), compile="on"))
    either = InceptionV4Encoder(replace(spec_of("random:7"), compile="auto"))
    assert not either.prepare(compiled=True), "where it may, it encodes without, and says that it did"
    assert (either.encode(patches, compiled=True) == encoder.encode(patches)).all()

    def fail(_: object) -> None:
        raise RuntimeError("Python.h: no such file")

    monkeypatch.setattr(inception_v4, "has_compiler", lambda: True)
    monkeypatch.setattr(inception_v4, "compile_model", fail)
    broken = InceptionV4Encoder(replace(spec_of("random:7"), compile="auto"))
    assert not broken.prepare(compiled=True) and "Python.h" in caplog.text
    with pytest.raises(RuntimeError, match=r"Python\.h"):
        InceptionV4Encoder(replace(spec_of("random:7"), compile="on"))


@pytest.mark.skipif(not has_native_bf16(), reason="no native bf16 on this processor")
def test_image_encoder_bf16_is_near_fp32_on_real_photos() -> None:
    source = grocery_weights()
    # Among these are patches of little contrast, on which a stem in bf16 falls to 0.989.
    photos = [decode_image(path.read_bytes(), 300).pixels for path in grocery_photos(32)]
    patches = np.concatenate([grid_patches(photo, 4, 75) for photo in photos])
    half, full = (InceptionV4Encoder(spec_of(source, precision)).encode(patches) for precision in ("bf16", "fp32"))
    assert cosines(half, full).min() >= 0.999
    between = cosines(full[:, None], full[None])
    assert np.median(between) < 0.9


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_image_encoder_on_cuda_is_near_fp32_and_blind_to_neighbours(patches: np.ndarray) -> None:
    full = InceptionV4Encoder(spec_of("random:7", "fp32")).encode(patches)
    encoder = InceptionV4Encoder(replace(spec_of("random:7", "bf16"), device="cuda"))
    features = encoder.encode(patches)
    assert cosines(features, full).min() >= 0.99
    order = np.random.default_rng(0).permutation(20)
    assert (encoder.encode(patches[order]) == features[order]).all()
