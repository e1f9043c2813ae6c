"""BERT as a frozen token encoder.

It gives a title's last hidden states (Devlin et al. 2019).
"""

import threading
from pathlib import Path

from transformers import AutoTokenizer, BertModel

from camenn_model.encoders.title_encoder import TitleEncoder, load_pretrained


class BertEncoder(TitleEncoder):
    """Titles → token states by a `BertModel`."""

    def _load(self, path: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        self.model = load_pretrained(BertModel, path, self.spec, add_pooling_layer=False)
        # Each call sets the tokenizer's truncation: two at once are an error ("Already borrowed").
        self.tokenizing = threading.Lock()

    def _tokenise(self, texts: list[str]) -> list[list[int]]:
        with self.tokenizing:
            return self.tokenizer(texts, truncation=True, max_length=self.spec.max_tokens, return_attention_mask=False)[
                "input_ids"
            ]

    @property
    def unknown_token(self) -> int | None:
        """Return the id of what the vocabulary does not know."""
        return self.tokenizer.unk_token_id

    @property
    def pad_token(self) -> int:
        """Return the id that titles are padded with."""
        return self.tokenizer.pad_token_id
