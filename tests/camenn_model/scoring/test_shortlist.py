"""The shortlist against all pairs in float32."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from camenn_model.batch import Batch
from camenn_model.model.camenn import CameNN
from camenn_model.scoring.scorer import Scorer
from camenn_model.scoring.shortlist import PROBED_PAIRS, SAFETY, ListedStates, Shortlist, _evenly
from tests.support.random_batches import awake, random_batch, tiny_config

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
    way: Any = scorer  # each takes the states that it makes itself
    audience = way.audience_states(batches[0].audience, batches[0].history)
    found = []
    for number, batch in enumerate(batches):
        values, buckets = batch.pairs.values.view(ROWS, ITEMS, -1), batch.pairs.buckets.view(ROWS, ITEMS, -1)
        some = None if wanted is None else wanted[:, number * ITEMS : (number + 1) * ITEMS]
        found.append(way.score_tile(way.item_states(batch.items), audience, values, buckets, some))
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

    def wrong(*given: Any) -> torch.Tensor:
        asked.append(given)
        # From the second tile on the ranks are reversed.
        return honest(*given) if len(asked) == 1 else -honest(*given)

    monkeypatch.setattr(shortlist.drafts, "score_tile", wrong)
    found = score(shortlist, batches)
    assert torch.equal(found.topk(4).indices, every.topk(4).indices)


def test_keeping_all_is_refused() -> None:
    with pytest.raises(ValueError, match="keep 0"):
        Shortlist(tiles(0)[0], 0)


@dataclass
class Given:
    """Given logits instead of a scorer's, and the requested pairs."""

    logits: torch.Tensor
    asked: list[torch.Tensor] = field(default_factory=list)

    def score_tile(self, items: Any, audience: Any, values: Any, buckets: Any, wanted: torch.Tensor | None) -> Any:
        wanted = torch.ones_like(self.logits, dtype=torch.bool) if wanted is None else wanted
        self.asked.append(wanted)
        return self.logits.masked_fill(~wanted, -torch.inf)


MODEL = CameNN(tiny_config()).eval()


def run_tiles(
    shortlist: Shortlist, tiles: list[tuple[torch.Tensor, torch.Tensor]], slack: float | None = None
) -> list[torch.Tensor]:
    """A shortlist's result for tiles of (drafts, exact logits) [S, I] of the same audience rows;
    `slack` is set on it before each.
    """
    rows = len(tiles[0][0])
    nothing: Any = None
    states: Any = ListedStates(nothing, nothing, torch.full((rows, shortlist.keep), -torch.inf))
    found = []
    for draft, exact in tiles:
        scorers: Any = Given(draft), Given(exact)
        shortlist.drafts, shortlist.exact = scorers
        shortlist.slack = shortlist.slack if slack is None else slack
        found.append(shortlist.score_tile(states, states, nothing, nothing))
    return found


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_the_best_are_found_whatever_drafts_err_within_the_slack(data: st.DataObject) -> None:
    """Against sorting all exact logits: small whole numbers, each draft off by 2 at most, and a slack of 2."""
    rows, keep = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 3))
    tiles = []
    for _ in range(data.draw(st.integers(1, 3))):
        width = data.draw(st.integers(1, 6))
        pairs = st.lists(st.integers(0, 9), min_size=rows * width, max_size=rows * width)
        errors = st.lists(st.integers(-2, 2), min_size=rows * width, max_size=rows * width)
        exact = torch.tensor(data.draw(pairs), dtype=torch.float32).view(rows, width)
        tiles.append((exact + torch.tensor(data.draw(errors)).view(rows, width), exact))
    found = torch.cat(run_tiles(Shortlist(MODEL, keep), tiles, slack=2.0), dim=1)
    every = torch.cat([exact for _, exact in tiles], dim=1)
    kept = min(keep, every.shape[1])
    assert torch.equal(found.topk(kept).values, every.topk(kept).values)
    computed = found > -torch.inf
    assert torch.equal(found[computed], every[computed])


@pytest.mark.parametrize(
    ("exact", "draft"),
    [
        # The best one's draft is a slack too low, the other one's a slack too high: two slacks lie between them.
        ([5.0, 4.0], [4.0, 5.0]),
        ([5.0, 5.0, 0.0], [4.0, 6.0, 0.0]),
    ],
)
def test_a_draft_may_be_two_slacks_behind_and_be_the_best(exact: list[float], draft: list[float]) -> None:
    shortlist = Shortlist(MODEL, 1)
    shortlist.slack = 1.0
    (found,) = run_tiles(shortlist, [(torch.tensor([draft]), torch.tensor([exact]))])
    assert found[0, :2].tolist() == exact[:2]


def test_what_is_best_so_far_is_no_draft() -> None:
    """The first tile's best has a draft a slack too high, the second one's a slack too low:
    compared with a draft it would be left out.
    """
    tiles = [(torch.tensor([[6.0]]), torch.tensor([[4.0]])), (torch.tensor([[3.0]]), torch.tensor([[5.0]]))]
    assert torch.cat(run_tiles(Shortlist(MODEL, 1), tiles, slack=2.0), dim=1).tolist() == [[4.0, 5.0]]


def test_a_draft_may_err_three_times_as_much_as_those_that_were_probed() -> None:
    """Every other pair of the first tile is probed: the best one is not, and its draft is further off than any that
    is.
    """
    exact = torch.zeros(2, PROBED_PAIRS)
    draft = exact.clone()
    exact[0, 500], draft[0, 500] = 9.5, 10.0
    exact[0, 501], draft[0, 501] = 10.0, 8.8
    exact[1, 0] = draft[1, 0] = 1.0
    assert _evenly(torch.ones_like(exact, dtype=torch.bool))[0, 500:502].tolist() == [True, False]
    (found,) = run_tiles(Shortlist(MODEL, 1), [(draft, exact)])
    assert found.argmax(dim=1).tolist() == [501, 0] and float(found[0, 501]) == 10.0


def test_slack_is_three_times_the_largest_error_and_never_shrinks() -> None:
    exact = torch.zeros(2, 8)
    tiles = []
    for largest in (0.125, 0.25, 0.0):
        draft = torch.zeros(2, 8)
        draft[1, 3] = largest  # drafts that are too high make negative errors
        tiles.append((draft, exact))
    shortlist = Shortlist(MODEL, 1)
    slacks = []
    for tile in tiles:
        run_tiles(shortlist, [tile])
        slacks.append(shortlist.slack)
    assert slacks == [SAFETY * 0.125, SAFETY * 0.25, SAFETY * 0.25]


def test_one_error_beyond_the_slack_has_its_tile_computed_again() -> None:
    exact = torch.tensor([[9.0, 1.0, 0.0, -5.0]])
    draft = exact.clone()
    draft[0, 0] += 1.5
    shortlist = Shortlist(MODEL, 1)
    shortlist.slack = 1.0
    (found,) = run_tiles(shortlist, [(draft, exact)])
    assert torch.equal(found, exact)
    assert shortlist.slack == SAFETY * 1.5


def test_errors_are_probed_all_over_the_first_tile() -> None:
    mask = torch.ones(64, 200, dtype=torch.bool)
    mask[::2, ::3] = False
    probed = _evenly(mask)
    assert not (probed & ~mask).any()
    assert PROBED_PAIRS <= int(probed.sum()) <= 2 * PROBED_PAIRS
    per_row = probed.sum(1).float() / mask.sum(1)
    assert float(per_row.min()) > 0.5 * float(per_row.mean())
    few = torch.rand(3, 5) < 0.5
    assert torch.equal(_evenly(few), few)
