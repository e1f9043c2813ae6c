"""A task's tower, from the mixed experts to one logit.

It is one transformer layer with the task token as its only query, then an MLP to one logit.

Shapes: B pairs, N tokens, h heads, c = d / h, d width.

Keys have no bias (it would add the same number to every score) and values none (``out``'s bias
carries it, as the attention weights and the gate weights both sum to 1). Nothing but linear maps
stands between the experts' mixed outputs and the attention. That lets the scorer cache W_K and W_V
of each expert's output and mix afterwards.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from camenn_model.config import ModelConfig
from camenn_model.model.experts import Mixed
from camenn_model.model.layers import FeedForward, drop, init_linear, mask_bias


class Tower(nn.Module):
    """A network from the mixed experts to each pair's logit."""

    def __init__(self, config: ModelConfig, base_rate: float) -> None:
        """Build the layers of the tower.

        ``base_rate`` is the probability that the tower starts from.
        """
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.dropout = config.dropout
        self.attention_dropout = config.attention_dropout
        self.query_norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width)
        self.ffn_norm = nn.LayerNorm(width)
        self.ffn = FeedForward(config)
        self.head_norm = nn.LayerNorm(width)
        self.head_hidden = nn.Linear(width, width)
        self.head = nn.Linear(width, 1)
        self.start = math.log(base_rate / (1.0 - base_rate))

    def ask(self, task: Tensor) -> Tensor:
        """Return the scaled query of the task tokens.

        Tokens [..., d] give [..., h, c].
        """
        query: Tensor = self.query(self.query_norm(task))
        width = query.shape[-1] // self.heads
        return query.unflatten(-1, (self.heads, width)) * width**-0.5

    def answer(self, task: Tensor, attended: Tensor) -> Tensor:
        """Return the logits of the task tokens, [...] float32.

        They are computed from the task tokens [..., d] and their attention output [..., d] (before
        ``out``).
        """
        task = task + drop(self.out(attended), self.dropout, self.training)
        task = task + drop(self.ffn(self.ffn_norm(task)), self.dropout, self.training)
        hidden = F.gelu(self.head_hidden(self.head_norm(task)))
        with torch.autocast(task.device.type, enabled=False):  # bfloat16 has three digits: too few for a logit
            logits: Tensor = self.head(hidden.float())
        return logits.squeeze(-1)

    def forward(self, mixed: Mixed) -> Tensor:
        """Return the logits [B] float32.

        With one query for each pair it is cheaper to apply W_K to the query, and W_V to the sum,
        than to project every token: q·(W_K y) = (W_Kᵀ q)·y and Σ α (W_V y) = W_V Σ α y, head by
        head.
        """
        task = mixed.x[:, 0]
        width = task.shape[-1]
        by_head = (self.heads, width // self.heads, width)
        query = torch.einsum("bhc,hcd->bhd", self.ask(task), self.key.weight.view(by_head))
        scores = [query @ mixed.x.transpose(1, 2)]  # [B, h, X]
        if mixed.x_mask is not None:
            scores[0] = scores[0] + mask_bias(mixed.x_mask)[:, None]
        for experts, mask in zip(mixed.sides, mixed.masks, strict=True):
            score = torch.zeros(len(query), self.heads, mask.shape[1], device=query.device)
            for routed in experts:
                part = routed.side.score(query.index_select(0, routed.pairs)) * routed.weight[:, None, None]
                score = score.index_add(0, routed.pairs, part.float())
            scores.append(score + mask_bias(mask)[:, None])
        weights = drop(torch.cat(scores, dim=-1).softmax(dim=-1), self.attention_dropout, self.training)
        split = weights.split([score.shape[-1] for score in scores], dim=-1)
        read = split[0] @ mixed.x
        for weight, experts in zip(split[1:], mixed.sides, strict=True):
            for routed in experts:
                share = weight.index_select(0, routed.pairs) * routed.weight[:, None, None]
                read = read.index_add(0, routed.pairs, routed.side.read(share).to(read.dtype))
        attended = torch.einsum("bhd,hcd->bhc", read, self.value.weight.view(by_head)).flatten(1)
        return self.answer(task, attended)

    def reset_head(self) -> None:
        """Set the head's bias to the base rate's logit."""
        nn.init.constant_(self.head.bias, self.start)


def init_tower(tower: Tower) -> None:
    """Initialize a tower's weights and biases.

    Weights are truncated normal and biases zero. The head's bias is the base rate's logit.
    """
    for module in tower.modules():
        if isinstance(module, nn.Linear):
            init_linear(module)
    tower.reset_head()
