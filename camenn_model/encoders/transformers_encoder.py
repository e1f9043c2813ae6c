"""Text encoders of transformers' `AutoModel` as frozen token encoders.

They give a title's last hidden states: XLM-RoBERTa, DistilBERT, MPNet and what else
`text_models.py` lists.
"""

import json
from pathlib import Path

from transformers import AutoModel

from camenn_model.encoders.text_models import load_tokenizer
from camenn_model.encoders.title_encoder import TitleEncoder, load_pretrained
from camenn_model.encoders.weights import TEXT_FLAG, WeightsError


class TransformersEncoder(TitleEncoder):
    """Titles → token states by an `AutoModel`.

    Titles are tokenised by the `tokenizer.json` of its directory. No code that a model brings along
    is run, and no pickled weights are read.
    """

    def _load(self, path: Path) -> None:
        self.tokenizer = load_tokenizer(path)
        self.tokenizer.no_padding()
        # Set once, not by call: threads may share it.
        self.tokenizer.enable_truncation(self.spec.max_tokens)
        model = load_pretrained(AutoModel, path, self.spec, trust_remote_code=False)
        rows = model.get_input_embeddings().num_embeddings
        if self.tokenizer.get_vocab_size() > rows:
            raise WeightsError(
                f"{TEXT_FLAG} {self.spec.source}: its tokenizer.json has {self.tokenizer.get_vocab_size():,} tokens, "
                f"more than the {rows:,} of its weights. Name a directory where both are of one model."
            )
        # Models that count positions from the pad token know it by their configuration, whatever the tokenizer says.
        pad = model.config.pad_token_id
        self._pad = 0 if pad is None else int(pad)
        written = json.loads((path / "tokenizer.json").read_text())["model"]
        unknown = written.get("unk_id")
        self._unknown = self.tokenizer.token_to_id(written.get("unk_token") or "") if unknown is None else unknown
        self.model = model

    def _tokenise(self, texts: list[str]) -> list[list[int]]:
        return [found.ids for found in self.tokenizer.encode_batch(texts)]

    @property
    def unknown_token(self) -> int | None:
        """Return the id of what the vocabulary does not know."""
        return self._unknown

    @property
    def pad_token(self) -> int:
        """Return the id that titles are padded with."""
        return self._pad
