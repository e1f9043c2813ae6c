"""The encoders in a bare torch loop: patches and token ids lie in memory, kernels are the fastest known, nothing is read or written."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from camenn_model.encoder_spec import ImageSpec, TextSpec
from camenn_model.image_encoder import ImageEncoder, compile_model
from camenn_model.text_encoder import TextEncoder

SAMPLE = 2_048
"""Patches, or titles, on which variants are compared."""
IMAGE_VARIANTS = (("compiled", 64), ("compiled", 128), ("eager", 64), ("eager", 256))
TITLE_VARIANTS = (("eager", 512), ("eager", 2_048), ("compiled", 512))


def best_images(spec: ImageSpec, pixels: np.ndarray, variant: list[Any] | None) -> tuple[float, list[Any], float]:
    """Time all patches uint8 [N, s, s, 3] with the given variant, or the fastest one: (seconds, variant, start-up seconds)."""
    started = time.monotonic()
    encoder = ImageEncoder(spec)
    compiled = compile_model(encoder.model)

    def loop(mode: str, batch: int, patches: np.ndarray) -> None:
        model = compiled if mode == "compiled" else encoder.model
        features = np.empty((len(patches), 1536), dtype=np.float16)
        for first in range(0, len(patches) - batch + 1, batch):
            values = torch.from_numpy(patches[first : first + batch]).permute(0, 3, 1, 2).float() / 127.5 - 1
            features[first : first + batch] = model(values).half().numpy()

    chosen = variant or _fastest(IMAGE_VARIANTS, lambda mode, batch: loop(mode, batch, pixels[:SAMPLE]))
    return _timed(lambda mode, batch, n: loop(mode, batch, pixels[:n]), chosen, len(pixels), started)


def best_titles(spec: TextSpec, titles: list[str], variant: list[Any] | None) -> tuple[float, list[Any], float]:
    """Time all titles, tokenised before and padded to lengths of 8, 16 and 32: (seconds, variant, start-up seconds)."""
    started = time.monotonic()
    encoder = TextEncoder(spec)
    compiled = torch.compile(encoder.model, dynamic=False, options={"freezing": True})
    ids = encoder.tokenizer(titles, truncation=True, max_length=spec.max_tokens)["input_ids"]
    padded: dict[int, list[Tensor]] = {bucket: [] for bucket in spec.buckets}
    for row in ids:
        bucket = min(bucket for bucket in spec.buckets if bucket >= len(row))
        padded[bucket].append(torch.tensor(row + [0] * (bucket - len(row))))
    blocks = {bucket: torch.stack(rows) for bucket, rows in padded.items() if rows}

    def loop(mode: str, tokens: int, share: float) -> None:
        model = compiled if mode == "compiled" else encoder.model
        for bucket, block in blocks.items():
            batch = tokens // bucket
            rows = max(1, round(share * len(block)))
            for first in range(0, rows, batch):
                piece = block[first : first + batch]
                if len(piece) < batch:
                    # Kernels are made for one shape.
                    piece = torch.cat([piece, piece.new_zeros(batch - len(piece), bucket)])
                model(input_ids=piece, attention_mask=(piece != 0).long()).last_hidden_state.half().numpy()

    share = min(1.0, SAMPLE / len(titles))
    chosen = variant or _fastest(TITLE_VARIANTS, lambda mode, tokens: loop(mode, tokens, share))
    return _timed(lambda mode, tokens, n: loop(mode, tokens, n / len(titles)), chosen, len(titles), started)


@torch.inference_mode()
def _fastest(variants: tuple[tuple[str, int], ...], loop: Callable[[str, int], None]) -> list[Any]:
    """The variant whose best of three was shortest, after one to warm up; they take turns."""
    best = dict.fromkeys(variants, float("inf"))
    for turn in range(4):
        for variant in variants:
            started = time.monotonic()
            loop(*variant)
            if turn:
                best[variant] = min(best[variant], time.monotonic() - started)
    return list(min(variants, key=lambda variant: best[variant]))


@torch.inference_mode()
def _timed(
    loop: Callable[[str, int, int], None], variant: list[Any], rows: int, started: float
) -> tuple[float, list[Any], float]:
    mode, batch = variant
    loop(mode, batch, min(rows, 2 * batch))
    ready = time.monotonic()
    loop(mode, batch, rows)
    return time.monotonic() - ready, [mode, batch], ready - started
