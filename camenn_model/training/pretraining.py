"""The phases before training proper.

They come before the first order is predicted. Photos and titles are aligned, preferences are
learned from clicks, and the count network and the linear part are fitted to orders.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from camenn_model.batch import AlignmentBatch
from camenn_model.content.canonical_directions import PENALTY
from camenn_model.content.preference_directions import find_preferences
from camenn_model.data.alignment_sampler import AlignmentSampler
from camenn_model.data.batching import collate, cut_batches, list_units, stream_batches
from camenn_model.data.examples import Unit
from camenn_model.data.item_table import ItemTable
from camenn_model.data.prefetch import map_ahead
from camenn_model.model.camenn import CameNN
from camenn_model.model.count_network import Counts
from camenn_model.model.tokens import GAPS, age_bucket
from camenn_model.model.wide import WideRows
from camenn_model.training.corpus import Corpus, Progress, TrainOptions
from camenn_model.training.fit_counts import CountRows, fit_counts, predict_logits
from camenn_model.training.fit_wide import fit_wide
from camenn_model.training.losses import MultiTaskLoss, balance_loss, contrastive_loss, smoothed_bce, z_loss
from camenn_model.training.optimizer import OptimizerConfig, build_optimizer, set_rate
from schemas.errors import InputError

FIT_ITEMS = 512
"""Listings whose embeddings the input standardisation is fitted on."""
START_ITEMS = 8_192
"""Listings whose mean embeddings the projections' first directions are computed from."""
CHOICE_CLICKS = 512
"""Clicks of a step that learns preferences: each clicked listing is contrasted with the other listings of its batch."""
MOST_CHOICES = 2_000_000
"""Clicks that preferences are learned from at most, over all epochs: a bound on their time"""
LEAST_SHARE = 0.001
"""Share of all entries above which an age is learned from"""
ALIGNMENT_PAIRS = 64
"""ITA pairs, and as many TIA pairs, of a step of alignment alone ..."""
ALIGNMENT_LISTINGS = 256
"""... and listings of its contrastive loss."""


def fit_inputs(model: CameNN, table: ItemTable, seed: int, *, aligned: bool = True, penalty: float = PENALTY) -> None:
    """Standardise the frozen features and start their projections.

    Both are fitted on a sample of the training listings (see `start_projections`).
    """
    rng = np.random.default_rng([seed, 3])
    usable = np.flatnonzero(~table.held_out & ((table.image_row >= 0) | (table.title_row >= 0)))
    with_photo = usable[table.image_row[usable] >= 0]
    with_title = usable[table.title_row[usable] >= 0]
    if not len(with_photo) or not len(with_title):
        with_photo, with_title = (np.flatnonzero(rows >= 0) for rows in (table.image_row, table.title_row))
    chosen = [rng.choice(rows, min(len(rows), FIT_ITEMS), replace=False) for rows in (with_photo, with_title)]
    model.fit_features(table.batch(np.unique(np.concatenate(chosen))))
    both = np.flatnonzero(~table.held_out & table.with_content())
    both = np.sort(rng.choice(both, min(len(both), START_ITEMS), replace=False))
    if len(both) >= 2:
        images = table.pooled_images[table.image_row[both]].astype(np.float32)
        titles = table.pooled_titles[table.title_row[both]].astype(np.float32)
        model.start_projections(torch.from_numpy(images), torch.from_numpy(titles), aligned=aligned, penalty=penalty)


