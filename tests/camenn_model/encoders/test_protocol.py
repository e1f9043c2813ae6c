"""Every encoder is found by its spec, and specs of before stay what they were."""

import hashlib
import inspect
import json
import subprocess
import sys
from dataclasses import asdict, fields
from typing import Any

import pytest

from camenn_model.encoders import protocol
from camenn_model.encoders.image_models import IMAGE_ENCODERS, TIMM_ENCODER
from camenn_model.encoders.inception_v4 import InceptionV4Encoder, load_inception
from camenn_model.encoders.protocol import ImageEncoder, TextEncoder, open_image_encoder, open_text_encoder
from camenn_model.encoders.spec import ImageSpec, TextSpec
from camenn_model.encoders.text_models import TEXT_ENCODERS
from tests.support.encoder_sources import PROJECT, minilm


@pytest.mark.parametrize(
    ("wanted", "name"),
    [
        *((ImageEncoder, name) for name in (*IMAGE_ENCODERS.values(), TIMM_ENCODER)),
        *((TextEncoder, name) for name in sorted({facts.encoder for facts in TEXT_ENCODERS.values()})),
    ],
)
def test_every_encoder_of_the_registry_has_the_methods_of_its_protocol(wanted: Any, name: str) -> None:
    found = protocol._import(name)
    for method in [name for name in vars(wanted) if not name.startswith("_")]:
        given, expected = (inspect.signature(getattr(kind, method)) for kind in (found, wanted))
        assert list(given.parameters) == list(expected.parameters), method


def test_a_spec_opens_its_own_encoder() -> None:
    text: TextEncoder = open_text_encoder(TextSpec.resolve(minilm(), max_tokens=8, device="cpu", precision="fp32"))
    assert type(text).__name__ == "BertEncoder" and text.start_seconds > 0
    spec = ImageSpec.resolve("random:7", grid=1, device="cpu", precision="fp32")
    image: ImageEncoder = open_image_encoder(spec)
    assert isinstance(image, InceptionV4Encoder) and image.spec == spec and spec.patch_size == 75


@pytest.mark.parametrize(
    ("source", "precision", "grid", "patch_size", "fingerprint"),
    [
        ("random:7", "fp32", 2, 75, "73c70b33e5ba6b63"),
        ("random:7", "bf16", 4, 75, "cde57975299d54b1"),
        ("random:0", "fp32", 8, 80, "a1d6d040ae04b702"),
        ("random:0", "bf16", 2, 75, "ac27d7a122378d67"),
    ],
)
def test_photos_that_were_embedded_before_stay_valid(
    source: str, precision: str, grid: int, patch_size: int, fingerprint: str
) -> None:
    """Taken from the code before there were other models than InceptionV4."""
    spec = ImageSpec.resolve(source, grid=grid, patch_size=patch_size, device="cpu", precision=precision)
    assert spec.fingerprint == fingerprint


def test_titles_that_were_embedded_before_stay_valid() -> None:
    specs = [TextSpec.resolve(minilm(), max_tokens=16, device="cpu", precision=p) for p in ("fp32", "bf16")]
    assert [spec.fingerprint for spec in specs] == ["f578d0d99fe8403c", "55a8c1908e521631"]


def test_random_inception_draws_the_weights_it_always_drew() -> None:
    """The statistics are arithmetic, whose last bits differ between processors: the drawn weights do not."""
    spec = ImageSpec.resolve("random:7", grid=2, patch_size=75, device="cpu", precision="fp32")
    digest = hashlib.sha256()
    for name, tensor in load_inception(spec).state_dict().items():
        if tensor.ndim == 4:
            digest.update(name.encode() + tensor.numpy().tobytes())
    assert digest.hexdigest()[:16] == "4a1b825cfdaa1ebc"


def test_specs_of_before_have_the_recipes_of_before() -> None:
    """A manifest's spec without the newer fields reads as InceptionV4's and BERT's."""
    image = asdict(ImageSpec.resolve("random:7", grid=2, device="cpu", precision="fp32"))
    text = asdict(TextSpec.resolve(minilm(), max_tokens=16, device="cpu", precision="fp32"))
    newer = {"model", "width", "mean", "std", "model_args", "named_model"}, {"model", "config_hash", "special_tokens"}
    for spec, kind, added in ((image, ImageSpec, newer[0]), (text, TextSpec, newer[1])):
        assert added <= {field.name for field in fields(kind)}
        old = {name: value for name, value in spec.items() if name not in added}
        assert asdict(kind(**old)) == spec
        assert json.loads(json.dumps(spec))["model"] in ("inception_v4", "bert")


def test_neither_protocols_nor_specs_import_torch() -> None:
    code = (
        "import sys\n"
        "from camenn_model.encoders.protocol import open_image_encoder\n"
        "from camenn_model.encoders.spec import ImageSpec, TextSpec\n"
        "ImageSpec.resolve('random:1', grid=2, device='cpu', precision='fp32')\n"
        f"TextSpec.resolve({minilm()!r}, max_tokens=16, device='cpu')\n"
        "print([name for name in ('torch', 'timm', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
