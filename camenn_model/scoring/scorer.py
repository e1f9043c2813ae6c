"""The one scoring path for all pairs.

Validation, ``camenn score`` and any service use it.

Shapes: I items, S audience rows, N tokens of a side, X tokens of a pair, E experts, h heads, c = d
/ h, d width.

A tile is every item of one batch against every audience row of another. Item states are computed
once per item and audience states once per row. In the tile only the X tokens are computed, for the
chosen experts alone. Attention is two batched matrix products, one per side (all pairs of an item
against its keys, all pairs of an audience row against its keys), merged under one softmax: nothing
of a side is gathered per pair. The tile equals the model's plain forward pass in eval mode up to
float32 rounding. Pairs whose K-th and next gate logits nearly tie may choose differently
(``margin``).

In bfloat16 (``draft``) the transformer layers are computed in it. Embeddings, gates, and all that
is added to the tower's logit stay float32, so that a pair goes to the same experts.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from camenn_model.batch import AudienceBatch, Batch, HistoryItems, ItemBatch
from camenn_model.model.camenn import CameNN
from camenn_model.model.experts import choose
from camenn_model.model.layers import layers_of
from camenn_model.model.tokens import SideTokens
from camenn_model.scoring.tile_attention import Part, Places, divide, find_places, keys_values, read_part, run_layer

TILE_PAIRS = 2048
"""Pairs of a tile that are computed at once: small enough that the X tokens stay in a core's cache (measured)."""


@dataclass
class SideStates:
    """The states of a side that its pairs read.

    Experts are filled in when a pair first chooses them.
    """

    gate: Tensor  # [R, E] float32, the side's part of the CVR gate's logits
    mask: Tensor  # [R, N] bool
    memory: int  # number of last tokens that no layer changes
    shared: list[Part]  # per shared layer
    tokens: Tensor  # [R, N, d] out of the shared bottom
    filled: Tensor  # [E, R] bool: expert computed for this row
    vector: Tensor  # [R, 3 d + C + 2] float32: factors of ``Affinity`` and of ``Wide``
    task: Tensor  # [R, d]: the side's part of the ``[CVR]`` token's input
    counts: Tensor | None  # [S, ``HIDDEN``] float32, ``Counts.of_audience``; None for items, like ``past``
    entry: Tensor | None  # [I, d]: items as entries of a history; None for audience rows, like the next
    asked: Tensor | None  # [I, h, c + 1]: the items' queries of target attention
    past: Part | None  # keys [S, h, c + 1, H + 1] and values [S, h, H + 1, c + 2] of target attention; None for items
    experts: dict[int, Part] = field(default_factory=dict)  # rows not filled are 0
    tower: Part | None = None  # of all experts: keys [R, h, E c, N], values [R, h, N, E c + 1]; not filled: 0

    def __len__(self) -> int:
        return self.gate.shape[0]


