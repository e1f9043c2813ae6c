"""The alignment tasks' own parts: task tokens and contrastive head.

Shapes: I items, A pairs, C items of the contrastive loss, N tokens, d width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from camenn_model.config import ModelConfig
from camenn_model.content.canonical_directions import Start
from camenn_model.model.layers import Side, init_embedding, init_linear
from camenn_model.model.tokens import Content, FrozenProjection

START_TEMPERATURE = 0.07
LARGEST_SCALE = 100.0
SIZE = 2
"""Dimensions that photos and titles are compared in, times the model's width."""
START_LENGTH = 16.0
"""Factor on the canonical directions.

Vectors are normalised to unit length. But Adam's steps have one size, so if these vectors were
short, the states' contribution would soon dominate them.
"""
START_SLOPE, START_MIDDLE = 6.0, 0.35
"""Initial slope of the logit over the cosine, and the cosine at which the logit is 0."""


class ContrastiveHead(nn.Module):
    """Maps of photos and titles to comparable unit vectors.

    It holds the learned temperature of their similarities too. A vector is the sum of two maps. One
    maps the ``[IMG]`` or ``[TXT]`` state out of the shared bottom. The other maps the frozen
    encoder's mean feature. It is initialized by the canonical correlation analysis of photos and
    titles, and equals that before the first step.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.size = SIZE * config.width
        self.image_norm = nn.LayerNorm(config.width)
        self.text_norm = nn.LayerNorm(config.width)
        self.image = nn.Linear(config.width, self.size, bias=False)
        self.text = nn.Linear(config.width, self.size, bias=False)
        self.image_frozen = FrozenProjection(config.image_width, self.size)
        self.text_frozen = FrozenProjection(config.text_width, self.size)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1.0 / START_TEMPERATURE)))
        self.slope = nn.Parameter(torch.full((2,), START_SLOPE))
        self.offset = nn.Parameter(torch.full((2,), -START_SLOPE * START_MIDDLE))

    @torch.no_grad()
    def start(self, start: Start, images: Tensor, titles: Tensor) -> None:
        """Start the maps from the directions found before training.

        The maps of frozen features start on the directions that photos and titles share, weighted
        by the roots of their correlations. The maps of the states start at 0.

        Args:
            start: the directions and their correlations.
            images: mean of the frozen image features, [image_width].
            titles: mean of the frozen text features, [text_width].
        """
        weight = torch.from_numpy(start.correlations).clamp(min=0).sqrt()
        for part, directions, center in (
            (self.image_frozen, start.shared_image, images),
            (self.text_frozen, start.shared_text, titles),
        ):
            part.linear.weight.zero_()
            part.linear.bias.zero_()
            part.start(torch.from_numpy(directions) * (weight * START_LENGTH), center)
        for states in (self.image, self.text):
            states.weight.zero_()

    def forward(
        self, image: Tensor, text: Tensor, patches: Tensor, tokens: Tensor, has_image: Tensor, has_text: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return unit vectors of images and texts, two [C, e].

        They are float32 and of length 1.

        Args:
            image: ``[IMG]`` states, [C, d].
            text: ``[TXT]`` states, [C, d].
            patches: the frozen encoder's image features, means over patches [C, image_width].
            tokens: the frozen encoder's text features, means over real tokens [C, text_width].
            has_image: bool [C, 1]. Where False the state alone counts.
            has_text: bool [C, 1]. Where False the state alone counts.
        """
        image = self.image(self.image_norm(image)) + self.image_frozen(patches) * has_image
        text = self.text(self.text_norm(text)) + self.text_frozen(tokens) * has_text
        return F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1)

    def similarities(self, image: Tensor, text: Tensor) -> Tensor:
        """Return each image's similarity to each text, [C, C] float32.

        It is the cosine of image (rows) and text, over the temperature (scale ≤ 100, as in CLIP).
        """
        with torch.autocast(image.device.type, enabled=False):
            return image @ text.T * self.log_scale.exp().clamp(max=LARGEST_SCALE)

    def belongs(self, task: int, cosine: Tensor) -> Tensor:
        """Return the logits [A] that the cosine alone gives.

        Args:
            task: 0 (ITA) or 1 (TIA).
            cosine: [A], of a pair's photo and title.
        """
        return self.slope[task] * cosine + self.offset[task]


class TaskTokens(nn.Module):
    """The task tokens ``[ITA]`` and ``[TIA]``."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.empty(2, config.width))
        self.norm = nn.LayerNorm(config.width)
        init_embedding(self.tokens)

    def forward(self, task: int, count: int) -> Tensor:
        """Return the token of a task, repeated, [count, 1, d].

        Task 0 is ITA, task 1 is TIA.
        """
        token: Tensor = self.norm(self.tokens[task])
        return token.expand(count, 1, -1)


def pair_content(content: Content, image_of: Tensor, text_of: Tensor) -> Side:
    """Join one row's photo and another's title as one item.

    The item has no fields. The result is a side with a row for each of the A pairs.
    """
    return Side(
        tokens=torch.cat([content.text.index_select(0, text_of), content.image.index_select(0, image_of)], dim=1),
        mask=torch.cat([content.text_mask[text_of], content.image_mask[image_of]], dim=1),
        index=None,
    )


def init_heads(head: ContrastiveHead) -> None:
    """Start the heads from truncated normal weights."""
    init_linear(head.image)
    init_linear(head.text)
