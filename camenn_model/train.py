"""Training: from a shard set to a model package. Streams, resumes from a checkpoint to the same bits, never opens the test part before the end.

A step's batch is cut into micro-batches, which are computed one after another, or by several processes at once, and whose gradients are summed: the result
is that of one process, but for the order of sums, with any number of processes that divides the number of micro-batches.
"""

import csv
import itertools
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from camenn_model.agreement import Agreement
from camenn_model.batch import AlignmentBatch, Batch
from camenn_model.checkpoint import load_tensors, save_tensors
from camenn_model.config import LossConfig, ModelConfig
from camenn_model.counts import CountRows, Counts, fit_counts, say
from camenn_model.dataset import (
    AlignmentSampler,
    ExampleReader,
    Rows,
    collate,
    cut_batches,
    list_units,
    map_ahead,
    split_batch,
    stream_batches,
)
from camenn_model.directions import PENALTY
from camenn_model.evaluation import (
    CALIBRATED_ON,
    Predictions,
    calibrate,
    cvr_metrics,
    predict,
    reliability,
    representation,
)
from camenn_model.feature_space import FeatureSpace
from camenn_model.item_table import ItemTable
from camenn_model.losses import Losses, MultiTaskLoss, balance_loss, contrastive_loss, smoothed_bce, z_loss
from camenn_model.model import CameNN
from camenn_model.optimizer import OptimizerConfig, WeightAverage, build_optimizer
from camenn_model.processes import Processes
from camenn_model.shards import ShardSet
from camenn_model.taste_space import find_tastes
from camenn_model.wide import WideRows, fit_wide
from schemas.contract import InputError

Progress = Callable[[str, int, int, str], None]
"""(phase, examples done, examples in all, note): called after every step."""

FIT_ROWS = 1_000_000
"""Training examples that vocabularies and quantiles are fitted on, from whole files, the latest ones."""
FIT_ITEMS = 512
"""Listings whose embeddings the input standardisation is fitted on."""
START_ITEMS = 8_192
"""Listings whose mean embeddings the projections' first directions are computed from."""
FITTED_ROWS = 500_000
"""Training examples that the space of tastes and the linear part are found from, from whole files, the latest ones."""
CHOICE_CLICKS = 512
"""Clicks of a step that learns who clicks what: each is told from the other listings of its batch."""
LISTINGS_PER_PAIR = 4
"""Listings whose photos and titles are told apart in a step with clicks, for each ITA pair of it"""
ALIGNMENT_PAIRS = 64
"""ITA pairs, and as many TIA pairs, of a step of alignment alone ..."""
ALIGNMENT_LISTINGS = 256
"""... and listings whose photos and titles are told apart in it."""


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """One training run, resolved."""

    shards: str
    out: str
    profile: str = "small"
    attention: str = "prefix"
    epochs: int = 1
    batch_size: int = 128
    """Examples a step, over all processes"""
    micro_batches: int = 1
    """Pieces that a step's batch is cut into; the number of processes divides it"""
    by_store: bool = False
    """Whether a batch draws from few stores, and so holds fewer distinct listings"""
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(learning_rate=1e-3, ema_decay=0.99))
    evaluations: int = 4
    patience: int = 4
    seed: int = 0
    device: str = "cpu"
    precision: str = "fp32"
    loss: LossConfig = field(default_factory=LossConfig)
    alignment: bool = True
    alignment_passes: int = 8
    """Times that each listing is seen in the steps of alignment alone, before the clicks, and again at most in the steps with clicks; 0 = never"""
    choice_passes: int = 4
    """Times that each click is seen in the steps that learn who clicks what, before what is ordered; 0 = no such steps"""
    checkpoint_seconds: float = 60.0
    workers: int = 1
    """Threads that gather batches"""

    def request(self) -> dict[str, Any]:
        """What the result depends on: not on how often it is saved, nor on the threads that gather."""
        return {name: value for name, value in asdict(self).items() if name not in ("workers", "checkpoint_seconds")}


