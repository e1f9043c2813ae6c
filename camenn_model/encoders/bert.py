"""BERT as a frozen token encoder.

It gives a title's last hidden states (Devlin et al. 2019).

Shapes: N titles, T = `max_tokens`, d the model's width.
"""

import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import AutoTokenizer, BertModel
from transformers.utils import logging

from camenn_model.encoders.device import DTYPES, LOADING, check_device
from camenn_model.encoders.spec import TextSpec
from camenn_model.encoders.weights import TEXT_FLAG, WeightsError, find_text_encoder, hash_safetensors, hash_vocabulary
from camenn_model.hashing import normalise_title

_CHARACTERS_PER_TOKEN = 32
"""A title is cut at this many characters for each token that is kept, before it is tokenised at all."""


class TitleStates(NamedTuple):
    """Titles, encoded."""

    states: np.ndarray
    """float16 [N, T, d]; zero beyond each title's own tokens"""
    lengths: np.ndarray
    """int32 [N]: tokens in use, [CLS] and [SEP] included; 0 = no text"""
    unknown_share: np.ndarray
    """float32 [N]: share of the tokens in use, [CLS] and [SEP] aside, that the vocabulary does not know"""


class TextEncoder:
    """Titles → token states, whatever a title's neighbours.

    A title has the same bits whatever its neighbours. It is padded to the least bucket that holds
    it, and each bucket has its own fixed batch. Attention is the eager one. Measured with it, row,
    neighbours and number of threads change no bit, and bf16 keeps a cosine of 0.9998 to fp32
    (MiniLM, 6 layers).
    """

    def __init__(self, spec: TextSpec) -> None:
        """Load the model and the vocabulary that `spec` names.

        Raises:
            WeightsError: they cannot be had here, or are not those of the submission, or not all of a
                BertModel's.
            DeviceError: this machine cannot honour the spec's device or precision.
        """
        started = time.monotonic()
        check_device(spec.device, spec.precision)
        self.spec = spec
        # Workers on other machines have no directory at the submitter's path, but may have the same model from the hub.
        path = Path(spec.path) if Path(spec.path).is_dir() else find_text_encoder(spec.source)
        if (
            hash_safetensors(path / "model.safetensors", TEXT_FLAG) != spec.weights_hash
            or hash_vocabulary(path) != spec.vocabulary_hash
        ):
            raise WeightsError(
                f"{TEXT_FLAG} {spec.source}: {path} is not the model that the job was submitted with. Put the "
                "same one on every worker."
            )
        with LOADING:
            self.tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
            self.model = _load_model(path, spec)
        # Each call sets the tokenizer's truncation: two at once are an error ("Already borrowed").
        self.tokenizing = threading.Lock()
        self.start_seconds = time.monotonic() - started
        """Loading"""

    @property
    def fingerprint(self) -> str:
        """Return 16 hex digits, see `TextSpec.parts`."""
        return self.spec.fingerprint

    def encode(self, titles: list[str]) -> TitleStates:
        """Encode titles, normalised or not.

        An empty title has length 0 and states of zero.

        Raises:
            FloatingPointError: states beyond float16, which only broken weights give.
        """
        spec = self.spec
        tokens = self._tokenise(titles)
        lengths = np.array([len(ids) for ids in tokens], dtype=np.int32)
        states = np.zeros((len(titles), spec.max_tokens, spec.width), dtype=np.float16)
        shortest = 1
        for bucket in spec.buckets:
            rows = np.flatnonzero((lengths >= shortest) & (lengths <= bucket))
            shortest = bucket + 1
            size = spec.batch_size(bucket)
            for start in range(0, len(rows), size):
                piece = rows[start : start + size]
                output = self._forward([tokens[row] for row in piece], bucket)
                output[np.arange(bucket)[None, :] >= lengths[piece, None]] = 0
                states[piece, :bucket] = output
        if not np.isfinite(states).all():
            raise FloatingPointError(f"{TEXT_FLAG} {spec.source}: states beyond float16; these weights cannot be used")
        return TitleStates(states, lengths, self._unknown_shares(tokens))

    def _tokenise(self, titles: list[str]) -> list[list[int]]:
        limit = _CHARACTERS_PER_TOKEN * self.spec.max_tokens
        texts = [normalise_title(title[: 4 * limit])[:limit] for title in titles]
        if not texts:
            return []
        with self.tokenizing:
            ids = self.tokenizer(texts, truncation=True, max_length=self.spec.max_tokens, return_attention_mask=False)[
                "input_ids"
            ]
        # [CLS] [SEP] alone: nothing in the title is text (it is empty, or of control characters).
        return [row if len(row) > 2 else [] for row in ids]

    def _unknown_shares(self, tokens: list[list[int]]) -> np.ndarray:
        unknown = self.tokenizer.unk_token_id
        return np.array([ids.count(unknown) / max(1, len(ids) - 2) for ids in tokens], dtype=np.float32)

    @torch.inference_mode()
    def _forward(self, tokens: list[list[int]], bucket: int) -> np.ndarray:
        """Compute the last hidden states of one batch.

        They are float32 [len(tokens), bucket, d], of at most one batch of titles.
        """
        batch = self.spec.batch_size(bucket)
        ids = torch.full((batch, bucket), self.tokenizer.pad_token_id, dtype=torch.long)
        mask = torch.zeros((batch, bucket), dtype=torch.long)
        # Rows without a title attend to their first token: a softmax over nothing would be NaN.
        mask[:, 0] = 1
        for row, title in enumerate(tokens):
            ids[row, : len(title)] = torch.tensor(title)
            mask[row, : len(title)] = 1
        output = self.model(input_ids=ids.to(self.spec.device), attention_mask=mask.to(self.spec.device))
        return output.last_hidden_state[: len(tokens)].float().cpu().numpy()


def _load_model(path: Path, spec: TextSpec) -> BertModel:
    verbosity = logging.get_verbosity()
    # The pooler is left out on purpose. What is missing is checked below.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        loaded: Any = BertModel.from_pretrained(
            path,
            local_files_only=True,
            use_safetensors=True,
            add_pooling_layer=False,
            attn_implementation="eager",
            dtype=torch.float32,
            output_loading_info=True,
        )
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()
    model: BertModel = loaded[0]
    found = loaded[1]
    lacking = sorted(found["missing_keys"]) + sorted(
        key[0] if isinstance(key, tuple) else key for key in found["mismatched_keys"]
    )
    if lacking:
        raise WeightsError(
            f"{TEXT_FLAG} {spec.source}: its weights lack {len(lacking)} of BertModel's tensors, {lacking[0]} "
            "first. Name a whole BERT model."
        )
    return model.eval().to(spec.device, DTYPES[spec.precision])
