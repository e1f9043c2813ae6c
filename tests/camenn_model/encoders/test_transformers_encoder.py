import json
import logging
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoModel

from camenn_model.encoders.machine import has_native_bf16
from camenn_model.encoders.protocol import open_text_encoder
from camenn_model.encoders.spec import TextSpec
from camenn_model.encoders.text_models import TEXT_ENCODERS
from camenn_model.encoders.transformers_encoder import TransformersEncoder
from camenn_model.encoders.weights import WeightsError
from schemas.errors import InputError
from tests.support.tiny_encoders import MOST_TOKENS, unigram_tokenizer, write_text_model

TITLES = [
    "Apple",
    "",
    "organic whole milk 1 gal",
    "红富士 🍎",
    "fresh red apple juice, cheese and bread: a pack of 12 for the whole week",
    "  \t",
    "many words " * 1_000,
    "z" * 10_000,
]


@pytest.fixture(scope="module")
def xlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_model(tmp_path_factory.mktemp("xlm"))


def resolve(directory: Path, *, max_tokens: int = 20, precision: str = "fp32") -> TextSpec:
    spec = TextSpec.resolve(str(directory), max_tokens=max_tokens, device="cpu", precision=precision)
    return replace(spec, tokens_per_batch=64)


def plain_states(directory: Path, title: str, max_tokens: int = 20) -> np.ndarray:
    """What transformers alone makes of one title's tokens, neither padded nor in a batch."""
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.enable_truncation(max_tokens)
    model = AutoModel.from_pretrained(directory).eval()
    with torch.inference_mode():
        return model(input_ids=torch.tensor([tokenizer.encode(title).ids])).last_hidden_state[0].numpy()


@pytest.mark.parametrize("kind", [kind for kind in TEXT_ENCODERS if kind != "bert"])
def test_states_are_those_of_transformers_itself(tmp_path: Path, kind: str) -> None:
    directory = write_text_model(tmp_path, kind)
    spec = resolve(directory)
    encoder = open_text_encoder(spec)
    assert isinstance(encoder, TransformersEncoder) and spec.model == kind and spec.shape == (20, 48)
    encoded = encoder.encode(TITLES)
    assert encoded.lengths.tolist() == [3, 0, 11, 6, 20, 0, 20, 20]
    assert not encoded.states[[1, 5]].any()
    for row in (0, 2, 3, 4, 6):
        expected = plain_states(directory, TITLES[row].strip())
        length = encoded.lengths[row]
        assert len(expected) == length
        np.testing.assert_allclose(encoded.states[row, :length], expected, rtol=2e-3, atol=2e-3)
        assert not encoded.states[row, length:].any()
    # Titles of one length in one batch differ, so that the comparison says something.
    assert np.abs(encoded.states[4] - encoded.states[6]).max() > 0.1
    assert (encoder.encode([TITLES[2]]).states[0] == encoded.states[2]).all(), "whatever its neighbours"


@pytest.mark.parametrize(
    "precision",
    ["fp32", pytest.param("bf16", marks=pytest.mark.skipif(not has_native_bf16(), reason="no native bf16"))],
)
def test_bits_do_not_depend_on_neighbours(xlm: Path, precision: str) -> None:
    encoder = TransformersEncoder(resolve(xlm, precision=precision))
    random = np.random.default_rng(0)
    titles = [" ".join(random.choice(("apple", "milk", "bio", "x1"), size)) for size in random.integers(1, 20, 40)]
    together = encoder.encode(titles)
    assert len(np.unique(np.digitize(together.lengths, (8.5, 16.5)))) == 3
    order = random.permutation(len(titles))
    assert (encoder.encode([titles[row] for row in order]).states == together.states[order]).all()
    for row in (0, 39):
        assert (encoder.encode([titles[row]]).states[0] == together.states[row]).all()
    with ThreadPoolExecutor(4) as pool:
        for states in pool.map(lambda _: encoder.encode(titles).states, range(8)):
            assert (states == together.states).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_states_on_cuda_are_near_fp32_and_blind_to_neighbours(xlm: Path) -> None:
    full = TransformersEncoder(resolve(xlm)).encode(TITLES).states.astype(np.float32)
    encoder = TransformersEncoder(replace(resolve(xlm, precision="bf16"), device="cuda"))
    states = encoder.encode(TITLES).states
    assert (encoder.encode(TITLES[::-1]).states == states[::-1]).all()
    assert np.abs(states.astype(np.float32) - full).mean() < 0.05


def test_the_tokenizer_is_read_as_it_is_written(xlm: Path) -> None:
    """It lowers letters, which transformers' own class for XLM-RoBERTa would not."""
    (xlm / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "XLMRobertaTokenizer"}))
    try:
        encoded = TransformersEncoder(resolve(xlm)).encode(["APPLE Milk", "apple milk", "apple 红", "红"])
    finally:
        (xlm / "tokenizer_config.json").unlink()
    assert encoded.lengths.tolist() == [4, 4, 5, 4]
    assert (encoded.states[0] == encoded.states[1]).all()
    assert encoded.unknown_share.tolist() == [0, 0, pytest.approx(1 / 3), 0.5]


def test_spec_knows_positions_after_the_pad_token(xlm: Path, tmp_path: Path) -> None:
    assert resolve(xlm, max_tokens=MOST_TOKENS).shape == (MOST_TOKENS, 48)
    with pytest.raises(InputError, match=f"--max_tokens {MOST_TOKENS + 1}: must be between 3 .* and {MOST_TOKENS},"):
        resolve(xlm, max_tokens=MOST_TOKENS + 1)
    longest = TransformersEncoder(resolve(xlm, max_tokens=MOST_TOKENS)).encode(["many words " * 40])
    assert longest.lengths.tolist() == [MOST_TOKENS]
    other = write_text_model(tmp_path, "distilbert")
    assert resolve(other, max_tokens=MOST_TOKENS + 2).width == 48
    with pytest.raises(InputError, match=f"--max_tokens {MOST_TOKENS + 3}"):
        resolve(other, max_tokens=MOST_TOKENS + 3)


