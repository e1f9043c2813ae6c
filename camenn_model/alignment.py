"""What the alignment tasks add to the model: task tokens, and the contrastive head.

Shapes: I items, A pairs, C items of the contrastive loss, N tokens, d width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from camenn_model.config import ModelConfig
from camenn_model.layers import Side, init_embedding, init_linear
from camenn_model.tokens import Content

START_TEMPERATURE = 0.07
LARGEST_SCALE = 100.0


class ContrastiveHead(nn.Module):
    """Unit vectors from the ``[IMG]`` and ``[TXT]`` states, and the learned temperature of their similarities."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.image_norm = nn.LayerNorm(config.width)
        self.text_norm = nn.LayerNorm(config.width)
        self.image = nn.Linear(config.width, config.width, bias=False)
        self.text = nn.Linear(config.width, config.width, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1.0 / START_TEMPERATURE)))

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """``[IMG]`` and ``[TXT]`` states [C, d] → two [C, d] float32 of length 1."""
        image, text = self.image(self.image_norm(image)), self.text(self.text_norm(text))
        return F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1)

    def similarities(self, image: Tensor, text: Tensor) -> Tensor:
        """[C, C] float32: cosine of each image (rows) with each text, over the temperature (scale ≤ 100, as CLIP)."""
        with torch.autocast(image.device.type, enabled=False):
            return image @ text.T * self.log_scale.exp().clamp(max=LARGEST_SCALE)


class TaskTokens(nn.Module):
    """``[ITA]`` and ``[TIA]``."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.empty(2, config.width))
        self.norm = nn.LayerNorm(config.width)
        init_embedding(self.tokens)

    def forward(self, task: int, count: int) -> Tensor:
        """[count, 1, d]; task 0 = ITA, 1 = TIA."""
        token: Tensor = self.norm(self.tokens[task])
        return token.expand(count, 1, -1)


def pair_content(content: Content, image_of: Tensor, text_of: Tensor) -> Side:
    """Photo of one row and title of another as one item without fields: a side with a row for each of the A pairs."""
    return Side(
        tokens=torch.cat([content.text.index_select(0, text_of), content.image.index_select(0, image_of)], dim=1),
        mask=torch.cat([content.text_mask[text_of], content.image_mask[image_of]], dim=1),
        index=torch.arange(len(text_of), device=text_of.device),
    )


def init_heads(head: ContrastiveHead) -> None:
    """Truncated normal weights."""
    init_linear(head.image)
    init_linear(head.text)
