"""The shortlist against all pairs in float32."""

from __future__ import annotations

import pytest
import torch

from camenn_model.batch import Batch
from camenn_model.model import CameNN
from camenn_model.scorer import Scorer
from camenn_model.shortlist import Shortlist
from tests.camenn_model.random_batches import awake, random_batch, tiny_config

ITEMS, ROWS, TILES = 64, 6, 4


def tiles(seed: int) -> tuple[CameNN, list[Batch]]:
    """A model, and tiles of 64 listings that meet the same 6 audience rows."""
    torch.manual_seed(seed)
    config = tiny_config(experts=4, top_k=2)
    model = CameNN(config)
    awake(model, seed)
    return model.eval(), [
        random_batch(config, items=ITEMS, audience=ROWS, history=5, pairs=ITEMS * ROWS, seed=seed + number)
        for number in range(TILES)
    ]


def score(scorer: Scorer | Shortlist, batches: list[Batch], wanted: torch.Tensor | None = None) -> torch.Tensor:
    """Logits [S, all listings], tile by tile."""
    audience = scorer.audience_states(batches[0].audience, batches[0].history)
    found = []
    for number, batch in enumerate(batches):
        values, buckets = batch.pairs.values.view(ROWS, ITEMS, -1), batch.pairs.buckets.view(ROWS, ITEMS, -1)
        some = None if wanted is None else wanted[:, number * ITEMS : (number + 1) * ITEMS]
        found.append(scorer.score_tile(scorer.item_states(batch.items), audience, values, buckets, some))  # type: ignore[arg-type]
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("keep", [1, 10, 64, 200, 1000])
@pytest.mark.parametrize("seed", range(3))
def test_the_best_are_those_of_float32_and_the_rest_is_left_out(keep: int, seed: int) -> None:
    model, batches = tiles(seed)
    every, shortlist = score(Scorer(model), batches), Shortlist(model, keep)
    found = score(shortlist, batches)
    finite = found > -torch.inf
    assert torch.allclose(found[finite], every[finite], atol=1e-5)
    kept = min(keep, every.shape[1])
    assert torch.equal(found.topk(kept).indices, every.topk(kept).indices)
    assert shortlist.pairs == every.numel()
    assert (finite.float().mean() < 0.5) == (keep <= 10)


def test_only_wanted_pairs_are_computed_and_their_best_found() -> None:
    model, batches = tiles(7)
    wanted = torch.rand(ROWS, ITEMS * TILES, generator=torch.Generator().manual_seed(0)) < 0.3
    every, shortlist = score(Scorer(model), batches), Shortlist(model, 5)
    some, found = score(Scorer(model), batches, wanted), score(shortlist, batches, wanted)
    assert torch.equal(some > -torch.inf, wanted)
    assert torch.allclose(some[wanted], every[wanted], atol=1e-5)
    assert not (found > -torch.inf)[~wanted].any()
    assert torch.equal(found.topk(5).indices, every.masked_fill(~wanted, -torch.inf).topk(5).indices)
    assert shortlist.pairs == int(wanted.sum()) > shortlist.twice


def test_a_draft_that_errs_more_than_reckoned_with_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = tiles(3)
    every, shortlist = score(Scorer(model), batches), Shortlist(model, 4)
    honest = shortlist.drafts.score_tile
    asked = []

    def wrong(*given: torch.Tensor) -> torch.Tensor:
        asked.append(given)
        # From the second tile on the ranks are turned.
        return honest(*given) if len(asked) == 1 else -honest(*given)

    monkeypatch.setattr(shortlist.drafts, "score_tile", wrong)
    found = score(shortlist, batches)
    assert torch.equal(found.topk(4).indices, every.topk(4).indices)


def test_keeping_all_is_refused() -> None:
    with pytest.raises(ValueError, match="keep 0"):
        Shortlist(tiles(0)[0], 0)