@dataclass
class Corpus:
    """What training reads: the shard set, encoded."""

    shards: ShardSet
    space: FeatureSpace
    table: ItemTable
    reader: ExampleReader
    config: ModelConfig

    def files(self, split: str) -> list[tuple[str, int]]:
        """(path, rows) of a split."""
        return self.shards.examples(split)

    def rows(self, split: str) -> int:
        """Examples of a split."""
        return sum(rows for _, rows in self.files(split))


def open_corpus(options: TrainOptions) -> Corpus:
    """Open a shard set, fit the feature space on its training part, and size the model.

    Raises:
        InputError: a part is empty, labels are of one class only, or no listing has a photo or a title.
    """
    shards = ShardSet(options.shards)
    for split in ("train", "early_stop", "calibration", "test"):
        if not shards.examples(split):
            raise InputError(
                f"--shards {options.shards}: part '{split}' is empty: the log is too short to be split by time with a gap of the attribution window. "
                "Give a longer log, or a smaller --test_share or --attribution_hours to `camenn shards`."
            )
    fitted: list[pa.Table] = []
    for path, _ in reversed(shards.examples("train")):
        fitted.append(pq.ParquetFile(path).read())
        if sum(table.num_rows for table in fitted) >= FIT_ROWS:
            break
    examples = pa.concat_tables(fitted)
    base_rate = float(np.mean(examples["label"].to_numpy()))
    for split in ("early_stop", "calibration", "test"):
        labels = np.concatenate(
            [pq.ParquetFile(path).read(columns=["label"])["label"].to_numpy() for path, _ in shards.examples(split)]
        )
        _check_classes(options.shards, split, float(labels.mean()))
    _check_classes(options.shards, "train", base_rate)
    if not len(shards.images) or not len(shards.titles):
        missing = "photo" if not len(shards.images) else "title"
        raise InputError(
            f"--shards {options.shards}: no listing has a {missing} that could be encoded: CameNN needs both. See the store's `defects`."
        )
    table = ItemTable(shards.items, shards.images, shards.titles)
    likeness = table.fit_likeness()
    agreement = table.fit_agreement() if options.alignment else Agreement.none()
    told = table.tell(likeness, agreement)
    space = FeatureSpace.fit(shards.items, shards.users, examples, likeness, agreement, told)
    table.encode(space, told)
    patches, image_width = shards.images.shape
    tokens, text_width = shards.titles.shape
    config = ModelConfig.profile(
        options.profile,
        fields=space.fields,
        text_width=text_width,
        image_width=image_width,
        base_rate=base_rate,
        history_length=int(shards.manifest["options"]["history"]),
        text_tokens=tokens,
        patch_grid=math.isqrt(patches),
        attention=options.attention,  # type: ignore[arg-type]
    )
    reader = ExampleReader(space, table, shards.users, config.history_length, config.position_size)
    return Corpus(shards, space, table, reader, config)


def _check_classes(root: str, split: str, rate: float) -> None:
    if rate in (0.0, 1.0):
        found = "no click was followed by an order" if rate == 0.0 else "every click was followed by an order"
        raise InputError(
            f"--shards {root}: part '{split}' has one class only ({found}): there is nothing to learn. "
            "Check that orders carry the same user_id and item_id as clicks, and that --attribution_hours fits."
        )


def rate_at(done: float, warmup: float) -> float:
    """Factor on the learning rate when the share `done` of the examples is seen: linear up over `warmup` of them, linear down to 0."""
    return done / warmup if done < warmup else max(0.0, (1.0 - done) / (1.0 - warmup))


def _set_rate(optimizer: torch.optim.Optimizer, config: OptimizerConfig, done: float) -> float:
    """Set the learning rate for the share `done`; returns it."""
    rate = config.learning_rate * rate_at(done, config.warmup)
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


