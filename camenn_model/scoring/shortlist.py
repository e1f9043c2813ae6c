"""Exact shortlists from mostly bfloat16 scores.

They hold the best of each audience row, where most pairs are computed in bfloat16 only.

Shapes: I items, S audience rows, K listings kept for each row.

A tile is drafted in bfloat16. Pairs whose draft is near enough to their row's K best are computed
again in float32. With errors of at most s, a pair among the K best of a row has a draft of at least
the row's K-th best logit so far less s, and of at least the K-th best draft of the tile less 2 s. s
is `SAFETY` times the largest error seen, of pairs drawn evenly from the first tile and of all that
were computed twice since. A tile in which one is larger is computed again as a whole. So published
values are float32, and a row's K best equal those of float32, unless a pair that was computed once
has an error above `SAFETY` times the largest error of all that were computed twice.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from camenn_model.batch import AudienceBatch, HistoryItems, ItemBatch
from camenn_model.model.camenn import CameNN
from camenn_model.scoring.scorer import Scorer, SideStates

SAFETY = 3.0
PROBED_PAIRS = 1_024
"""Pairs of the first tile from which errors are first estimated"""


@dataclass
class ListedStates:
    """A side's states in both precisions."""

    draft: SideStates
    exact: SideStates
    best: Tensor  # [R, K] float32: each audience row's largest logits so far; none for items

    def __len__(self) -> int:
        return len(self.exact)


class Shortlist:
    """A scorer of tiles for each row's best.

    It scores as ``Scorer`` does, for ``keep`` listings of each audience row.
    """

    def __init__(self, model: CameNN, keep: int) -> None:
        """Wrap a model for scoring in two precisions.

        Raises:
            ValueError: ``keep`` is below 1. Where 0 stands for all listings, all would be computed
                twice.
        """
        if keep < 1:
            raise ValueError(f"Shortlist: keep {keep}: must be at least 1")
        self.keep = keep
        self.drafts, self.exact = Scorer(model, draft=True), Scorer(model)
        self.slack: float | None = None
        self.pairs = self.twice = 0
        """Number of pairs computed, and of those computed in both precisions"""

    def item_states(self, items: ItemBatch) -> ListedStates:
        """Compute the items' states, as ``Scorer.item_states`` does."""
        exact = self.exact.item_states(items)
        return ListedStates(self.drafts.item_states(items), exact, exact.gate.new_empty(0))

    def audience_states(self, audience: AudienceBatch, history: HistoryItems) -> ListedStates:
        """Compute the audience rows' states.

        They extend ``Scorer.audience_states`` with each row's best logits of the tiles scored so
        far.
        """
        exact = self.exact.audience_states(audience, history)
        best = exact.gate.new_full((len(exact), self.keep), -torch.inf)
        return ListedStates(self.drafts.audience_states(audience, history), exact, best)

    @torch.inference_mode()
    def score_tile(
        self,
        items: ListedStates,
        audience: ListedStates,
        values: Tensor,
        buckets: Tensor,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """Return the raw logits [S, I] of the rows' best.

        They are float32 as ``Scorer.score_tile`` gives them, -inf for pairs that are not among the
        row's best.
        """
        draft = self.drafts.score_tile(items.draft, audience.draft, values, buckets, wanted)
        drafted = draft > -torch.inf

        def compute(some: Tensor) -> Tensor:
            self.twice += int(some.sum())
            return self.exact.score_tile(items.exact, audience.exact, values, buckets, some)

        def error(logits: Tensor) -> float:
            both = drafted & (logits > -torch.inf)
            return float((logits - draft)[both].abs().max()) if both.any() else 0.0

        self.pairs += int(drafted.sum())
        if self.slack is None:
            self.slack = SAFETY * error(compute(_evenly(drafted)))
        least = audience.best[:, -1:] - self.slack
        if draft.shape[1] >= self.keep:
            least = torch.maximum(least, draft.topk(self.keep, dim=1).values[:, -1:] - 2 * self.slack)
        logits = compute(drafted & (draft >= least))
        found = error(logits)
        if found > self.slack:
            logits = compute(drafted)
        self.slack = max(self.slack, SAFETY * found)
        audience.best = torch.cat([audience.best, logits], dim=1).topk(self.keep, dim=1).values
        return logits


def _evenly(mask: Tensor) -> Tensor:
    """Choose places evenly where ``mask`` is True.

    They are about `PROBED_PAIRS`.
    """
    places = mask.flatten().nonzero().squeeze(1)
    probed = torch.zeros(mask.numel(), dtype=torch.bool, device=mask.device)
    probed[places[:: max(1, len(places) // PROBED_PAIRS)]] = True
    return probed.view(mask.shape)