def test_spec_counts_the_special_tokens_of_the_tokenizer(xlm: Path, tmp_path: Path) -> None:
    shutil.copytree(xlm, tmp_path, dirs_exist_ok=True)
    tokenizer = unigram_tokenizer()
    tokenizer.post_processor = None
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    spec = resolve(tmp_path, max_tokens=1)
    assert spec.special_tokens == 0 and resolve(xlm).special_tokens == 2
    encoded = TransformersEncoder(spec).encode(["apple milk", ""])
    assert encoded.lengths.tolist() == [1, 0]
    with pytest.raises(InputError, match="--max_tokens 2: must be between 3"):
        resolve(xlm, max_tokens=2)


def test_fingerprint_changes_with_everything_that_counts(xlm: Path, tmp_path: Path) -> None:
    spec = resolve(xlm)
    shutil.copytree(xlm, tmp_path, dirs_exist_ok=True)
    config = json.loads((xlm / "config.json").read_text())
    found = {spec.fingerprint, resolve(xlm, max_tokens=16).fingerprint, replace(spec, model="roberta").fingerprint}
    for change in ({"num_attention_heads": 2}, {"layer_norm_eps": 1e-3}):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        found.add(resolve(tmp_path).fingerprint)
    (tmp_path / "config.json").write_text(json.dumps(config | {"_name_or_path": "x", "transformers_version": "9"}))
    assert resolve(tmp_path).fingerprint == spec.fingerprint
    unigram_tokenizer(lower=False).save(str(tmp_path / "tokenizer.json"))
    found.add(resolve(tmp_path).fingerprint)
    assert len(found) == 6 and spec.parts["model"] == "xlm-roberta"


def test_encoders_refuse_a_model_that_changed_since_submission(xlm: Path, tmp_path: Path) -> None:
    shutil.copytree(xlm, tmp_path, dirs_exist_ok=True)
    spec = resolve(tmp_path)
    config = json.loads((xlm / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_attention_heads": 2}))
    with pytest.raises(WeightsError, match="--text_encoder.*submitted with"):
        TransformersEncoder(spec)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "t5", "is_encoder_decoder": True}, "'t5', an encoder and a decoder.*Name an encoder of type"),
        ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, "'gpt2', a decoder.*Name an encoder of type"),
        ({"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}, "'qwen3', a decoder"),
        ({"model_type": "roberta", "is_decoder": True}, "'roberta', a decoder"),
        ({"model_type": "fnet"}, "'fnet', which camenn does not read.*xlm-roberta"),
        ({"hidden_size": 8}, "'None', which camenn does not read"),
        ({"model_type": "new", "auto_map": {"AutoModel": "modeling.NewModel"}}, "'new', which camenn does not read"),
    ],
)
def test_other_architectures_are_refused_by_kind(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=f"--text_encoder {tmp_path}: its architecture is {message}"):
        resolve(tmp_path)


def test_what_is_missing_is_named_with_a_remedy(xlm: Path, tmp_path: Path) -> None:
    shutil.copytree(xlm, tmp_path, dirs_exist_ok=True)
    (tmp_path / "tokenizer.json").rename(tmp_path / "sentencepiece.bpe.model")
    with pytest.raises(WeightsError, match=r"--text_encoder.*holds no tokenizer.json.*sentencepiece.*save_pretrained"):
        resolve(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(WeightsError, match=r"--text_encoder: .*tokenizer.json cannot be read.*Fetch it again"):
        resolve(tmp_path)
    shutil.copy(xlm / "tokenizer.json", tmp_path)
    config = json.loads((xlm / "config.json").read_text())
    del config["hidden_size"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match="--text_encoder.*no 'hidden_size'"):
        resolve(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match="holds no model.safetensors"):
        resolve(tmp_path)


def test_weights_that_do_not_fit_are_refused(xlm: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copytree(xlm, tmp_path, dirs_exist_ok=True)
    tensors = load_file(xlm / "model.safetensors")
    # The pooler is not used: that it is missing is neither an error nor a warning.
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("pooler.")}
    assert len(kept) < len(tensors)
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    with caplog.at_level(logging.WARNING):
        states = TransformersEncoder(resolve(tmp_path)).encode(TITLES).states
    assert not caplog.records and (states == TransformersEncoder(resolve(xlm)).encode(TITLES).states).all()
    del kept["encoder.layer.1.output.dense.weight"]
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeightsError, match="--text_encoder.*XLMRobertaModel.*encoder.layer.1.output.dense.weight"):
        TransformersEncoder(resolve(tmp_path))
    shutil.copy(xlm / "model.safetensors", tmp_path)
    unigram_tokenizer([f"word{number}" for number in range(99)]).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(WeightsError, match="--text_encoder.*tokens, more than the 64 of its weights"):
        TransformersEncoder(resolve(tmp_path))


def test_bert_with_another_vocabulary_stays_a_bert(tmp_path: Path) -> None:
    """As multilingual E5 has it: BERT's layers, XLM-RoBERTa's tokens."""
    directory = write_text_model(tmp_path, "bert")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "unk_token": "<unk>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    encoded = open_text_encoder(resolve(directory)).encode(TITLES)
    assert encoded.lengths.tolist() == [3, 0, 11, 6, 20, 0, 20, 20]
    expected = plain_states(directory, TITLES[2])
    np.testing.assert_allclose(encoded.states[2, :11], expected, rtol=2e-3, atol=2e-3)
