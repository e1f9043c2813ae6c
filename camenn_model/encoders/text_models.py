"""The registry of text encoders.

It has what a spec must know of each, the class that builds it, and the files it needs. BERT has a
recipe of its own. Every other `model_type` that is listed goes through transformers' `AutoModel`.
Nothing here imports torch.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from camenn_model.encoders.weights import (
    TEXT_FLAG,
    WeightsError,
    fetch_from_hub,
    file_in,
    looks_local,
    read_config,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BERT = "bert"
_FILES = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "special_tokens_map.json",
)
_BERT_VOCABULARY = ("tokenizer.json", "tokenizer_config.json", "vocab.txt")
_NOT_COMPUTED = {"architectures", "dtype", "torch_dtype", "transformers_version", "id2label", "label2id", "auto_map"}
"""Keys of `config.json` that change no state"""


@dataclass(frozen=True, kw_only=True)
class TextFacts:
    """The facts of a text architecture that its spec needs."""

    encoder: str = "transformers_encoder:TransformersEncoder"
    """'module:Class'"""
    width: str = "hidden_size"
    """key of `config.json`"""
    after_pad: bool = False
    """position ids begin after the id of the pad token, which costs that many positions and one"""


_AFTER_PAD = TextFacts(after_pad=True)
TEXT_ENCODERS = {
    BERT: TextFacts(encoder="bert:BertEncoder"),
    "albert": TextFacts(),
    "camembert": _AFTER_PAD,
    "data2vec-text": _AFTER_PAD,
    "deberta": TextFacts(),
    "deberta-v2": TextFacts(),
    "distilbert": TextFacts(width="dim"),
    "electra": TextFacts(),
    "ernie": TextFacts(),
    "megatron-bert": TextFacts(),
    "modernbert": TextFacts(),
    "mpnet": _AFTER_PAD,
    "rembert": TextFacts(),
    "roberta": _AFTER_PAD,
    "roberta-prelayernorm": _AFTER_PAD,
    "xlm-roberta": _AFTER_PAD,
    "xlm-roberta-xl": _AFTER_PAD,
}
"""By `model_type` of `config.json`. A test holds each to its plain forward pass: padding, which a
batch needs, must change nothing, as it does in models that convolve or pool over tokens."""


def text_facts(source: str, config: dict[str, Any]) -> TextFacts:
    """Find the facts of a text architecture.

    Raises:
        WeightsError: it is none that gives a state for each token of a title.
    """
    kind = config.get("model_type")
    facts = TEXT_ENCODERS.get(str(kind))
    remedy = f"Name an encoder of type {', '.join(TEXT_ENCODERS)}."
    generates = any(str(name).endswith(("ForCausalLM", "LMHeadModel")) for name in config.get("architectures") or ())
    if config.get("is_encoder_decoder"):
        raise WeightsError(
            f"{TEXT_FLAG} {source}: its architecture is '{kind}', an encoder and a decoder; titles need an encoder "
            f"alone. {remedy}"
        )
    if config.get("is_decoder") or (generates and facts is None):
        raise WeightsError(
            f"{TEXT_FLAG} {source}: its architecture is '{kind}', a decoder, whose tokens do not see those after "
            f"them. {remedy}"
        )
    if facts is None:
        raise WeightsError(f"{TEXT_FLAG} {source}: its architecture is '{kind}', which camenn does not read. {remedy}")
    return facts


def text_width(source: str, facts: TextFacts, config: dict[str, Any]) -> int:
    """Read the features of a token.

    Raises:
        WeightsError: `config.json` does not say.
    """
    width = config.get(facts.width)
    if not isinstance(width, int):
        raise WeightsError(
            f"{TEXT_FLAG} {source}: config.json has no '{facts.width}', the width of a token. Fetch it again."
        )
    return width


def most_tokens(facts: TextFacts, config: dict[str, Any]) -> int:
    """Return the tokens that an encoder has positions for.

    They are 512 at most.
    """
    positions = config.get("max_position_embeddings", 512)
    if facts.after_pad:
        pad = config.get("pad_token_id")
        positions -= (1 if pad is None else pad) + 1
    return min(positions, 512)


def find_text_encoder(source: str) -> Path:
    """Find the directory of a text encoder.

    It is local, or fetched by hub name.

    Raises:
        WeightsError: there is none, it is of no type that is read, or it lacks its configuration,
            weights or vocabulary.
    """
    path = Path(source).expanduser()
    if not path.is_dir():
        if path.exists() or looks_local(source):
            raise WeightsError(
                f"{TEXT_FLAG} {source}: no such directory. Give one with config.json, model.safetensors and "
                "tokenizer.json, or a hub name."
            )
        path = fetch_from_hub(source, _FILES, TEXT_FLAG)
    config = text_config(path)
    text_facts(source, config)
    file_in(path, "model.safetensors", TEXT_FLAG)
    wanted = ("tokenizer.json", "vocab.txt") if config["model_type"] == BERT else ("tokenizer.json",)
    if not any((path / name).is_file() for name in wanted):
        raise WeightsError(
            f"{TEXT_FLAG} {source}: {path} holds no {' or '.join(wanted)}, and other forms of a vocabulary, such as "
            "sentencepiece's, are not read. Make it where transformers and sentencepiece are installed: "
            f"AutoTokenizer.from_pretrained('{source}').save_pretrained(DIRECTORY)"
        )
    return path


def text_config(path: Path) -> dict[str, Any]:
    """Read `config.json` of a model directory.

    Raises:
        WeightsError: there is none.
    """
    return read_config(file_in(path, "config.json", TEXT_FLAG), TEXT_FLAG)


def hash_vocabulary(directory: Path, kind: str = BERT) -> str:
    """Hash the tokenizer's files.

    They are those that an encoder of the `model_type` reads. Returns the sha256 (hex). Other tokens
    are another encoder.
    """
    digest = hashlib.sha256()
    for name in _BERT_VOCABULARY if kind == BERT else ("tokenizer.json",):
        if (directory / name).is_file():
            digest.update(name.encode() + b"\n" + (directory / name).read_bytes())
    return digest.hexdigest()


def hash_config(config: dict[str, Any]) -> str:
    """Hash what a text encoder's configuration says of its computation.

    Returns the sha256 (hex). The number of heads, say, changes the states and no weight.
    """
    computed = {key: value for key, value in config.items() if key not in _NOT_COMPUTED and not key.startswith("_")}
    return hashlib.sha256(json.dumps(computed, sort_keys=True).encode()).hexdigest()


def count_special_tokens(directory: Path) -> int:
    """Count the special tokens of a title, such as [CLS].

    Raises:
        WeightsError: `tokenizer.json` cannot be read.
    """
    return load_tokenizer(directory).num_special_tokens_to_add(False)


def load_tokenizer(directory: Path) -> "Tokenizer":
    """Load `tokenizer.json` as it is.

    transformers 5 takes its vocabulary only, and builds normaliser and pre-tokeniser from the
    class that `tokenizer_config.json` names, whatever the file says of them.

    Raises:
        WeightsError: it cannot be read.
    """
    from tokenizers import Tokenizer

    file = file_in(directory, "tokenizer.json", TEXT_FLAG)
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exceptions
        raise WeightsError(f"{TEXT_FLAG}: {file} cannot be read ({error}). Fetch it again.") from error
