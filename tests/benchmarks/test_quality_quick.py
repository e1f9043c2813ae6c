"""The quick variant of the quality benchmark.

Its claims hold, on the demo's city and, where available, on the real log.
"""

import json
from pathlib import Path

import pytest

from benchmarks.quality.__main__ import main
from tests.support.encoder_sources import SHARED, minilm


@pytest.mark.slow
def test_quick_claims_hold(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lightgbm")
    flags = ["--quick", "--work", str(tmp_path), "--text_encoder", minilm()]
    weights, real = SHARED / "models" / "inception_v4_grocery.safetensors", SHARED / "complete_journey"
    if weights.exists():
        flags += ["--image_weights", str(weights)]
    if real.exists():
        flags += ["--real", str(real), "--image_root", str(SHARED / "grocery_photos")]
    code = main(flags)
    found = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert code == 0, found
    assert all(found["claims"].values())
    assert found["expected_auc"]["full"] > found["expected_auc"]["permuted_labels"]
    assert (found["beats_lightgbm"] is not None) == real.exists()
