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
class Mixed:
    """The experts' normalised outputs, mixed for each pair.

    The pair's gate weighs them. A tower attends to them.
    """

    x: Tensor  # [B, X, d], the task token first
    x_mask: Tensor | None  # [B, X] bool
    sides: tuple[tuple[Tensor, Tensor], ...]  # per side: tokens [B, N, d], mask [B, N] bool
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
        slots = torch.zeros_like(gate.chosen)  # row of each (pair, slot) in the concatenated outputs
        side_slots = [torch.zeros_like(gate.chosen) for _ in sides]
        outputs: list[Tensor] = []
        side_outputs: list[list[Tensor]] = [[] for _ in sides]
        computed = torch.zeros(len(self.experts), 1 + len(sides), dtype=torch.int64)
        filled = [0] * (1 + len(sides))
        for expert, (layer, norm) in enumerate(zip(layers_of(self.experts), self.norms, strict=True)):
            pairs, slot = (gate.chosen == expert).nonzero(as_tuple=True)
            if len(pairs) == 0:
                continue
            kept = tuple(side.keep(pairs) for side in sides)
            after, tokens = layer(kept, x.index_select(0, pairs), None if x_mask is None else x_mask[pairs])
            outputs.append(norm(tokens))
            slots[pairs, slot] = torch.arange(len(pairs), device=pairs.device) + filled[0]
            for number, side in enumerate(after):
                side_outputs[number].append(norm(side.tokens))
                side_slots[number][pairs, slot] = side.index + filled[1 + number]
            sizes = [len(pairs), *(side.tokens.shape[0] for side in after)]
            computed[expert] = torch.tensor(sizes)
            filled = [a + b for a, b in zip(filled, sizes, strict=True)]
        return Mixed(
            x=_mix(torch.cat(outputs), slots, gate.weights),
            x_mask=x_mask,
            sides=tuple(
                (_mix(torch.cat(outputs), slots, gate.weights), side.mask.index_select(0, side.index))
                for side, outputs, slots in zip(sides, side_outputs, side_slots, strict=True)
            ),
            computed=computed,
        )


def _mix(outputs: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    """Sum the chosen rows by their weights, [B, N, d].

    Args:
        outputs: [rows, N, d].
        slots: [B, K] rows of ``outputs``.
        weights: [B, K]. The result is the sum over K of weight x row.
    """
    weights = weights.to(outputs.dtype)
    mixed = outputs.index_select(0, slots[:, 0]) * weights[:, 0, None, None]
    for slot in range(1, slots.shape[1]):
        mixed = mixed + outputs.index_select(0, slots[:, slot]) * weights[:, slot, None, None]
    return mixed