def fit_inputs(model: CameNN, table: ItemTable, seed: int, *, aligned: bool = True, penalty: float = PENALTY) -> None:
    """Standardise the frozen features on a sample of the training listings, and start their projections (see `start_projections`)."""
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


@dataclass
class State:
    """Where training stands: enough to go on to the same result."""

    step: int = 0
    epoch: int = 0
    batch: int = 0
    examples: int = 0
    best_loss: float = math.inf
    best_step: int = 0
    worse: int = 0
    seconds: float = 0.0
    curves: list[dict[str, float]] = field(default_factory=list)


@dataclass(frozen=True)
class MicroBatch:
    """A piece of a step's batch, gathered."""

    number: int
    rows: Rows
    weight: float
    """Its share of the step's examples; 0 for a row that stands in where a process has none"""
    batch: Batch
    alignment: AlignmentBatch | None


@dataclass(frozen=True)
class Share:
    """What one process computes of a step."""

    examples: int
    """Of the whole step"""
    pieces: list[MicroBatch]


class Objective(nn.Module):
    """Model and loss as one module, as DistributedDataParallel wants them."""

    def __init__(self, model: CameNN, loss: MultiTaskLoss, bf16: bool) -> None:
        super().__init__()
        self.model, self.loss, self.bf16 = model, loss, bf16

    def forward(self, batch: Batch, alignment: AlignmentBatch | None) -> tuple[Losses, Tensor]:
        """(losses; assignments of each expert of the CVR task, float32 [E])."""
        with torch.autocast(batch.pairs.label.device.type, torch.bfloat16, enabled=self.bf16):
            output = self.model(batch)
            aligned = self.model.align(alignment) if alignment is not None else None
        losses = self.loss(
            output, batch.pairs.label, aligned, alignment.ita.label if alignment is not None else None, alignment.tia.label if alignment is not None else None
        )  # fmt: skip
        return losses, torch.bincount(output.gate.chosen.flatten(), minlength=output.gate.logits.shape[-1]).float()