class Scorer:
    """A scorer of tiles of items x audience rows.

    Its model is in eval mode.
    """

    def __init__(self, model: CameNN, draft: bool = False) -> None:
        """Wrap a model for scoring.

        With ``draft``, layers are in bfloat16, and logits have errors of some thousandths.
        """
        self.model = model
        self.draft = draft

    @torch.inference_mode()
    def item_states(self, items: ItemBatch) -> SideStates:
        """Compute the states of I items, on the model's device.

        Raises:
            ValueError: training mode or ``full`` attention.
        """
        self._check()
        return self._states(self.model.item_tokens(items), self.model.wide.item_factors(items), None, None, side=0)

    @torch.inference_mode()
    def audience_states(self, audience: AudienceBatch, history: HistoryItems) -> SideStates:
        """Compute the states of S audience rows.

        Raises:
            ValueError: training mode or ``full`` attention.
        """
        self._check()
        liked, entries = self.model.item_tokens.liked(history)
        tokens = self.model.audience_tokens(audience, liked, entries)
        counts = self.model.counts.of_audience(audience)
        past = self.model.target_attention.remember(audience, entries)
        # A column of ones, as all weights are divided by their sum.
        part = Part(past.keys, F.pad(past.values, (0, 1), value=1.0))
        return self._states(tokens, self.model.wide.audience_factors(audience), counts, part, side=1)

    @torch.inference_mode()
    def score_tile(
        self,
        items: SideStates,
        audience: SideStates,
        values: Tensor,
        buckets: Tensor,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """Return the raw logits [S, I] float32 of a tile.

        ``values`` float32 and ``buckets`` int64 are [S, I, n_pair_num]. Only pairs where ``wanted``
        [S, I] is True are computed, the others are -inf. None means all. The display position is
        unknown. Experts that a pair is the first to choose are added to the states.
        """
        count_s, count_i = len(audience), len(items)
        if values.shape[:2] != (count_s, count_i) or buckets.shape != values.shape:
            raise ValueError(
                f"score_tile: values {tuple(values.shape)}, buckets {tuple(buckets.shape)} for "
                f"{count_s} audience rows x {count_i} items"
            )
        if wanted is None:
            wanted = torch.ones(count_s, count_i, dtype=torch.bool, device=values.device)
        logits = (audience.vector @ items.vector.T).masked_fill_(~wanted, -torch.inf)
        step_s = min(count_s, max(1, int(TILE_PAIRS**0.5)))
        step_i = max(1, TILE_PAIRS // max(1, step_s))
        for start_i in range(0, count_i, step_i):
            rows_i = slice(start_i, min(start_i + step_i, count_i))
            for start_s in range(0, count_s, step_s):
                rows_s = slice(start_s, min(start_s + step_s, count_s))
                some = wanted[rows_s, rows_i].T
                if some.any():
                    given = (column[rows_s, rows_i].transpose(0, 1)[some] for column in (values, buckets))
                    with self._layers():
                        logits[rows_s, rows_i].T[some] += self._tile(
                            _Rows(items, rows_i), _Rows(audience, rows_s), some, *given
                        )
        return logits

    @torch.inference_mode()
    def margin(self, items: SideStates, audience: SideStates) -> Tensor:
        """Return each pair's K-th minus next gate logit.

        It is [S, I] float32. Below 1e-5 the choice of experts depends on rounding. It is infinite
        where all experts are kept.
        """
        logits = audience.gate[:, None] + items.gate[None, :]
        keep = self.model.config.top_k
        if keep == self.model.config.experts:
            return torch.full(logits.shape[:2], torch.inf, device=logits.device)
        ordered = logits.sort(dim=-1, descending=True).values
        return ordered[..., keep - 1] - ordered[..., keep]

    @torch.inference_mode()
    def score_pairs(self, batch: Batch) -> Tensor:
        """Return the raw logits [B] float32 of listed pairs.

        They are computed by the plain forward pass: either kind of attention, any pairs.
        """
        if self.model.training:
            raise ValueError("Scorer: call model.eval() first")
        return self.model(batch).logits

    def _check(self) -> None:
        if self.model.training:
            raise ValueError("Scorer: call model.eval() first")
        if self.model.config.attention != "prefix":
            raise ValueError("Scorer: states need attention='prefix'; use score_pairs with 'full'")

    def _states(
        self, side_tokens: SideTokens, wide: Tensor, counts: Tensor | None, past: Part | None, side: int
    ) -> SideStates:
        """Run the shared bottom on one side."""
        tokens, shared = side_tokens.tokens, []
        with self._layers():
            for layer in layers_of(self.model.shared) if self.model.config.cvr_layers else []:
                tokens, kv = layer.own(tokens, side_tokens.mask, side_tokens.memory)
                shared.append(keys_values(kv, kv.shape[-1] ** -0.5, side_tokens.mask))
        gate = self.model.cvr_gate.part(side, side_tokens.gate)
        filled = torch.zeros(gate.shape[1], gate.shape[0], dtype=torch.bool, device=gate.device)
        vector, task = self.model.vectors(side_tokens, side)
        if side == 0:
            vector = self.model.affinity.of_orders(vector)
        vector = torch.cat([vector, wide], dim=1)
        return SideStates(
            gate=gate,
            mask=side_tokens.mask,
            memory=side_tokens.memory,
            shared=shared,
            tokens=tokens,
            filled=filled,
            vector=vector,
            task=task,
            counts=counts,
            entry=side_tokens.entry,
            asked=None if side_tokens.entry is None else self.model.target_attention.ask(side_tokens.entry),
            past=past,
        )

    def _layers(self) -> torch.autocast:
        """Return the precision that transformer layers are computed in."""
        return torch.autocast(next(self.model.parameters()).device.type, torch.bfloat16, enabled=self.draft)

    def _tile(self, items: _Rows, audience: _Rows, some: Tensor, values: Tensor, buckets: Tensor) -> Tensor:
        """Return the logits [n] of a cache-sized tile's pairs.

        They are those of the pairs where ``some`` [I, S] is True, item by item. Values and buckets
        are [n, ·].
        """
        model = self.model
        by_item, by_audience = some.nonzero(as_tuple=True)
        all_i, all_s = find_places(some, model.config.heads)
        with torch.autocast(values.device.type, enabled=False):
            unknown = torch.zeros(len(buckets), dtype=torch.int64, device=values.device)
            context = items.task.index_select(0, by_item) + audience.task.index_select(0, by_audience)
            found = self._found(items, audience, by_item, all_s)
            context = context + model.target_attention.out(found)
            x = model.pair_tokens.embed(values, buckets, unknown, context)  # [n, X, d]
            below = model.affinity.of_token(x[:, 0]) + model.wide.of_pairs(values, buckets)
            counted = audience.counts.index_select(0, by_audience)
            below = below + model.counts(counted + model.counts.found(found), values, buckets)
        if not model.config.cvr_layers:
            return below + model.cvr_tower.head.bias
        for number, layer in enumerate(layers_of(model.shared)):
            x = run_layer(layer, x, ((items.shared(number), all_i), (audience.shared(number), all_s)))

        logits = items.gate.index_select(0, by_item) + audience.gate.index_select(0, by_audience)  # [n, E]
        chosen, kept = choose(logits, model.config.top_k)
        weights = torch.zeros_like(logits).scatter_(-1, chosen, kept)
        picked = torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, chosen, True)
        mixed = torch.zeros_like(x)
        for expert, (layer, norm) in enumerate(zip(layers_of(model.mixture.experts), model.mixture.norms, strict=True)):
            pairs = picked[:, expert].nonzero().squeeze(1)
            if len(pairs) == 0:
                continue
            of_expert = torch.zeros_like(some)
            of_expert[by_item.index_select(0, pairs), by_audience.index_select(0, pairs)] = True
            rows_i, rows_s = of_expert.any(1).nonzero().squeeze(1), of_expert.any(0).nonzero().squeeze(1)
            for side, rows in ((items, rows_i), (audience, rows_s)):
                _fill(model, side.states, expert, rows + side.start)
            place_i, place_s = find_places(of_expert[rows_i][:, rows_s], model.config.heads)
            sides = ((items.expert(expert, rows_i), place_i), (audience.expert(expert, rows_s), place_s))
            tokens = norm(run_layer(layer, x.index_select(0, pairs), sides))
            share = weights[:, expert].index_select(0, pairs)
            mixed.index_add_(0, pairs, tokens * share[:, None, None])
        sides = ((items.tower(), all_i), (audience.tower(), all_s))
        return self._tower(mixed, weights, sides) + below

    def _found(self, items: _Rows, audience: _Rows, by_item: Tensor, places: Places) -> Tensor:
        """Return what target attention finds for the pairs, [n, 3 d + h]."""
        query = items.asked.index_select(0, by_item)[:, None]  # [n, 1, h, c + 1]
        past = audience.past

        def read(dtype: torch.dtype | None) -> Tensor:
            asked = query if dtype is None else query.to(dtype)
            answer = read_part(asked, past.to(dtype), places)
            return answer.reshape(-1, *answer.shape[-2:])  # [n, h, c + 2]

        return self.model.target_attention.compare(items.entry.index_select(0, by_item), divide(read).to(query.dtype))

    def _tower(self, mixed: Tensor, weights: Tensor, sides: tuple[tuple[Part, Places], ...]) -> Tensor:
        """Return the logits [n] from mixed tokens and gate weights.

        The mixed X tokens are [n, X, d], the dense gate weights [n, E]. logit_j = sum over e of g_e
        q·kappa_{e,j}: as one product with the gate weights on the query's side.
        """
        tower = self.model.cvr_tower
        task = mixed[:, 0]
        query = tower.ask(task)  # [n, h, c]
        # The X part, as in the tower's own forward: W_K and W_V moved to the query's side.
        width = task.shape[-1]
        by_head = (tower.heads, width // tower.heads, width)
        key, value = tower.key.weight.view(by_head), tower.value.weight.view(by_head)

        def read(dtype: torch.dtype | None) -> Tensor:
            asked, x, share, w_key, w_value = (
                given if dtype is None else given.to(dtype) for given in (query, mixed, weights, key, value)
            )
            share = share[:, None, :, None]  # [n, 1, E, 1]
            own = (torch.einsum("nhc,hcd->nhd", asked, w_key) @ x.transpose(1, 2)).exp_()  # [n, h, X]
            total = torch.einsum("nhd,hcd->nhc", own @ x, w_value)
            mass = own.sum(-1)
            gated = (asked[:, :, None] * share).flatten(2)[:, None]  # [n, 1, h, E c]
            for part, places in sides:
                answer = read_part(gated, part.to(dtype), places).reshape(*asked.shape[:2], -1)  # [n, h, E c + 1]
                total = total + (answer[..., :-1].unflatten(-1, (weights.shape[-1], -1)) * share).sum(2)
                mass = mass + answer[..., -1]
            return torch.cat([total, mass[..., None]], dim=-1)

        return tower.answer(task, divide(read).to(task.dtype).flatten(1))


@dataclass(frozen=True)
class _Rows:
    """A run of rows of a side's states."""

    states: SideStates
    rows: slice

    @property
    def start(self) -> int:
        return int(self.rows.start)

    @property
    def gate(self) -> Tensor:
        return self.states.gate[self.rows]

    @property
    def task(self) -> Tensor:
        return self.states.task[self.rows]

    @property
    def counts(self) -> Tensor:
        assert self.states.counts is not None  # computed for audience rows alone
        return self.states.counts[self.rows]

    @property
    def entry(self) -> Tensor:
        assert self.states.entry is not None  # items have entries
        return self.states.entry[self.rows]

    @property
    def asked(self) -> Tensor:
        assert self.states.asked is not None  # items ask
        return self.states.asked[self.rows]

    @property
    def past(self) -> Part:
        assert self.states.past is not None  # audience rows remember
        return self._of(self.states.past)

    def shared(self, number: int) -> Part:
        return self._of(self.states.shared[number])

    def expert(self, expert: int, rows: Tensor) -> Part:
        """Return an expert's part for these rows.

        ``rows`` is [r] int64, counted from the start of the run.
        """
        part = self._of(self.states.experts[expert])
        if len(rows) == len(part.keys):
            return part
        return Part(part.keys.index_select(0, rows), part.values.index_select(0, rows))

    def tower(self) -> Part:
        """Return the tower's part of all experts."""
        assert self.states.tower is not None  # the tower runs after the experts
        return self._of(self.states.tower)

    def _of(self, part: Part) -> Part:
        return Part(part.keys[self.rows], part.values[self.rows])


def _fill(model: CameNN, states: SideStates, expert: int, rows: Tensor) -> None:
    """Compute an expert for the rows that lack it.

    It fills the expert and the tower's keys and values of its output for those of ``rows`` that
    lack them.
    """
    rows = rows[~states.filled[expert, rows]]
    if len(rows) == 0:
        return
    layer, norm, tower = layers_of(model.mixture.experts)[expert], model.mixture.norms[expert], model.cvr_tower
    mask = states.mask.index_select(0, rows)
    tokens, kv = layer.own(states.tokens.index_select(0, rows), mask, states.memory)
    normal = norm(tokens)
    of_expert = keys_values(kv, kv.shape[-1] ** -0.5, mask)
    pairs = torch.stack([tower.key(normal), tower.value(normal)], dim=2)
    of_tower = keys_values(pairs.unflatten(-1, (model.config.heads, -1)), 1.0, mask)  # the tower's query is scaled
    count, width = len(states), of_tower.keys.shape[2]
    if expert not in states.experts:
        states.experts[expert] = _zeros(of_expert, count, 1)
    if states.tower is None:
        states.tower = _zeros(of_tower, count, model.config.experts)
        states.tower.values[..., -1] = states.mask[:, None]
    states.experts[expert].keys[rows], states.experts[expert].values[rows] = of_expert.keys, of_expert.values
    place = slice(expert * width, (expert + 1) * width)
    states.tower.keys[rows, :, place] = of_tower.keys
    states.tower.values[rows, :, :, place] = of_tower.values[..., :-1]
    states.filled[expert, rows] = True


def _zeros(like: Part, rows: int, times: int) -> Part:
    """Return zeros for so many rows, of ``times`` the width."""
    _, heads, width, length = like.keys.shape
    return Part(
        like.keys.new_zeros(rows, heads, width * times, length),
        like.values.new_zeros(rows, heads, length, width * times + 1),
    )
