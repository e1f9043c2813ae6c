"""The base of text encoders.

Titles go through a model in batches that are fixed by length, and its files are checked.

Shapes: N titles, T = `max_tokens`, d the model's width.
"""

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.utils import logging

from camenn_model.encoders.device import DTYPES, LOADING, check_device
from camenn_model.encoders.protocol import TitleStates
from camenn_model.encoders.spec import TextSpec
from camenn_model.encoders.text_models import find_text_encoder, hash_config, hash_vocabulary, text_config
from camenn_model.encoders.weights import TEXT_FLAG, WeightsError, hash_safetensors
from camenn_model.hashing import normalise_title

_CHARACTERS_PER_TOKEN = 32
"""A title is cut at this many characters for each token that is kept, before it is tokenised at all."""


class TitleEncoder:
    """Titles → token states, whatever a title's neighbours.

    A title has the same bits whatever its neighbours. It is padded to the least bucket that holds
    it, and each bucket has its own fixed batch. Attention is the eager one. Measured with it, row,
    neighbours and number of threads change no bit, and bf16 keeps a cosine of 0.9998 to fp32
    (MiniLM, 6 layers).
    """

    tokenizer: Any
    model: torch.nn.Module

    def __init__(self, spec: TextSpec) -> None:
        """Load the model and the vocabulary that `spec` names.

        Raises:
            WeightsError: they cannot be had here, or are not those of the submission, or not all of
                the model's.
            DeviceError: this machine cannot honour the spec's device or precision.
        """
        started = time.monotonic()
        check_device(spec.device, spec.precision)
        self.spec = spec
        # Workers on other machines have no directory at the submitter's path, but may have the same model from the hub.
        path = Path(spec.path) if Path(spec.path).is_dir() else find_text_encoder(spec.source)
        if (
            hash_safetensors(path / "model.safetensors", TEXT_FLAG) != spec.weights_hash
            or hash_vocabulary(path, spec.model) != spec.vocabulary_hash
            or (spec.config_hash and hash_config(text_config(path)) != spec.config_hash)
        ):
            raise WeightsError(
                f"{TEXT_FLAG} {spec.source}: {path} is not the model that the job was submitted with. Put the "
                "same one on every worker."
            )
        with LOADING:
            self._load(path)
            self.model = self.model.eval().to(spec.device, DTYPES[spec.precision])
        self.start_seconds = time.monotonic() - started
        """Loading"""

    def _load(self, path: Path) -> None:
        """Set `tokenizer` and `model` from a directory.

        The model is on the CPU, with fp32 weights.
        """
        raise NotImplementedError

    def _tokenise(self, texts: list[str]) -> list[list[int]]:
        """Return the token ids of normalised titles.

        Special ones are included. A title has `max_tokens` at most.
        """
        raise NotImplementedError

    @property
    def unknown_token(self) -> int | None:
        """Return the id of what the vocabulary does not know."""
        raise NotImplementedError

    @property
    def pad_token(self) -> int:
        """Return the id that titles are padded with."""
        raise NotImplementedError

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
        tokens = self._tokens(titles)
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

    def _tokens(self, titles: list[str]) -> list[list[int]]:
        limit = _CHARACTERS_PER_TOKEN * self.spec.max_tokens
        texts = [normalise_title(title[: 4 * limit])[:limit] for title in titles]
        if not texts:
            return []
        # Special tokens alone: nothing in the title is text (it is empty, or of control characters).
        return [row if len(row) > self.spec.special_tokens else [] for row in self._tokenise(texts)]

    def _unknown_shares(self, tokens: list[list[int]]) -> np.ndarray:
        special = self.spec.special_tokens
        unknown = -1 if self.unknown_token is None else self.unknown_token
        return np.array([ids.count(unknown) / max(1, len(ids) - special) for ids in tokens], dtype=np.float32)

    @torch.inference_mode()
    def _forward(self, tokens: list[list[int]], bucket: int) -> np.ndarray:
        """Compute the last hidden states of one batch.

        They are float32 [len(tokens), bucket, d], of at most one batch of titles.
        """
        batch = self.spec.batch_size(bucket)
        ids = torch.full((batch, bucket), self.pad_token, dtype=torch.long)
        mask = torch.zeros((batch, bucket), dtype=torch.long)
        # Rows without a title attend to their first token: a softmax over nothing would be NaN.
        mask[:, 0] = 1
        for row, title in enumerate(tokens):
            ids[row, : len(title)] = torch.tensor(title)
            mask[row, : len(title)] = 1
        output = self.model(input_ids=ids.to(self.spec.device), attention_mask=mask.to(self.spec.device))
        return output.last_hidden_state[: len(tokens)].float().cpu().numpy()


def load_pretrained(kind: Any, path: Path, spec: TextSpec, **arguments: Any) -> Any:
    """Load a model of transformers from a directory.

    It has fp32 weights, on the CPU. `kind` is the class that loads it. The pooler is left out of
    what must be there.

    Raises:
        WeightsError: tensors are missing, or of other shapes.
    """
    verbosity = logging.get_verbosity()
    # The pooler is left out on purpose. What is missing is checked below.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model, found = kind.from_pretrained(
            path,
            local_files_only=True,
            use_safetensors=True,
            attn_implementation="eager",
            dtype=torch.float32,
            output_loading_info=True,
            **arguments,
        )
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()
    lacking = sorted(found["missing_keys"]) + sorted(
        key[0] if isinstance(key, tuple) else key for key in found["mismatched_keys"]
    )
    lacking = [name for name in lacking if not name.startswith("pooler.")]
    if lacking:
        raise WeightsError(
            f"{TEXT_FLAG} {spec.source}: its weights lack {len(lacking)} of {type(model).__name__}'s tensors, "
            f"{lacking[0]} first. Name a whole {spec.model} model."
        )
    return model
