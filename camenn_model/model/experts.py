"""Gates and the mixture of transformer experts.

Shapes: B pairs, R rows of a side, N tokens of a side, X tokens of a pair, E experts, K kept
experts, d width.

Routing is per pair, not per token: experts contain attention. Only the experts that a pair chose
are computed, on the pair's tokens and on the rows of the sides that it looks at.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from camenn_model.config import ModelConfig
from camenn_model.model.layers import EncoderLayer, Side, layers_of


@dataclass(frozen=True)
class GateOutput:
    """A gate's decision for B pairs."""

    logits: Tensor  # [B, E] float32, with noise in training
    quiet: Tensor  # [B, E] float32, without it, as in scoring
    chosen: Tensor  # [B, K] int64, best first
    weights: Tensor  # [B, K] float32, sum 1

    @property
    def use(self) -> Tensor:
        """Return each expert's share of pairs, [E] float32.

        The sum is K. 0 is a dead expert.
        """
        return F.one_hot(self.chosen, self.logits.shape[-1]).sum(1).float().mean(0)


def choose(logits: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Choose the ``keep`` best experts and their softmax weights.

    Logits [..., E] give two [..., K]. Ties go to the lowest index.
    """
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    return order[..., :keep], ordered[..., :keep].softmax(dim=-1)


class Gate(nn.Module):
    """A noisy top-K softmax gate.

    It follows Shazeer et al. 2017, with one gate for each task (MMoE), in float32. The logits are a
    sum over sides, ``W_I a_i + W_U b_u``, so that each side's part is computed once per row.
    Weights start at 0. Noise N(0, 1) · softplus(noise logits) is added in training only.
    """

    def __init__(self, widths: tuple[int, ...], config: ModelConfig) -> None:
        super().__init__()
        self.keep = config.top_k
        self.weights = nn.ModuleList(nn.Linear(width, config.experts, bias=False) for width in widths)
        self.noise = nn.ModuleList(nn.Linear(width, config.experts, bias=False) for width in widths)
        for layer in (*self.weights, *self.noise):
            nn.init.zeros_(layer.weight)

    def part(self, side: int, features: Tensor) -> Tensor:
        """Return one side's part of the logits, without noise.

        Features [R, width] give [R, E] float32.
        """
        with torch.autocast(features.device.type, enabled=False):
            part: Tensor = self.weights[side](features.float())
            return part

    def forward(self, features: tuple[Tensor, ...], indexes: tuple[Tensor, ...]) -> GateOutput:
        """Choose the experts of each pair.

        Args:
            features: [R, width] for each side.
            indexes: [B] int64 for each side, the row that each pair looks at.
        """
        parts = [
            self.part(side, feature).index_select(0, index)
            for side, (feature, index) in enumerate(zip(features, indexes, strict=True))
        ]
        logits = quiet = sum(parts[1:], start=parts[0])
        if self.training:
            with torch.autocast(logits.device.type, enabled=False):
                spread = [
                    layer(feature.float()).index_select(0, index)
                    for layer, feature, index in zip(self.noise, features, indexes, strict=True)
                ]
                logits = logits + torch.randn_like(logits) * F.softplus(sum(spread[1:], start=spread[0]))
        return GateOutput(logits, quiet, *choose(logits, self.keep))


@dataclass(frozen=True)
class Routed:
    """One expert's output for one side.

    It is normalised, and comes with the pairs that read it.
    """

    pairs: Tensor  # [n] int64, ascending
    weight: Tensor  # [n] float: the pairs' gate weights
    side: Side  # rows of the expert's output, indexed by these pairs


@dataclass(frozen=True)
class Mixed:
    """The experts' normalised outputs, mixed for each pair.

    The pair's gate weighs them. A tower attends to them. A side's outputs are not mixed here: the
    tower's scores and sums are linear in them, so it mixes what it has read of each expert.
    """

    x: Tensor  # [B, X, d], the task token first
    x_mask: Tensor | None  # [B, X] bool
    sides: tuple[tuple[Routed, ...], ...]  # of each side, by expert
    masks: tuple[Tensor, ...]  # of each side: [B, N] bool, of the pairs' rows
    computed: Tensor  # [E, 1 + sides] int64: pairs, then rows of each side, that each expert was computed for


class Mixture(nn.Module):
    """The transformer experts and their mixture.

    There are E experts, each with a LayerNorm on its output: Y = sum over chosen e of g_e
    LN_e(expert_e(.)).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.experts = nn.ModuleList(EncoderLayer(config) for _ in range(config.experts))
        self.norms = nn.ModuleList(nn.LayerNorm(config.width) for _ in range(config.experts))

    def forward(self, sides: tuple[Side, ...], x: Tensor, x_mask: Tensor | None, gate: GateOutput) -> Mixed:
        """Run the chosen experts and mix their outputs.

        Sides and x [B, X, d] are the outputs of the shared bottom. No expert is run on a pair that
        did not choose it.
        """
        mixed = torch.zeros_like(x)
        routed: list[list[Routed]] = [[] for _ in sides]
        computed = torch.zeros(len(self.experts), 1 + len(sides), dtype=torch.int64)
        for expert, (layer, norm) in enumerate(zip(layers_of(self.experts), self.norms, strict=True)):
            pairs, slot = (gate.chosen == expert).nonzero(as_tuple=True)
            if len(pairs) == 0:
                continue
            kept = tuple(side.keep(pairs) for side in sides)
            after, tokens = layer(kept, x.index_select(0, pairs), None if x_mask is None else x_mask[pairs])
            weight = gate.weights[pairs, slot].to(tokens.dtype)
            mixed = mixed.index_add(0, pairs, norm(tokens).to(mixed.dtype) * weight[:, None, None].to(mixed.dtype))
            for number, side in enumerate(after):
                normal = Side(norm(side.tokens), side.mask, side.index, side.memory, side.layout)
                routed[number].append(Routed(pairs, weight, normal))
            computed[expert] = torch.tensor([len(pairs), *(side.tokens.shape[0] for side in after)])
        return Mixed(
            x=mixed,
            x_mask=x_mask,
            sides=tuple(map(tuple, routed)),
            masks=tuple(side.mask_of_pairs() for side in sides),
            computed=computed,
        )
