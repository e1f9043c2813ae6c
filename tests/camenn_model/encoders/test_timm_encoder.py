import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.data import create_transform

from camenn_model.encoders import image_models, weights
from camenn_model.encoders.machine import has_native_bf16
from camenn_model.encoders.random_weights import generate_patches
from camenn_model.encoders.spec import ImageSpec
from camenn_model.encoders.timm_encoder import TimmEncoder, load_timm_model
from camenn_model.encoders.weights import WeightsError
from schemas.errors import InputError
from tests.support.tiny_encoders import write_timm_model

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_timm_model(tmp_path_factory.mktemp("resnet"), "resnet18")


def resolve(source: str | Path, *, precision: str = "fp32", batch: int = 16, **given: object) -> ImageSpec:
    spec = ImageSpec.resolve(str(source), grid=2, device="cpu", precision=precision, **given)  # type: ignore[arg-type]
    return replace(spec, batch_size=batch)


def make_patches(size: int, count: int = 20) -> np.ndarray:
    """uint8 [count, size, size, 3]"""
    values = generate_patches(np.random.default_rng(1), count, size).permute(0, 2, 3, 1).numpy()
    return np.round((values + 1) * 127.5).astype(np.uint8)


def plain_features(
    directory: Path, name: str, patches: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...]
) -> np.ndarray:
    """What timm alone makes of the same patches: its own loading, transforms and model, one by one."""
    model = timm.create_model(name, num_classes=0).eval()
    model.load_state_dict(load_file(directory / "model.safetensors"), strict=False)
    transform = create_transform((3, *patches.shape[1:3]), mean=mean, std=std, crop_pct=1.0)
    with torch.inference_mode():
        return torch.cat([model(transform(Image.fromarray(patch))[None]) for patch in patches]).numpy()


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return (a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))


@pytest.mark.parametrize(
    ("name", "size", "width"),
    [("resnet18", 75, 512), ("test_vit", 160, 64), ("mobilenetv3_small_050", 75, 1024), ("test_convnext", 75, 64)],
)
def test_features_are_those_of_timm_itself(tmp_path: Path, name: str, size: int, width: int) -> None:
    directory = write_timm_model(tmp_path, name)
    known = timm.get_pretrained_cfg(name)
    assert known is not None
    spec = resolve(directory)
    assert (spec.model, spec.patch_size, spec.width) == (name, size, width) and spec.shape == (4, width)
    patches = make_patches(size, 5)
    features = TimmEncoder(spec).encode(patches)
    assert features.shape == (5, width) and features.dtype == np.float16
    expected = plain_features(directory, name, patches, known.mean, known.std)
    np.testing.assert_allclose(features.astype(np.float32), expected, rtol=2e-3, atol=2e-3 * np.abs(expected).max())
    assert TimmEncoder(spec).encode(patches[:0]).shape == (0, width)


@pytest.mark.parametrize("name", ["resnet18", "test_vit", "test_convnext", "mobilenetv3_small_050"])
def test_bits_do_not_depend_on_neighbours(name: str) -> None:
    encoder = TimmEncoder(resolve("random:3", model=name))
    patches = make_patches(encoder.spec.patch_size)
    together = encoder.encode(patches)
    order = np.random.default_rng(0).permutation(20)
    assert (encoder.encode(patches[order]) == together[order]).all()
    alone = np.concatenate([encoder.encode(patches[row : row + 1]) for row in (0, 15, 16, 19)])
    assert (alone == together[[0, 15, 16, 19]]).all()


@pytest.mark.parametrize("name", ["resnet18", "test_vit"])
def test_random_weights_follow_the_seed_alone(name: str) -> None:
    spec = resolve("random:7", model=name)
    patches = make_patches(spec.patch_size, 8)
    state = torch.get_rng_state()
    first = TimmEncoder(spec).encode(patches)
    assert torch.equal(torch.get_rng_state(), state), "the generator of the process is left alone"
    torch.manual_seed(5)
    assert (TimmEncoder(spec).encode(patches) == first).all()
    other = resolve("random:8", model=name)
    assert other.fingerprint != spec.fingerprint
    assert cosines(TimmEncoder(other).encode(patches), first).max() < 0.9
    between = cosines(first[:, None], first[None])
    assert np.median(between[~np.eye(8, dtype=bool)]) < 0.99 and first.std() > 0.05