class Trainer:
    """One model, its optimiser and averaged weights, over the stream of a corpus.

    Args:
        processes: this process's place among those that train the same model; each makes a Trainer of the same options.

    Raises:
        InputError: the processes cannot share the micro-batches evenly.
    """

    def __init__(
        self, corpus: Corpus, options: TrainOptions, progress: Progress, processes: Processes | None = None
    ) -> None:
        self.corpus, self.options, self.progress = corpus, options, progress
        self.processes = processes or Processes(device=options.device)
        if options.micro_batches % self.processes.count:
            raise InputError(
                f"--micro_batches {options.micro_batches}: {self.processes.count} processes cannot share them evenly. Give a multiple of {self.processes.count}."
            )
        torch.manual_seed(options.seed)
        self.device = torch.device(self.processes.device)
        self.model = CameNN(corpus.config)
        penalty = corpus.space.agreement.penalty
        fit_inputs(self.model, corpus.table, options.seed, aligned=options.alignment, penalty=penalty)
        self.model.to(self.device)
        self.loss = MultiTaskLoss(options.loss).to(self.device)
        self.optimizer = build_optimizer((self.model, self.loss), options.optimizer)
        self.ema = WeightAverage(self.model, options.optimizer.ema_decay)
        self.state = State()
        self.best: dict[str, Tensor] = {}
        sampler = AlignmentSampler(corpus.table)
        self.sampler = sampler if options.alignment and len(sampler) >= 2 else None
        self.total = options.epochs * corpus.rows("train")
        self.aligned_pairs = max(2, options.batch_size // options.micro_batches // 16)
        self.align_every = self._align_every()
        self.checkpoint_path = Path(options.out) / "checkpoints" / "main.safetensors"
        self.objective: nn.Module = Objective(self.model, self.loss, options.precision == "bf16")
        if self.processes.count > 1:
            self.objective = DistributedDataParallel(
                self.objective,
                device_ids=None if self.device.type == "cpu" else [self.device],
                broadcast_buffers=False,
                # An expert that no row of this process chose has no gradient here.
                find_unused_parameters=True,
            )

    def run(self) -> None:
        """Train to the end or to early stop, from a checkpoint where there is one."""
        options = self.options
        if not self._restore():
            self._begin()
        state = self.state
        every = max(1, self.corpus.rows("train") // options.evaluations)
        due = (state.examples // every + 1) * every
        saved = time.monotonic()
        while state.epoch < options.epochs and state.worse < options.patience:
            for share in self.stream():
                started = time.monotonic()
                self.step(share)
                state.seconds += time.monotonic() - started
                if state.examples >= due:
                    self._evaluate()
                    due = (state.examples // every + 1) * every
                    if state.worse >= options.patience:
                        break
                if self.processes.first and time.monotonic() - saved > options.checkpoint_seconds:
                    self._save()
                    saved = time.monotonic()
            else:
                state.epoch += 1
                state.batch = 0
                continue
            break
        if math.isnan(state.curves[-1]["early_stop_log_loss"]):
            self._evaluate()
        self.model.load_state_dict(self.best)
        self.model.eval()

    def _align_every(self) -> int:
        """Alignment takes part in each of so many steps with clicks; 0 = in none.

        Clicks may be many for few listings, whose photos and titles would then be learned by heart.
        """
        options = self.options
        if self.sampler is None or not options.alignment_passes:
            return 0
        steps = math.ceil(self.total / options.batch_size)
        drawn = options.micro_batches * min(LISTINGS_PER_PAIR * self.aligned_pairs, len(self.sampler))
        return max(1, math.ceil(steps * drawn / (options.alignment_passes * len(self.sampler))))

    def _begin(self) -> None:
        """What comes before the first order is predicted: photos and titles find each other, and clicks tell tastes.

        The first process does it, and the others take its weights.
        """
        if self.processes.first:
            if self.sampler is not None:
                most = max(1, self.total // self.options.batch_size)
                train_alignment(
                    self.model,
                    self.sampler,
                    self.options,
                    most,
                    lambda done, total: self.progress("align", done, total, ""),
                )
            self._find_tastes()
            self._learn_choices()
            self._fit_direct()
        self.processes.copy_from_first([*self.model.state_dict().values(), *self.loss.state_dict().values()])
        self.ema = WeightAverage(self.model, self.options.optimizer.ema_decay)

    def _find_tastes(self) -> None:
        """The space of tastes, from the latest training clicks."""
        table = self.corpus.table
        pieces = [(rows.item, rows.user, rows.store) for rows in self._latest("train")]
        item, user, store = (np.concatenate(columns) for columns in zip(*pieces, strict=True))
        spaces = []
        for pooled, row in ((table.pooled_images, table.image_row), (table.pooled_titles, table.title_row)):
            some = row[item] >= 0
            person, place = (np.unique(codes[some], return_inverse=True)[1] for codes in (user, store))
            given = (pooled, row[item[some]], person, place, self.corpus.config.width)
            spaces.append(find_tastes(*given) if some.any() else None)
        self.model.item_tokens.tastes.start(*spaces)

    def _latest(self, split: str) -> Iterator[Rows]:
        """Whole files of a split, the latest first, up to `FITTED_ROWS` examples."""
        count = 0
        for path, _ in reversed(self.corpus.files(split)):
            rows = self.corpus.reader.read(path)
            yield rows
            count += len(rows)
            if count >= FITTED_ROWS:
                return

    def _learn_choices(self) -> None:
        """Steps on who clicks what alone: many more clicks than orders tell of tastes, and they cost no layer."""
        options = self.options
        if not options.loss.choice:
            return
        units = list_units(self.corpus.files("train"))
        self.model.train()
        optimizer = build_optimizer((self.model,), options.optimizer)
        total, done = options.choice_passes * self.corpus.rows("train"), 0
        for number in range(options.choice_passes):
            rng = np.random.default_rng([options.seed, 6, number])
            stream = stream_batches(self.corpus.reader, units, CHOICE_CLICKS, rng, by_store=True)
            for rows, batch in map_ahead(lambda r: (r, collate(r, self.corpus.table)), stream, options.workers):
                torch.manual_seed(options.seed * 1_000_003 + done)
                loss = nn.functional.softplus(-self.model.choose(batch.to(self.device))).mean()
                share = min(1.0, (done + len(rows) / 2) / total)
                told = _descend(self.model, optimizer, loss, options.optimizer, share, f"tastes, after {done:,} clicks")
                done += len(rows)
                self.progress("tastes", done, total, f"loss {told:.4f}")

    def _fit_direct(self) -> None:
        """What counts say together, and the linear part with what that and tastes are worth to an order, on the latest training examples."""
        wide, counts, rate = self.model.wide, self.model.counts, self.corpus.config.base_rate
        base = math.log(rate / (1 - rate))
        train, stop = self._wide_rows("train"), self._wide_rows("early_stop")
        fit_counts(
            counts,
            base,
            CountRows.of(train),
            CountRows.of(stop),
            self.options.seed,
            lambda done, total, note: self.progress("counts", done, total, note),
        )
        fitted = fit_wide(
            wide,
            base,
            wide.see(self.corpus.table),
            _told_by(counts, train),
            _told_by(counts, stop),
            lambda done, total, note: self.progress("wide", done, total, note),
        )
        *tastes, of_counts = fitted.worth
        counts.scale(of_counts)
        # Where choices tell little of orders, they should not count much beside them.
        self.loss.choices_count.copy_(self.model.affinity.start_worth(torch.tensor(tastes)))

    def _wide_rows(self, split: str) -> WideRows:
        """The latest examples of a split."""
        self.model.eval()
        pieces: list[tuple[Tensor, ...]] = []
        for latest in self._latest(split):
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

    def stream(self) -> Iterator[Share]:
        """This process's share of each step from where the epoch stands, gathered ahead; every draw depends on the seed and the step alone."""
        options, state = self.options, self.state
        rng = np.random.default_rng([options.seed, 1, state.epoch])
        units = list_units(self.corpus.files("train"))
        batches = stream_batches(self.corpus.reader, units, options.batch_size, rng, by_store=options.by_store)
        numbered = enumerate(itertools.islice(batches, state.batch, None), start=state.step)
        return map_ahead(self._gather, numbered, options.workers)

    def _gather(self, numbered: tuple[int, Rows]) -> Share:
        step, whole = numbered
        options = self.options
        own = options.micro_batches // self.processes.count
        pieces = []
        for number, rows in enumerate(split_batch(whole, options.micro_batches)):
            if number // own != self.processes.rank:
                continue
            alignment = None
            if self.sampler is not None and self.align_every and step % self.align_every == 0:
                seed = [options.seed, 2, step, *([number] if number else [])]
                listings = LISTINGS_PER_PAIR * self.aligned_pairs
                alignment = self.sampler.draw(self.aligned_pairs, listings, np.random.default_rng(seed))
            weight = len(rows) / len(whole)
            # The last batch may have fewer rows than there are pieces, and every process takes part in every step.
            given = rows if len(rows) else whole.take(np.zeros(1, dtype=np.int64))
            pieces.append(MicroBatch(number, given, weight, collate(given, self.corpus.table), alignment))
        return Share(len(whole), pieces)

    def step(self, share: Share) -> None:
        """One step of the optimiser.

        Raises:
            InputError: a loss or the gradient is not finite; the rows are written aside.
        """
        options, state = self.options, self.state
        rate = _set_rate(self.optimizer, options.optimizer, (state.examples + share.examples / 2) / self.total)
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        figures = torch.stack([self._backward(piece, piece is share.pieces[-1]) for piece in share.pieces]).sum(dim=0)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), options.optimizer.clip)
        # One copy from the device for all that a step tells.
        *told, length = torch.cat([figures, norm.reshape(1)]).tolist()
        losses = dict(zip(Losses._fields, told, strict=False))
        if not all(map(math.isfinite, [*losses.values(), length])):
            self._stop(share, losses | {"gradient_norm": length})
        self.optimizer.step()
        self.ema.update(self.model)
        state.step += 1
        state.batch += 1
        state.examples += share.examples
        told = self.processes.sums(told)
        losses = dict(zip(Losses._fields, told, strict=False))
        if share.pieces[0].alignment is None:
            losses |= dict.fromkeys(("ita", "tia", "contrastive"), math.nan)
        chosen = told[len(losses) :]
        state.curves.append(
            {
                "step": state.step,
                "examples": state.examples,
                "lr": rate,
                **losses,
                "gradient_norm": length,
                "early_stop_log_loss": math.nan,
                **{f"expert_{number}": count / sum(chosen) for number, count in enumerate(chosen)},
            }
        )
        self.progress("train", state.examples, self.total, f"loss {losses['cvr']:.4f}")

    def _backward(self, piece: MicroBatch, last: bool) -> Tensor:
        """Add a micro-batch's gradients; returns its weighted losses and the assignments of its experts, float32 [7 + E]."""
        # Seeded by step and piece, so that a resumed run, or another number of processes, draws the same dropout.
        torch.manual_seed(self.options.seed * 1_000_003 + self.state.step + (piece.number << 40))
        batch = piece.batch.to(self.device)
        alignment = piece.alignment.to(self.device) if piece.alignment is not None else None
        parallel = self.objective if isinstance(self.objective, DistributedDataParallel) else None
        with parallel.no_sync() if parallel is not None and not last else nullcontext():
            losses, chosen = self.objective(batch, alignment)
            # Gradients are summed over micro-batches, and DistributedDataParallel takes their mean over processes.
            (losses.total * (piece.weight * self.processes.count)).backward()
        return torch.cat([torch.stack(losses).detach() * piece.weight, chosen * (piece.weight > 0)])

    def _stop(self, share: Share, losses: dict[str, float]) -> None:
        table = self.corpus.table
        path = Path(self.options.out) / f"nan-step-{self.state.step}-{self.processes.rank}.json"
        rows = [piece.rows for piece in share.pieces]
        found = {
            "losses": losses,
            "item_id": [item for piece in rows for item in table.ids.take(pa.array(piece.item)).to_pylist()],
            "label": [label for piece in rows for label in piece.label.tolist()],
            "session_start": [str(np.datetime64(start, "us")) for piece in rows for start in piece.start.tolist()],
        }
        path.write_text(json.dumps(found))
        raise InputError(
            f"training: a loss or the gradient is not finite at step {self.state.step}; the batch is written to {path}. Lower --learning_rate, or look at these rows."
        )

    def _evaluate(self) -> None:
        """Log loss of the averaged weights on the early-stop part; keeps the best."""
        state = self.state
        self.model.eval()
        # Each process takes some of the files.
        files = self.corpus.files("early_stop")[self.processes.rank :: self.processes.count]
        with self.ema.applied_to(self.model):
            found = predict(self.model, self.corpus.reader, self.corpus.table, files) if files else None
            sums = (found.log_loss() * len(found.labels), len(found.labels)) if found is not None else (0.0, 0)
            total, rows = self.processes.sums(sums)
            loss = total / rows
            weights = {name: tensor.detach().cpu().clone() for name, tensor in self.model.state_dict().items()}
        if state.curves:
            state.curves[-1]["early_stop_log_loss"] = loss
        if loss < state.best_loss:
            state.best_loss, state.best_step, state.worse = loss, state.step, 0
            self.best = weights
        else:
            state.worse += 1

    def _save(self) -> None:
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        tensors |= {f"loss.{name}": tensor for name, tensor in self.loss.state_dict().items()}
        tensors |= {f"ema.{name}": tensor for name, tensor in self.ema.state_dict().items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self.best.items()}
        for number, values in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{name}": value for name, value in values.items()}
        state = asdict(self.state)
        curves = state.pop("curves")
        tensors["curves"] = torch.tensor([list(row.values()) for row in curves], dtype=torch.float64)
        save_tensors(
            self.checkpoint_path,
            tensors,
            {"state": state, "columns": list(curves[0]) if curves else [], "request": self._request()},
        )

    def _request(self) -> str:
        """What the checkpoint belongs to: another shard run or other options begin anew."""
        return json.dumps({"run": self.corpus.shards.manifest["run"], **self.options.request()}, sort_keys=True)

    def _restore(self) -> bool:
        """Whether there was a checkpoint to go on from."""
        if not self.checkpoint_path.exists():
            return False
        tensors, metadata = load_tensors(self.checkpoint_path)
        if metadata["request"] != self._request():
            return False

        def part(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

        # Another version of the software may have been killed.
        if any(_shapes(part(f"{name}.")) != _shapes(getattr(self, name).state_dict()) for name in ("model", "loss")):
            return False
        self.model.load_state_dict(part("model."))
        self.loss.load_state_dict(part("loss."))
        self.ema.load_state_dict(part("ema."))
        self.best = part("best.")
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in part("optimizer.").items():
            number, key = name.split(".", 1)
            state.setdefault(int(number), {})[key] = tensor
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})
        curves = [dict(zip(metadata["columns"], row, strict=True)) for row in tensors["curves"].tolist()]
        self.state = State(**metadata["state"], curves=curves)
        return True


def _told_by(counts: Counts, rows: WideRows) -> WideRows:
    return replace(rows, told=torch.cat([rows.told, say(counts, CountRows.of(rows))[:, None]], dim=1))


def _shapes(tensors: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def _descend(
    model: CameNN, optimizer: torch.optim.Optimizer, loss: Tensor, config: OptimizerConfig, done: float, where: str
) -> float:
    """One step of an optimiser when the share `done` of its phase is behind; returns the loss.

    Raises:
        InputError: the loss or its gradient is not finite.
    """
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
    told, length = torch.stack([loss.detach(), norm]).tolist()
    if not (math.isfinite(told) and math.isfinite(length)):
        raise InputError(f"training: the loss or its gradient is not finite ({where}). Lower --learning_rate.")
    _set_rate(optimizer, config, done)
    optimizer.step()
    return float(told)


def train_alignment(
    model: CameNN,
    sampler: AlignmentSampler,
    options: TrainOptions,
    steps_limit: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Train photos and titles to find each other, without clicks: ITA, TIA and the contrastive loss, on batches as large as the latter wants them.

    Args:
        steps_limit: most steps, whatever `alignment_passes` asks for.
    """
    listings = min(ALIGNMENT_LISTINGS, len(sampler))
    steps = min(steps_limit, math.ceil(options.alignment_passes * len(sampler) / listings))
    if steps == 0:
        return
    model.train()
    optimizer = build_optimizer((model,), options.optimizer)
    config = options.loss
    for step in range(steps):
        seed = [options.seed, 4, step]
        torch.manual_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))
        batch = sampler.draw(min(ALIGNMENT_PAIRS, listings), listings, np.random.default_rng(seed))
        assert batch is not None
        batch = batch.to(options.device)
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
        _descend(model, optimizer, loss, options.optimizer, (step + 0.5) / steps, f"alignment, step {step}")
        progress(step + 1, steps)


def train(
    options: TrainOptions, directory: Path, progress: Progress, processes: Processes | None = None
) -> dict[str, Any]:
    """Train, calibrate, measure, and write the package into `directory`; returns the metrics.

    Of several processes the first one does so; the others take part in the steps, and return {}.

    Raises:
        InputError: the shard set cannot be trained on (see `open_corpus`), or the loss stopped being finite.
    """
    started = time.monotonic()
    corpus = open_corpus(options)
    trainer = Trainer(corpus, options, progress, processes)
    if not trainer.processes.first:
        trainer.run()
        return {}
    trainer.run()
    model, state = trainer.model, trainer.state
    found = {
        split: predict(
            model,
            corpus.reader,
            corpus.table,
            corpus.files(split),
            lambda done, total, split=split: progress(f"measure {split}", done, total, ""),
        )
        for split in (*CALIBRATED_ON, "test")
    }
    calibration = calibrate(found)
    test = found["test"]
    metrics: dict[str, Any] = {
        "test": cvr_metrics(test, calibration, corpus.config.base_rate),
        "baselines": {"popularity": popularity_metrics(corpus, found)},
        "reliability": reliability(test, calibration),
        "representation": None,
        "early_stop_log_loss": state.best_loss,
        "train": {
            "examples": state.examples,
            "steps": state.step,
            "best_step": state.best_step,
            "epochs": options.epochs,
            "seconds": round(state.seconds, 1),
            "examples_per_second": round(state.examples / max(state.seconds, 1e-9), 1),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "alignment_listings": len(trainer.sampler) if trainer.sampler else 0,
        },
    }
    retrieval: dict[str, Any] = {"queries": []}
    if trainer.sampler is not None:
        metrics["representation"], retrieval["queries"] = representation(model, corpus.table, options.seed)
    metrics["seconds"] = round(time.monotonic() - started, 1)
    save_tensors(directory / "model.safetensors", dict(model.state_dict()))
    meta = {
        "model": json.loads(corpus.config.to_json()),
        "loss": asdict(options.loss),
        "encoders": corpus.shards.manifest["options"]["encoders"],
        "attribution_hours": corpus.shards.manifest["options"]["attribution_hours"],
        "shards": corpus.shards.manifest["request"],
    }
    (directory / "config.json").write_text(json.dumps(meta, indent=1, sort_keys=True))
    corpus.space.write(directory)
    (directory / "calibration.json").write_text(calibration.to_json())
    (directory / "metrics.json").write_text(json.dumps(metrics, indent=1, allow_nan=False))
    (directory / "retrieval.json").write_text(json.dumps(retrieval, indent=1))
    write_curves(directory / "curves.csv", state.curves)
    shutil.rmtree(trainer.checkpoint_path.parent, ignore_errors=True)
    return metrics


def popularity(corpus: Corpus, split: str) -> NDArray[np.float64]:
    """log(1 + orders of the listing before the session) of each example of a split, [n]."""
    files = [pq.ParquetFile(path).read(columns=["item_orders"]) for path, _ in corpus.files(split)]
    return np.log1p(np.concatenate([table["item_orders"].to_numpy() for table in files]).astype(np.float64))


def popularity_metrics(corpus: Corpus, found: dict[str, Predictions]) -> dict[str, Any]:
    """The popularity baseline, calibrated like the model: listings by their orders before the session. `found`: predictions of the same examples."""
    popular = {split: predictions.with_logits(popularity(corpus, split)) for split, predictions in found.items()}
    return cvr_metrics(popular["test"], calibrate(popular), corpus.config.base_rate)


def write_curves(path: Path, curves: list[dict[str, float]]) -> None:
    """One CSV row per step; an empty cell where nothing was measured."""
    with path.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, fieldnames=list(curves[0]) if curves else ["step"])
        writer.writeheader()
        for row in curves:
            writer.writerow({name: "" if math.isnan(value) else f"{value:.6g}" for name, value in row.items()})
