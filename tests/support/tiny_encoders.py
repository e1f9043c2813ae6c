"""Small encoders with random weights, as a hub would give them: directories with their own configurations."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import save_for_hf
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoConfig, AutoModel

WORDS = ("apple", "milk", "fresh", "organic", "pack", "juice", "cheese", "bread", "red", "whole")
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
MOST_TOKENS = 40


def write_timm_model(directory: Path, name: str, seed: int = 0, **pretrained: Any) -> Path:
    """A model of timm's with a classifier, exported by timm itself; `pretrained` changes its config."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = timm.create_model(name, num_classes=3)
        # Statistics of 0 and 1 would hide whether they are read.
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                mean, variance = module.running_mean, module.running_var
                assert mean is not None and variance is not None
                mean.normal_(0, 0.1)
                variance.uniform_(0.5, 1.5)
                module.weight.data.uniform_(0.5, 1.5)
    config: dict[str, Any] = {"pretrained_cfg": pretrained} if pretrained else {}
    save_for_hf(model, str(directory), model_config=config, safe_serialization=True)
    return directory


def unigram_tokenizer(words: Iterable[str] = WORDS, *, lower: bool = True) -> Tokenizer:
    """A tokenizer as XLM-RoBERTa's: pieces with word marks, <s> … </s>, pad 1, unknown 3."""
    pieces = ["<s>", "<pad>", "</s>", "<unk>", *(f"▁{word}" for word in words), "▁", *LETTERS]
    scores = [0.0] * 4 + [-2.0] * (len(pieces) - 5 - len(LETTERS)) + [-4.0] * (1 + len(LETTERS))
    tokenizer = Tokenizer(models.Unigram(list(zip(pieces, scores, strict=True)), unk_id=3))
    steps = [normalizers.NFKC(), *([normalizers.Lowercase()] if lower else [])]
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    tokenizer.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>"])
    return tokenizer


def write_text_model(directory: Path, kind: str = "xlm-roberta", seed: int = 0, **changes: Any) -> Path:
    """A small model of transformers with random weights, and a tokenizer.json of its own."""
    own: dict[str, dict[str, Any]] = {
        "distilbert": {"dim": 48, "n_layers": 2, "n_heads": 4, "hidden_dim": 64},
        "modernbert": {"cls_token_id": 0, "sep_token_id": 2},
        "rembert": {"input_embedding_size": 24},
        "deberta": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
        "deberta-v2": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 16},
    }
    settings: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": MOST_TOKENS + 2,
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 2,
        **own.get(kind, {}),
        **changes,
    }
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = AutoModel.from_config(AutoConfig.for_model(kind, **settings))
        # Initial weights are so small that all tokens would look alike.
        for parameter in model.parameters():
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(directory)
    unigram_tokenizer().save(str(directory / "tokenizer.json"))
    return directory