@dataclass(frozen=True)
class Pretraining:
    """The phases before training proper.

    They change `model` and `loss` in place. `sampler` is None where nothing is aligned. `steps` is
    the number of steps of training proper: alignment alone takes no more.
    """

    model: CameNN
    loss: MultiTaskLoss
    corpus: Corpus
    options: TrainOptions
    sampler: AlignmentSampler | None
    steps: int
    device: torch.device
    progress: Progress

    def run(self) -> None:
        """Run all phases.

        Raises:
            InputError: a loss or its gradient is not finite.
        """
        self._limit_ages()
        if self.sampler is not None:
            train_alignment(
                self.model,
                self.sampler,
                self.options,
                self.steps,
                lambda done, total: self.progress("align", done, total, ""),
            )
        self._find_preferences()
        self._learn_choices()
        self._fit_direct()

    def _limit_ages(self) -> None:
        """Find the oldest age of an entry that training can learn from."""
        seen = torch.zeros(GAPS, dtype=torch.int64)
        for rows in self.corpus.latest("train"):
            gaps = torch.from_numpy(rows.history.gap[rows.history.item >= 0])
            seen += torch.bincount(age_bucket(gaps), minlength=GAPS)
        learned = (seen > LEAST_SHARE * seen.sum()).nonzero()
        if len(learned):
            self.model.limit_ages(int(learned.max()))

    def _find_preferences(self) -> None:
        """Fit the preference space on the latest training clicks."""
        table = self.corpus.table
        pieces = [(rows.item, rows.user, rows.store) for rows in self.corpus.latest("train")]
        item, user, store = (np.concatenate(columns) for columns in zip(*pieces, strict=True))
        spaces = []
        for pooled, row in ((table.pooled_images, table.image_row), (table.pooled_titles, table.title_row)):
            some = row[item] >= 0
            person, place = (np.unique(codes[some], return_inverse=True)[1] for codes in (user, store))
            given = (pooled, row[item[some]], person, place, self.corpus.config.width)
            spaces.append(find_preferences(*given) if some.any() else None)
        self.model.item_tokens.tastes.start(*spaces)

    def _learn_choices(self) -> None:
        """Take steps that learn preferences from clicks alone.

        Clicks are much more frequent evidence of preferences than orders, and these steps compute
        no layer.
        """
        options = self.options
        if not options.loss.choice:
            return
        units = list_units(self.corpus.files("train"))
        self.model.train()
        optimizer = build_optimizer((self.model,), options.optimizer)
        with self.model.before_orders():
            self._take_choice_steps(optimizer, units)

    def _take_choice_steps(self, optimizer: torch.optim.Optimizer, units: list[Unit]) -> None:
        options = self.options
        total, done = min(options.choice_passes * self.corpus.rows("train"), MOST_CHOICES), 0
        for number in range(options.choice_passes):
            rng = np.random.default_rng([options.seed, 6, number])
            stream = stream_batches(self.corpus.reader, units, CHOICE_CLICKS, rng, by_store=True)
            for rows, batch in map_ahead(lambda r: (r, collate(r, self.corpus.table)), stream, options.workers):
                if done >= total:
                    return
                torch.manual_seed(options.seed * 1_000_003 + done)
                loss = nn.functional.softplus(-self.model.choose(batch.to(self.device))).mean()
                share = min(1.0, (done + len(rows) / 2) / total)
                found = _descend(
                    self.model, optimizer, loss, options.optimizer, share, f"preferences, after {done:,} clicks"
                )
                done += len(rows)
                self.progress("preferences", done, total, f"loss {found:.4f}")

    def _fit_direct(self) -> None:
        """Fit the count network and the linear part.

        The linear part's fit includes the coefficients of the counts' logit and of the preferences.
        Both are fitted on the latest training examples, the network on more of them.
        """
        wide, counts, rate = self.model.wide, self.model.counts, self.corpus.config.base_rate
        base = math.log(rate / (1 - rate))
        fit_counts(
            counts,
            base,
            self.count_rows("train"),
            self.count_rows("early_stop"),
            self.options.seed,
            lambda done, total, note: self.progress("counts", done, total, note),
        )
        train, stop = self.wide_rows("train"), self.wide_rows("early_stop")
        fitted = fit_wide(
            wide,
            base,
            wide.see(self.corpus.table),
            _with_count_logits(counts, train),
            _with_count_logits(counts, stop),
            lambda done, total, note: self.progress("wide", done, total, note),
        )
        *preferences, of_counts = fitted.coefficients
        counts.scale(of_counts)
        # Where clicks predict little of orders, their loss should have little weight.
        self.loss.choices_count.copy_(self.model.affinity.start_coefficients(torch.tensor(preferences)))

    def count_rows(self, split: str) -> CountRows:
        """Gather the numbers of the latest examples of a split."""
        pieces = [vars(rows) for rows in self.corpus.latest_numbers(split)]
        columns = {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}
        return CountRows(**{name: torch.from_numpy(column).to(self.device) for name, column in columns.items()})

    def wide_rows(self, split: str) -> WideRows:
        """Gather the latest examples of a split."""
        self.model.eval()
        pieces: list[tuple[Tensor, ...]] = []
        for latest in self.corpus.latest(split):
            for rows in cut_batches(latest, CHOICE_CLICKS, None):
                with torch.no_grad():
                    liked = self.model.liked(collate(rows, self.corpus.table).to(self.device))
                given = (
                    rows.item,
                    rows.audience_cats,
                    rows.audience_values,
                    rows.audience_buckets,
                    rows.values,
                    rows.buckets,
                    rows.label,
                )
                pieces.append((*(torch.from_numpy(column).to(self.device) for column in given), liked))
        return WideRows(*(torch.cat(columns) for columns in zip(*pieces, strict=True)))


