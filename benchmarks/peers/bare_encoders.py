"""The encoders in a bare torch loop.

Patches and token ids are in memory, kernels are the fastest known, and nothing is read or written.
"""

import statistics
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from camenn_model.encoders.bert import BertEncoder
from camenn_model.encoders.inception_v4 import InceptionV4Encoder, compile_model
from camenn_model.encoders.spec import TextSpec

IMAGE_VARIANTS = (("compiled", 64), ("compiled", 128), ("compiled", 256), ("eager", 128), ("eager", 256))
"""Kernels, and patches in a forward pass"""
TITLE_VARIANTS = (("eager", 512), ("eager", 2_048), ("compiled", 512))
"""Kernels, and tokens in a forward pass"""
TURNS = 5


class BareImages:
    """InceptionV4 over patches, in whole batches."""

    def __init__(self, encoder: InceptionV4Encoder, variant: tuple[str, int]) -> None:
        mode, self.batch = variant
        self.model = compile_model(encoder.model) if mode == "compiled" else encoder.model
        size = encoder.spec.patch_size
        # Kernels are compiled by the first forward pass.
        self.seconds(np.zeros((self.batch, size, size, 3), dtype=np.uint8))

    @torch.inference_mode()
    def seconds(self, patches: np.ndarray) -> float:
        """Time the loop over patches uint8 [N, s, s, 3]."""
        started = time.monotonic()
        features = np.empty((len(patches), 1536), dtype=np.float16)
        for first in range(0, len(patches) - self.batch + 1, self.batch):
            piece = torch.from_numpy(patches[first : first + self.batch])
            features[first : first + self.batch] = (
                self.model(piece.permute(0, 3, 1, 2).float() / 127.5 - 1).half().numpy()
            )
        return time.monotonic() - started


class BareTitles:
    """BERT over padded token ids.

    The ids are padded to the lengths of the encoder's buckets.
    """

    def __init__(self, encoder: BertEncoder, variant: tuple[str, int]) -> None:
        mode, self.tokens = variant
        self.model: Any = encoder.model
        if mode == "compiled":
            self.model = torch.compile(encoder.model, dynamic=False, options={"freezing": True})
        for bucket in encoder.spec.buckets:
            self.seconds({bucket: torch.ones(1, bucket, dtype=torch.long)})

    @torch.inference_mode()
    def seconds(self, blocks: dict[int, Tensor]) -> float:
        """Time the loop over {length: ids [N, length]}."""
        started = time.monotonic()
        for bucket, block in blocks.items():
            batch = self.tokens // bucket
            for first in range(0, len(block), batch):
                rows = block[first : first + batch]
                # Kernels are compiled for one shape, and for tensors made in inference mode: others
                # would compile again.
                ids = torch.zeros(batch, bucket, dtype=torch.long)
                ids[: len(rows)] = rows
                self.model(input_ids=ids, attention_mask=(ids != 0).long()).last_hidden_state.half().numpy()
        return time.monotonic() - started


def tokenise(encoder: BertEncoder, titles: list[str]) -> dict[int, Tensor]:
    """Return the token ids that `BareTitles` takes."""
    spec: TextSpec = encoder.spec
    with encoder.tokenizing:
        rows = encoder.tokenizer(titles, truncation=True, max_length=spec.max_tokens)["input_ids"]
    padded: dict[int, list[Tensor]] = {}
    for row in rows:
        bucket = min(bucket for bucket in spec.buckets if bucket >= len(row))
        padded.setdefault(bucket, []).append(torch.tensor(row + [0] * (bucket - len(row))))
    return {bucket: torch.stack(found) for bucket, found in padded.items()}


def fastest(loops: dict[tuple[str, int], Any], given: Any) -> tuple[tuple[str, int], dict[str, float]]:
    """Return the fastest variant and the medians of all.

    The fastest is the one with the least median time over several rounds of all variants. The least
    single time would favour the variant that ran while the machine was idle.
    """
    turns: dict[tuple[str, int], list[float]] = {variant: [] for variant in loops}
    for _ in range(TURNS):
        for variant, loop in loops.items():
            turns[variant].append(loop.seconds(given))
    medians = {variant: statistics.median(seconds) for variant, seconds in turns.items()}
    names = {f"{mode}-{size}": round(seconds, 3) for (mode, size), seconds in medians.items()}
    return min(loops, key=lambda variant: medians[variant]), names