def test_random_residual_networks_use_all_their_layers() -> None:
    """The last scale of each block is 0 as timm begins, which would leave the block out."""
    model = load_timm_model(resolve("random:7", model="resnet18"))
    scales = [module.weight for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert len(scales) == 20 and all((scale == 1).all() for scale in scales)


@pytest.mark.skipif(not has_native_bf16(), reason="no native bf16 on this processor")
@pytest.mark.parametrize("name", ["resnet18", "test_vit"])
def test_bf16_is_near_fp32(name: str) -> None:
    full, half = (TimmEncoder(resolve("random:7", model=name, precision=p)) for p in ("fp32", "bf16"))
    patches = make_patches(full.spec.patch_size)
    assert cosines(full.encode(patches), half.encode(patches)).min() > 0.99
    assert {parameter.dtype for parameter in half.model.parameters()} == {torch.bfloat16}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ["resnet18", "test_vit"])
def test_features_on_cuda_are_near_fp32_and_blind_to_neighbours(name: str) -> None:
    full = TimmEncoder(resolve("random:7", model=name))
    patches = make_patches(full.spec.patch_size)
    encoder = TimmEncoder(replace(resolve("random:7", model=name, precision="bf16"), device="cuda"))
    features = encoder.encode(patches)
    assert cosines(features, full.encode(patches)).min() > 0.99
    order = np.random.default_rng(0).permutation(20)
    assert (encoder.encode(patches[order]) == features[order]).all()


def test_spec_reads_the_config_beside_the_weights(resnet: Path, tmp_path: Path) -> None:
    spec = resolve(resnet)
    assert (spec.mean, spec.std) == (IMAGENET_MEAN, IMAGENET_STD)
    assert "resnet18" in spec.describe()
    shutil.copytree(resnet, tmp_path, dirs_exist_ok=True)
    config = json.loads((resnet / "config.json").read_text())
    config["pretrained_cfg"]["mean"] = [0.1, 0.2, 0.3]
    (tmp_path / "config.json").write_text(json.dumps(config))
    other = resolve(tmp_path)
    assert other.mean == (0.1, 0.2, 0.3) and other.weights_hash == spec.weights_hash
    assert other.fingerprint != spec.fingerprint
    patches = make_patches(75, 4)
    expected = plain_features(tmp_path, "resnet18", patches, other.mean, other.std)
    np.testing.assert_allclose(TimmEncoder(other).encode(patches), expected, rtol=2e-3, atol=2e-3)
    # The file alone has no config: what lies beside a file may be of another model.
    alone = resolve(tmp_path / "model.safetensors", model="resnet18")
    assert alone.mean == IMAGENET_MEAN and not alone.model_args
    assert replace(spec, model_args="").fingerprint == alone.fingerprint


def test_spec_reads_early_configs_and_arguments_of_the_model(tmp_path: Path) -> None:
    write_timm_model(tmp_path, "test_vit")
    config = json.loads((tmp_path / "config.json").read_text())
    early = {"architecture": "test_vit", **config["pretrained_cfg"], "mean": [0.2, 0.2, 0.2]}
    plain = resolve(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(early))
    assert resolve(tmp_path).mean == (0.2, 0.2, 0.2)
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_args": {"img_size": 96}}))
    resized = resolve(tmp_path)
    assert resized.patch_size == 96 and json.loads(resized.model_args) == {"img_size": 96}
    assert len({plain.fingerprint, resized.fingerprint, replace(resized, model_args="").fingerprint}) == 3
    with pytest.raises(WeightsError, match="pos_embed"):
        TimmEncoder(resized)


def test_a_hub_name_gives_its_architecture(resnet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, tuple[str, ...]]] = []

    def fetch(name: str, files: tuple[str, ...], flag: str) -> Path:
        asked.append((name, files))
        return resnet

    monkeypatch.setattr(weights, "fetch_from_hub", fetch)
    assert resolve("timm/resnet18.a1_in1k").model == resolve("resnet18.a1_in1k").model == "resnet18"
    assert asked == 2 * [("timm/resnet18.a1_in1k", ("config.json", "model.safetensors"))]


def test_a_tag_chooses_mean_and_deviation_of_a_bare_file(tmp_path: Path) -> None:
    write_timm_model(tmp_path, "vit_tiny_patch16_224")
    bare = tmp_path / "model.safetensors"
    tagged, plain = (
        resolve(bare, model=name) for name in ("vit_tiny_patch16_224.augreg_in21k", "vit_tiny_patch16_224")
    )
    assert tagged.model == plain.model == "vit_tiny_patch16_224" and tagged.fingerprint == plain.fingerprint
    assert tagged.named_model.endswith("in21k")
    with pytest.raises(WeightsError, match="--image_model .*knows no weights 'none'.*augreg_in21k"):
        resolve(bare, model="vit_tiny_patch16_224.none")


