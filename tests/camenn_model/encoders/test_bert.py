import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from camenn_model.encoders.bert import BertEncoder
from camenn_model.encoders.device import DTYPES
from camenn_model.encoders.inception_v4 import InceptionV4Encoder
from camenn_model.encoders.machine import has_native_bf16
from camenn_model.encoders.spec import ImageSpec, TextSpec
from camenn_model.encoders.weights import WeightsError
from tests.support.encoder_sources import minilm

TITLES = [
    "apple",
    "",
    "organic whole milk 1 gal",
    "红富士苹果 新鲜水果 500克",
    "🍎🍌 fresh fruit",
    "private label yoghurt strawberry low fat with fruit pieces 4 x 125 g family pack",
    "\u200b\u200b",
    "zzxqj 4x100g crème brûlée!!!",
    "many words " * 1_000,
    "x" * 10_000,
]


@pytest.fixture(scope="module")
def encoder() -> BertEncoder:
    # A small batch, so that the tests are quick; the rules are the same.
    return BertEncoder(replace(TextSpec.resolve(minilm(), max_tokens=32, device="cpu"), tokens_per_batch=128))


def many_titles() -> list[str]:
    """60 titles of 1 to 40 words, in three buckets."""
    random = np.random.default_rng(0)
    words = ["apple", "milk", "fresh", "organic", "500", "g", "pack", "juice", "bio", "cheese", "bread"]
    return [" ".join(random.choice(words, size)) for size in random.integers(1, 40, 60)]


def test_text_encoder_gives_states_up_to_each_length(encoder: BertEncoder) -> None:
    encoded = encoder.encode(TITLES)
    assert encoded.states.shape == (10, 32, 384) and encoded.states.dtype == np.float16
    assert encoded.lengths.dtype == np.int32 and encoded.unknown_share.dtype == np.float32
    assert encoded.lengths[0] == 3 and encoded.lengths[8] == 32
    for states, length in zip(encoded.states, encoded.lengths, strict=True):
        assert (states[length:] == 0).all()
        assert (np.abs(states[:length].astype(np.float32)).sum(-1) > 0).all()


def test_text_encoder_knows_no_text(encoder: BertEncoder) -> None:
    encoded = encoder.encode(["", "  \n", "\u200b"])
    assert encoded.lengths.tolist() == [0, 0, 0]
    assert not encoded.states.any() and not encoded.unknown_share.any()
    assert encoder.encode([]).states.shape == (0, 32, 384)


def test_text_encoder_counts_unknown_words(encoder: BertEncoder) -> None:
    shares = encoder.encode(["red apple", "🍎", "red 🍎", "x" * 10_000]).unknown_share
    assert shares.tolist() == [0, 1, 0.5, 1]


def test_text_encoder_cuts_long_titles_alike(encoder: BertEncoder) -> None:
    long, longer = (encoder.encode(["dried mango slices " * count]).states for count in (40, 4_000))
    assert (long == longer).all()


def test_text_encoder_normalises_titles(encoder: BertEncoder) -> None:
    states = encoder.encode(["cre\u0300me   brulee ", "cr\u00e8me brulee"]).states
    assert (states[0] == states[1]).all()


def test_text_encoder_agrees_with_the_plain_model(encoder: BertEncoder) -> None:
    full = BertEncoder(replace(encoder.spec, precision="fp32"))
    title = "organic whole milk 1 gal"
    with torch.inference_mode():
        expected = full.model(**full.tokenizer(title, return_tensors="pt")).last_hidden_state[0].numpy()
    encoded = full.encode([title])
    assert encoded.lengths[0] == len(expected)
    np.testing.assert_allclose(encoded.states[0, : len(expected)], expected, atol=2e-3)


@pytest.mark.parametrize(
    "precision",
    ["fp32", pytest.param("bf16", marks=pytest.mark.skipif(not has_native_bf16(), reason="no native bf16"))],
)
def test_text_encoder_bits_do_not_depend_on_neighbours(encoder: BertEncoder, precision: str) -> None:
    encoder = BertEncoder(replace(encoder.spec, precision=precision))
    titles = many_titles()
    together = encoder.encode(titles)
    assert len(np.unique(np.digitize(together.lengths, (8.5, 16.5)))) == 3
    order = np.random.default_rng(1).permutation(len(titles))
    shuffled = encoder.encode([titles[row] for row in order])
    assert (shuffled.states == together.states[order]).all()
    for row in (0, 59):
        assert (encoder.encode([titles[row]]).states[0] == together.states[row]).all()


@pytest.mark.skipif(not has_native_bf16(), reason="no native bf16 on this processor")
def test_text_encoder_bf16_is_near_fp32_per_token(encoder: BertEncoder) -> None:
    titles = TITLES + many_titles()[:30]
    half, full = (BertEncoder(replace(encoder.spec, precision=p)).encode(titles) for p in ("bf16", "fp32"))
    used = np.arange(32)[None, :] < full.lengths[:, None]
    a, b = half.states[used].astype(np.float64), full.states[used].astype(np.float64)
    cosine = (a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))
    assert cosine.min() >= 0.999


def test_text_encoder_refuses_a_model_that_lacks_weights(tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        shutil.copy(Path(minilm()) / name, tmp_path / name)
    tensors = load_file(Path(minilm()) / "model.safetensors")
    del tensors["encoder.layer.3.output.dense.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    spec = TextSpec.resolve(str(tmp_path), max_tokens=16, device="cpu")
    with pytest.raises(WeightsError, match="--text_encoder.*encoder.layer.3.output.dense.weight"):
        BertEncoder(spec)
    (tmp_path / "vocab.txt").write_text("changed")
    with pytest.raises(WeightsError, match="submitted with"):
        BertEncoder(spec)


def test_encoders_load_and_run_on_threads_of_one_process() -> None:
    """Runners load and run encoders in this way.

    transformers sets torch's default dtype while it loads, and a tokenizer cannot be called twice
    at once.
    """
    text = TextSpec.resolve(minilm(), max_tokens=16, device="cpu")
    image = ImageSpec.resolve("random:7", grid=1, patch_size=75, device="cpu", precision="auto")
    alone = BertEncoder(text).encode(TITLES).states
    with ThreadPoolExecutor(4) as pool:
        encoders: list[Any] = list(
            pool.map(lambda make: make(), [lambda: BertEncoder(text), lambda: InceptionV4Encoder(image)] * 2)
        )
        for encoder in encoders:
            dtype = DTYPES[encoder.spec.precision]
            parts = [(encoder.model, dtype)]
            if isinstance(encoder, InceptionV4Encoder):
                parts = [(encoder.model.stem, torch.float32), (encoder.model.body, dtype)]
            for part, expected in parts:
                assert {tensor.dtype for tensor in part.parameters()} == {expected}
        states = pool.map(lambda number: encoders[2 * (number % 2)].encode(TITLES[number % 3 :]).states, range(40))
        assert all(np.array_equal(found, alone[number % 3 :]) for number, found in enumerate(states))
