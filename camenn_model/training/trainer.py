"""The trainer, from a shard set to a model package.

It streams, resumes from a checkpoint with bitwise equal results, and never opens the test part
before the end.

A step's batch is cut into micro-batches, which are computed one after another, or by several
processes at once, and whose gradients are summed. The result equals that of one process, except for
the order of sums, with any number of processes that divides the number of micro-batches.
"""

import itertools
import json
import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from camenn_model.batch import AlignmentBatch, Batch
from camenn_model.data.alignment_sampler import AlignmentSampler
from camenn_model.data.batching import collate, list_units, split_batch, stream_batches
from camenn_model.data.examples import Rows
from camenn_model.data.prefetch import map_ahead
from camenn_model.evaluation.predictions import predict
from camenn_model.model.camenn import CameNN
from camenn_model.tensors import load_tensors, save_tensors
from camenn_model.training.checkpoints import Checkpoints
from camenn_model.training.corpus import Corpus, Progress, TrainOptions
from camenn_model.training.distributed import Processes
from camenn_model.training.losses import Losses, MultiTaskLoss
from camenn_model.training.optimizer import WeightAverage, build_optimizer, set_rate
from camenn_model.training.pretraining import Pretraining, fit_inputs
from schemas.errors import InputError

CLICKS_PER_PAIR = 32
"""Clicks for each ITA pair, and for each TIA pair, where a log has so many listings"""
ALIGNED_STEP = 4
"""Steps of which one includes alignment, for all of them: small batches are mostly overhead, and the
contrastive loss compares more listings in a large one."""
LISTINGS_PER_PAIR = 4
"""Listings of the contrastive loss in a step with clicks, for each of its ITA pairs"""
PIECE_SEED = 2_654_435_769
"""Distance between the seeds of a step's pieces: 2³² over the golden ratio, so that they lie far
apart in the low 32 bits, which are all that the CPU's generator uses of a seed."""


@dataclass
class State:
    """The state of training.

    It is sufficient to resume to the same result.
    """

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
    """Its share of the step's examples. It is 0 for a placeholder row where a process has none."""
    batch: Batch
    alignment: AlignmentBatch | None


@dataclass(frozen=True)
class Share:
    """One process's share of a step."""

    examples: int
    """Examples of the whole step"""
    pieces: list[MicroBatch]


class Objective(nn.Module):
    """Model and loss as one module.

    DistributedDataParallel requires it.
    """

    def __init__(self, model: CameNN, loss: MultiTaskLoss, bf16: bool) -> None:
        super().__init__()
        self.model, self.loss, self.bf16 = model, loss, bf16

    def forward(self, batch: Batch, alignment: AlignmentBatch | None) -> tuple[Losses, Tensor]:
        """Return the losses and the assignments of each expert.

        The assignments are those of the CVR task, float32 [E].
        """
        with torch.autocast(batch.pairs.label.device.type, torch.bfloat16, enabled=self.bf16):
            output = self.model(batch)
            aligned = self.model.align(alignment) if alignment is not None else None
        losses = self.loss(
            output,
            batch.pairs.label,
            aligned,
            alignment.ita.label if alignment is not None else None,
            alignment.tia.label if alignment is not None else None,
        )
        return losses, torch.bincount(output.gate.chosen.flatten(), minlength=output.gate.logits.shape[-1]).float()