def _with_count_logits(counts: Counts, rows: WideRows) -> WideRows:
    counted = predict_logits(counts, CountRows.of(rows))
    return replace(rows, part_logits=torch.cat([rows.part_logits, counted[:, None]], dim=1))


def _descend(
    model: CameNN, optimizer: torch.optim.Optimizer, loss: Tensor, config: OptimizerConfig, done: float, where: str
) -> float:
    """Take one step of an optimiser, and return the loss.

    `done` is the completed share of its phase.

    Raises:
        InputError: the loss or its gradient is not finite.
    """
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
    value, length = torch.stack([loss.detach(), norm]).tolist()
    if not (math.isfinite(value) and math.isfinite(length)):
        raise InputError(f"training: the loss or its gradient is not finite ({where}). Lower --learning_rate.")
    set_rate(optimizer, config, done)
    optimizer.step()
    return float(value)


def train_alignment(
    model: CameNN,
    sampler: AlignmentSampler,
    options: TrainOptions,
    steps_limit: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Train the alignment tasks alone, without clicks.

    The losses are ITA, TIA and the contrastive loss, on batches as large as the latter needs.
    `steps_limit` is the most steps, whatever `alignment_passes` requests.
    """
    listings = min(ALIGNMENT_LISTINGS, len(sampler))
    steps = min(steps_limit, math.ceil(options.alignment_passes * len(sampler) / listings))
    if steps == 0:
        return
    model.train()
    optimizer = build_optimizer((model,), options.optimizer)
    with model.before_orders():
        for step in range(steps):
            seed = [options.seed, 4, step]
            torch.manual_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))
            batch = sampler.draw(min(ALIGNMENT_PAIRS, listings), listings, np.random.default_rng(seed))
            assert batch is not None
            loss = _alignment_loss(model, batch.to(options.device), options)
            _descend(model, optimizer, loss, options.optimizer, (step + 0.5) / steps, f"alignment, step {step}")
            progress(step + 1, steps)


def _alignment_loss(model: CameNN, batch: AlignmentBatch, options: TrainOptions) -> Tensor:
    """Return the loss of one step of alignment alone."""
    config = options.loss
    with torch.autocast(options.device.split(":")[0], torch.bfloat16, enabled=options.precision == "bf16"):
        output = model.align(batch)
    loss = (
        config.ita * smoothed_bce(output.ita, batch.ita.label, config.label_smoothing)
        + config.tia * smoothed_bce(output.tia, batch.tia.label, config.label_smoothing)
    ) / 2
    if config.contrastive:
        loss = loss + contrastive_loss(output.similarities, output.group)
    for gate in (output.ita_gate, output.tia_gate):
        loss = loss + config.balance * balance_loss(gate) + config.z * z_loss(gate)
    return loss