def test_batches_have_as_many_pixels_for_every_model() -> None:
    sizes = {75: 128, 96: 64, 150: 32, 224: 16, 299: 16}
    found = {
        size: ImageSpec.resolve(
            "random:1", grid=1, patch_size=size, device="cpu", precision="fp32", model="resnet18"
        ).batch_size
        for size in sizes
    }
    assert found == sizes
    inception = ImageSpec.resolve("random:1", grid=1, patch_size=299, device="cpu", precision="fp32")
    assert inception.batch_size == 128


def test_fingerprint_changes_with_everything_that_counts() -> None:
    spec = resolve("random:7", model="resnet18")
    others = [
        resolve("random:7", model="resnet34"),
        resolve("random:8", model="resnet18"),
        resolve("random:7", model="resnet18", patch_size=96),
        resolve("random:7", model="resnet18", precision="bf16"),
        replace(spec, grid=3),
        replace(spec, std=(0.5, 0.5, 0.5)),
        resolve("random:7"),
    ]
    assert len({spec.fingerprint, *(other.fingerprint for other in others)}) == 8
    assert replace(spec, batch_size=32, device="cuda", named_model="").fingerprint == spec.fingerprint


def test_errors_name_the_flag_and_the_remedy(resnet: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="--image_model resnet19: timm .* has no such model; did you mean resnet1"):
        resolve("random:1", model="resnet19")
    with pytest.raises(WeightsError, match="--image_model resnet34: config.json .*'resnet18'.*Leave --image_model out"):
        resolve(resnet, model="resnet34")
    with pytest.raises(InputError, match="--patch_size 75: test_vit gives no features .*--patch_size 160"):
        resolve("random:1", model="test_vit", patch_size=75)
    with pytest.raises(InputError, match="--patch_size 300: must be between 16 and 299 px"):
        resolve("random:1", model="resnet18", patch_size=300)
    with pytest.raises(InputError, match="--compile on: only inception_v4 is compiled, not resnet18"):
        resolve("random:1", model="resnet18", compile="on")
    assert resolve("random:1", model="resnet18", compile="auto").compile == "off"
    with pytest.raises(WeightsError, match="lacks .* of resnet34's tensors.*--image_model NAME"):
        TimmEncoder(resolve(resnet / "model.safetensors", model="resnet34"))
    config = json.loads((resnet / "config.json").read_text())
    shutil.copytree(resnet, tmp_path, dirs_exist_ok=True)
    for change, message in (
        ({"mean": [0.5]}, "'mean' \\[0.5\\].*three numbers"),
        ({"mean": "0.5"}, "three numbers"),
        ({"std": [0.5, 0, 0.5]}, "'std'.*above 0"),
    ):
        changed = config | {"pretrained_cfg": config["pretrained_cfg"] | change}
        (tmp_path / "config.json").write_text(json.dumps(changed))
        with pytest.raises(WeightsError, match=f"--image_weights.*{message}"):
            resolve(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(WeightsError, match="not timm's.*--image_model NAME"):
        resolve(tmp_path)
    assert resolve(tmp_path, model="resnet18").weights_hash == resolve(resnet).weights_hash
    for text in ("{", "[]"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(WeightsError, match="--image_weights.*config.json.*JSON"):
            resolve(tmp_path)


def test_a_model_of_other_channels_is_refused(resnet: Path, tmp_path: Path) -> None:
    shutil.copytree(resnet, tmp_path, dirs_exist_ok=True)
    config = json.loads((resnet / "config.json").read_text())
    config["pretrained_cfg"]["input_size"] = [1, 28, 28]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match="--image_model resnet18: takes images of 1 channels.*colour"):
        resolve(tmp_path)


def test_a_model_without_pooled_features_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_models, "_measure_width", lambda *_: (0, "features are [2, 7, 7, 8], not pooled"))
    with pytest.raises(InputError, match="not pooled"):
        resolve("random:1", model="resnet18")


def test_inception_keeps_its_fingerprint_whatever_timm_writes_beside_it(tmp_path: Path) -> None:
    write_timm_model(tmp_path, "inception_v4")
    beside, alone = resolve(tmp_path), resolve(tmp_path / "model.safetensors")
    named = resolve(tmp_path, model="inception_v4.tf_in1k")
    assert beside.fingerprint == alone.fingerprint == named.fingerprint
    assert "mean" not in beside.parts and beside.describe().startswith(str(tmp_path))