class Trainer:
    """A model in training over the stream of a corpus.

    It holds one model, its optimiser and averaged weights.

    Args:
        processes: this process's place among those that train the same model. Each makes a Trainer
            of the same options.

    Raises:
        InputError: the processes cannot share the micro-batches evenly.
    """

    def __init__(
        self,
        corpus: Corpus,
        options: TrainOptions,
        progress: Progress,
        processes: Processes | None = None,
        checkpoints: Checkpoints | None = None,
    ) -> None:
        self.corpus, self.options, self.progress = corpus, options, progress
        self.batch_size = corpus.batch_size(options)
        self.rates = options.optimizer.of_batch(self.batch_size)
        self.processes = processes or Processes(device=options.device)
        if options.micro_batches % self.processes.count:
            raise InputError(
                f"--micro_batches {options.micro_batches}: {self.processes.count} processes cannot share them "
                f"evenly. Give a multiple of {self.processes.count}."
            )
        torch.manual_seed(options.seed)
        self.device = torch.device(self.processes.device)
        self.model = CameNN(corpus.config)
        corpus.table.pooled = corpus.config.pooled
        penalty = corpus.space.agreement.penalty
        fit_inputs(self.model, corpus.table, options.seed, aligned=options.alignment, penalty=penalty)
        self.model.to(self.device)
        self.loss = MultiTaskLoss(options.loss).to(self.device)
        self.optimizer = build_optimizer((self.model, self.loss), self.rates)
        self.ema = WeightAverage(self.model, self.rates.ema_decay)
        self.state = State()
        self.best: dict[str, Tensor] = {}
        sampler = AlignmentSampler(corpus.table)
        self.sampler = sampler if options.alignment and len(sampler) >= 2 else None
        self.total = options.epochs * corpus.rows("train")
        self.aligned_pairs = max(2, self.batch_size // options.micro_batches * ALIGNED_STEP // CLICKS_PER_PAIR)
        self.align_every = self._align_every()
        self.checkpoints = checkpoints or Checkpoints(Path(options.out) / "checkpoints")
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
        """Train to the end or to early stop.

        It resumes from a checkpoint where there is one.
        """
        options = self.options
        restored = self._restore()
        self._check_same_step(self.state.step if restored else -1)
        if not restored:
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

    def _check_same_step(self, step: int) -> None:
        """Check that all processes go on from the same step.

        Raises:
            InputError: they found different checkpoints.
        """
        if self.processes.sums([float(step)])[0] != step * self.processes.count:
            raise InputError(
                f"{self.checkpoints.path}: the processes of this training found different checkpoints. Start them on "
                "one machine, or remove this file on each."
            )

    def _align_every(self) -> int:
        """Return the interval of steps that include alignment.

        Alignment is part of one in so many steps with clicks. 0 means none. Many clicks may fall on
        few listings, whose photos and titles would otherwise be overfitted.
        """
        options = self.options
        if self.sampler is None or not options.alignment_passes:
            return 0
        steps = math.ceil(self.total / self.batch_size)
        drawn = options.micro_batches * min(LISTINGS_PER_PAIR * self.aligned_pairs, len(self.sampler))
        return max(ALIGNED_STEP, math.ceil(steps * drawn / (options.alignment_passes * len(self.sampler))))

    def _begin(self) -> None:
        """Run the phases before training proper (see `Pretraining`).

        They come before the first order is predicted. The first process runs them, and the others
        receive its weights.
        """
        if self.processes.first:
            self.pretraining().run()
        self.processes.copy_from_first([*self.model.state_dict().values(), *self.loss.state_dict().values()])
        self.ema = WeightAverage(self.model, self.rates.ema_decay)

    def pretraining(self) -> Pretraining:
        """Build the phases before training proper.

        They work on this trainer's model.
        """
        return Pretraining(
            model=self.model,
            loss=self.loss,
            corpus=self.corpus,
            options=self.options,
            sampler=self.sampler,
            steps=max(1, self.total // self.batch_size),
            device=self.device,
            progress=self.progress,
        )

    def stream(self) -> Iterator[Share]:
        """Yield this process's share of each step.

        It starts from the epoch's current position, and shares are gathered ahead. Every draw
        depends on the seed and the step alone.
        """
        options, state = self.options, self.state
        rng = np.random.default_rng([options.seed, 1, state.epoch])
        units = list_units(self.corpus.files("train"))
        batches = stream_batches(self.corpus.reader, units, self.batch_size, rng, by_store=options.by_store)
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
            batch = collate(given, self.corpus.table)
            if self.device.type == "cuda":
                batch, alignment = batch.pin_memory(), alignment.pin_memory() if alignment is not None else None
            pieces.append(MicroBatch(number, given, weight, batch, alignment))
        return Share(len(whole), pieces)

    def step(self, share: Share) -> None:
        """Take one step of the optimiser.

        Raises:
            InputError: a loss or the gradient is not finite. The rows are written aside.
        """
        state = self.state
        rate = set_rate(self.optimizer, self.rates, (state.examples + share.examples / 2) / self.total)
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        figures = torch.stack([self._backward(piece, piece is share.pieces[-1]) for piece in share.pieces]).sum(dim=0)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.rates.clip)
        # One copy from the device for all of a step's figures.
        *values, length = torch.cat([figures, norm.reshape(1)]).tolist()
        losses = dict(zip(Losses._fields, values, strict=False))
        if not all(map(math.isfinite, [*losses.values(), length])):
            self._stop(share, losses | {"gradient_norm": length})
        self.optimizer.step()
        self.ema.update(self.model)
        state.step += 1
        state.batch += 1
        state.examples += share.examples
        values = self.processes.sums(values)
        losses = dict(zip(Losses._fields, values, strict=False))
        if share.pieces[0].alignment is None:
            losses |= dict.fromkeys(("ita", "tia", "contrastive"), math.nan)
        chosen = values[len(losses) :]
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
        """Add a micro-batch's gradients.

        Returns:
            Its weighted losses and the assignments of its experts, float32 [7 + E].
        """
        # Seeded by step and piece, so that a resumed run, or another number of processes, draws the same dropout.
        torch.manual_seed(self.options.seed * 1_000_003 + self.state.step + piece.number * PIECE_SEED)
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
        path = self.checkpoints.directory.parent / f"nan-step-{self.state.step}-{self.processes.rank}.json"
        rows = [piece.rows for piece in share.pieces]
        found = {
            "losses": losses,
            "item_id": [item for piece in rows for item in table.ids.take(pa.array(piece.item)).to_pylist()],
            "label": [label for piece in rows for label in piece.label.tolist()],
            "session_start": [str(np.datetime64(start, "us")) for piece in rows for start in piece.start.tolist()],
        }
        path.write_text(json.dumps(found))
        raise InputError(
            f"training: a loss or the gradient is not finite at step {self.state.step}; "
            f"the batch is written to {path}. Lower --learning_rate, or look at these rows."
        )

    def _evaluate(self) -> None:
        """Measure the averaged weights on the early-stop part.

        The measure is log loss. The best weights are kept.
        """
        state = self.state
        self.model.eval()
        # The blocks are divided among the processes.
        blocks = self.corpus.blocks("early_stop")[self.processes.rank :: self.processes.count]
        with self.ema.applied_to(self.model):
            found = predict(self.model, self.corpus.reader, self.corpus.table, blocks) if blocks else None
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
            self.checkpoints.path,
            tensors,
            {"state": state, "columns": list(curves[0]) if curves else [], "request": self._request()},
        )
        self.checkpoints.saved()

    def _request(self) -> str:
        """Return the identity of the run a checkpoint belongs to.

        Another shard run or other options start again.
        """
        return json.dumps({"run": self.corpus.shards.manifest["run"], **self.options.request()}, sort_keys=True)

    def _restore(self) -> bool:
        """Return whether a checkpoint was restored."""
        if not self.checkpoints.path.exists():
            return False
        tensors, metadata = load_tensors(self.checkpoints.path)
        if metadata["request"] != self._request():
            return False

        def part(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

        # The killed run may have been of another version of the software.
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


def _shapes(tensors: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}
