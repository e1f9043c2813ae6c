"""Training: from a shard set to a model package. Streams, resumes from a checkpoint to the same bits, never opens the test part before the end."""

import csv
import json
import math
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from camenn_model.batch import AlignmentBatch
from camenn_model.calibration import fit_platt
from camenn_model.checkpoint import FOLDS, load_tensors, save_tensors
from camenn_model.config import LossConfig, ModelConfig
from camenn_model.dataset import AlignmentSampler, ExampleReader, Rows, collate, prefetch, stream_batches
from camenn_model.evaluation import Predictions, cvr_metrics, predict, reliability, representation
from camenn_model.feature_space import FeatureSpace
from camenn_model.item_table import ItemTable
from camenn_model.losses import MultiTaskLoss, balance_loss, contrastive_loss, smoothed_bce, z_loss
from camenn_model.model import CameNN
from camenn_model.optimizer import OptimizerConfig, WeightAverage, build_optimizer
from camenn_model.shards import ShardSet
from schemas.contract import InputError

Progress = Callable[[str, int, int, str], None]
"""(phase, examples done, examples in all, note): called after every step."""

FIT_ROWS = 1_000_000
"""Training examples that vocabularies and quantiles are fitted on, from whole files, the latest ones."""
FIT_ITEMS = 512
"""Listings whose embeddings the input standardisation is fitted on."""


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """One training run, resolved."""

    shards: str
    out: str
    profile: str = "small"
    attention: str = "prefix"
    epochs: int = 1
    batch_size: int = 128
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(learning_rate=1e-3, ema_decay=0.99))
    evaluations: int = 4
    patience: int = 4
    seed: int = 0
    device: str = "cpu"
    precision: str = "fp32"
    loss: LossConfig = field(default_factory=LossConfig)
    alignment: bool = True
    alignment_passes: int = 20
    checkpoint_seconds: float = 60.0


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
    space = FeatureSpace.fit(shards.items, shards.users, examples)
    table = ItemTable(shards.items, space, shards.images, shards.titles)
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


def fit_inputs(model: CameNN, table: ItemTable, seed: int) -> None:
    """Standardise the frozen features on a sample of the training listings."""
    rng = np.random.default_rng([seed, 3])
    usable = np.flatnonzero(~table.held_out & ((table.image_row >= 0) | (table.title_row >= 0)))
    with_photo = usable[table.image_row[usable] >= 0]
    with_title = usable[table.title_row[usable] >= 0]
    if not len(with_photo) or not len(with_title):
        with_photo, with_title = (np.flatnonzero(rows >= 0) for rows in (table.image_row, table.title_row))
    chosen = [rng.choice(rows, min(len(rows), FIT_ITEMS), replace=False) for rows in (with_photo, with_title)]
    model.fit_features(table.batch(np.unique(np.concatenate(chosen))))


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


class Trainer:
    """One model, its optimiser and averaged weights, over the stream of a corpus."""

    def __init__(self, corpus: Corpus, options: TrainOptions, progress: Progress) -> None:
        self.corpus, self.options, self.progress = corpus, options, progress
        torch.manual_seed(options.seed)
        self.device = torch.device(options.device)
        self.model = CameNN(corpus.config)
        fit_inputs(self.model, corpus.table, options.seed)
        self.model.to(self.device)
        self.loss = MultiTaskLoss(options.loss).to(self.device)
        self.optimizer = build_optimizer((self.model, self.loss), options.optimizer)
        self.ema = WeightAverage(self.model, options.optimizer.ema_decay)
        self.state = State()
        self.best: dict[str, Tensor] = {}
        sampler = AlignmentSampler(corpus.table)
        self.sampler = sampler if options.alignment and len(sampler) >= 2 else None
        self.total = options.epochs * corpus.rows("train")
        self.checkpoint_path = Path(options.out) / "checkpoints" / "main.safetensors"

    def run(self) -> None:
        """Train to the end or to early stop, from a checkpoint where there is one."""
        self._restore()
        options, state = self.options, self.state
        every = max(1, self.corpus.rows("train") // options.evaluations)
        due = (state.examples // every + 1) * every
        saved = time.monotonic()
        while state.epoch < options.epochs and state.worse < options.patience:
            rng = np.random.default_rng([options.seed, 1, state.epoch])
            batches = stream_batches(self.corpus.reader, self.corpus.files("train"), options.batch_size, rng)
            for rows, batch, alignment in prefetch(self._collated(batches, state.batch, state.step)):
                started = time.monotonic()
                self._step(rows, batch, alignment)
                state.seconds += time.monotonic() - started
                if state.examples >= due:
                    self._evaluate()
                    due += every
                    if state.worse >= options.patience:
                        break
                if time.monotonic() - saved > options.checkpoint_seconds:
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

    def _collated(
        self, batches: Iterator[Rows], skip: int, step: int
    ) -> Iterator[tuple[Rows, Any, AlignmentBatch | None]]:
        """Gathered batches from the `skip`-th of the epoch on; every draw depends on the seed and the step alone."""
        for number, rows in enumerate(batches):
            if number < skip:
                continue
            alignment = None
            if self.sampler is not None:
                alignment = self.sampler.draw(
                    max(2, self.options.batch_size // 16), np.random.default_rng([self.options.seed, 2, step])
                )
            yield rows, collate(rows, self.corpus.table), alignment
            step += 1

    def _step(self, rows: Rows, batch: Any, alignment: AlignmentBatch | None) -> None:
        options, state = self.options, self.state
        scale = rate_at((state.examples + len(rows) / 2) / self.total, options.optimizer.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = options.optimizer.learning_rate * scale
        # Seeded by step, so that a resumed run draws the dropout that an uninterrupted one would have drawn.
        torch.manual_seed(options.seed * 1_000_003 + state.step)
        self.model.train()
        batch = batch.to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=options.precision == "bf16"):
            output = self.model(batch)
            aligned = None
            if alignment is not None:
                alignment = alignment.to(self.device)
                aligned = self.model.align(alignment)
        losses = self.loss(
            output, batch.pairs.label, aligned, alignment.ita.label if alignment is not None else None, alignment.tia.label if alignment is not None else None
        )  # fmt: skip
        if not torch.isfinite(losses.total):
            path = Path(options.out) / f"nan-step-{state.step}.json"
            path.write_text(
                json.dumps(
                    {
                        "losses": {name: float(value) for name, value in losses._asdict().items()},
                        "items": rows.item.tolist(),
                        "labels": rows.label.tolist(),
                    }
                )
            )
            raise InputError(
                f"training: the loss is not finite at step {state.step}; the batch is written to {path}. Lower --learning_rate, or look at these rows."
            )
        self.optimizer.zero_grad(set_to_none=True)
        losses.total.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), options.optimizer.clip)
        self.optimizer.step()
        self.ema.update(self.model)
        state.step += 1
        state.batch += 1
        state.examples += len(rows)
        chosen = torch.bincount(output.gate.chosen.flatten(), minlength=self.corpus.config.experts).float()
        use = (chosen / chosen.sum()).tolist()
        state.curves.append(
            {
                "step": state.step,
                "examples": state.examples,
                "lr": options.optimizer.learning_rate * scale,
                **{name: float(value.detach()) for name, value in losses._asdict().items()},
                "early_stop_log_loss": math.nan,
                **{f"expert_{number}": share for number, share in enumerate(use)},
            }
        )
        self.progress("train", state.examples, self.total, f"loss {float(losses.cvr.detach()):.4f}")

    def _evaluate(self) -> None:
        """Log loss of the averaged weights on the early-stop part; keeps the best."""
        state = self.state
        self.model.eval()
        with self.ema.applied_to(self.model):
            loss = predict(
                self.model, self.corpus.reader, self.corpus.table, self.corpus.files("early_stop")
            ).log_loss()
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
        save_tensors(self.checkpoint_path, tensors, {"state": asdict(self.state), "request": self._request()})

    def _request(self) -> str:
        """What the checkpoint belongs to: another shard run or other options begin anew."""
        return json.dumps({"run": self.corpus.shards.manifest["run"], **asdict(self.options)}, sort_keys=True)

    def _restore(self) -> None:
        if not self.checkpoint_path.exists():
            return
        tensors, metadata = load_tensors(self.checkpoint_path)
        if metadata["request"] != self._request():
            return

        def part(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

        self.model.load_state_dict(part("model."))
        self.loss.load_state_dict(part("loss."))
        self.ema.load_state_dict(part("ema."))
        self.best = part("best.")
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in part("optimizer.").items():
            number, key = name.split(".", 1)
            state.setdefault(int(number), {})[key] = tensor
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})
        self.state = State(**metadata["state"])


def train_fold(corpus: Corpus, options: TrainOptions, fold: int, steps_limit: int) -> CameNN | None:
    """An alignment-only model that has not seen the listings of `fold`: judges whether their photos and titles belong together.

    None where fewer than two listings of the other fold have both.
    """
    sampler = AlignmentSampler(corpus.table, fold)
    if len(sampler) < 2:
        return None
    count = max(2, min(64, len(sampler)))
    steps = max(1, min(steps_limit, options.alignment_passes * len(sampler) // count))
    torch.manual_seed(options.seed + 1 + fold)
    model = CameNN(corpus.config)
    fit_inputs(model, corpus.table, options.seed)
    model.to(options.device).train()
    optimizer = build_optimizer((model,), options.optimizer)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = options.optimizer.learning_rate * rate_at((step + 0.5) / steps, options.optimizer.warmup)
        batch = sampler.draw(count, np.random.default_rng([options.seed, 4 + fold, step]))
        assert batch is not None
        batch = batch.to(options.device)
        with torch.autocast(options.device.split(":")[0], torch.bfloat16, enabled=options.precision == "bf16"):
            output = model.align(batch)
        config = options.loss
        loss = (
            smoothed_bce(output.ita, batch.ita.label, config.label_smoothing)
            + smoothed_bce(output.tia, batch.tia.label, config.label_smoothing)
        ) / 2
        loss = loss + config.contrastive * contrastive_loss(output.similarities, output.group)
        for gate in (output.ita_gate, output.tia_gate):
            loss = loss + config.balance * balance_loss(gate) + config.z * z_loss(gate)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), options.optimizer.clip)
        optimizer.step()
    return model.eval()


def train(options: TrainOptions, directory: Path, progress: Progress) -> dict[str, Any]:
    """Train, calibrate, measure, and write the package into `directory`; returns the metrics.

    Raises:
        InputError: the shard set cannot be trained on (see `open_corpus`), or the loss stopped being finite.
    """
    started = time.monotonic()
    corpus = open_corpus(options)
    trainer = Trainer(corpus, options, progress)
    steps = max(1, trainer.total // options.batch_size)
    # The alignment-only models depend on nothing that the main one learns: they are trained beside it, on the cores that it leaves free.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max(1, min(FOLDS, (os.cpu_count() or 1) // 2)), mp_context=context) as pool:
        paths = [directory / f"fold{fold}.safetensors" for fold in range(FOLDS)] if trainer.sampler is not None else []
        folds = [pool.submit(run_fold, options, fold, steps, path) for fold, path in enumerate(paths)]
        try:
            return _train(corpus, options, trainer, folds, directory, progress, started)
        except BaseException:
            for fold in folds:
                fold.cancel()
            raise


def run_fold(options: TrainOptions, fold: int, steps: int, path: Path) -> None:
    """In a process of its own: train the alignment-only model of a fold on one thread, and write it where there is one."""
    torch.set_num_threads(1)
    model = train_fold(open_corpus(options), options, fold, steps)
    if model is not None:
        save_tensors(path, dict(model.state_dict()))


def _train(
    corpus: Corpus,
    options: TrainOptions,
    trainer: Trainer,
    folds: list[Future[None]],
    directory: Path,
    progress: Progress,
    started: float,
) -> dict[str, Any]:
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
        for split in ("calibration", "test")
    }
    calibration = fit_platt(found["calibration"].labels, found["calibration"].logits)
    test = found["test"]
    metrics: dict[str, Any] = {
        "test": cvr_metrics(test, calibration, corpus.config.base_rate),
        "baselines": {"popularity": popularity_metrics(corpus, test)},
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
        for place, fold in enumerate(folds):
            progress("alignment models", place, FOLDS, "")
            fold.result()
        progress("alignment models", FOLDS, FOLDS, "")
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
    (directory / "features.json").write_text(corpus.space.to_json())
    (directory / "calibration.json").write_text(calibration.to_json())
    (directory / "metrics.json").write_text(json.dumps(metrics, indent=1, allow_nan=False))
    (directory / "retrieval.json").write_text(json.dumps(retrieval, indent=1))
    write_curves(directory / "curves.csv", state.curves)
    shutil.rmtree(trainer.checkpoint_path.parent, ignore_errors=True)
    return metrics


def popularity_metrics(corpus: Corpus, test: Predictions) -> dict[str, Any]:
    """The popularity baseline: listings by their orders before the session, calibrated by Platt like the model."""
    logits = {}
    labels = {}
    for split in ("calibration", "test"):
        tables = [pq.ParquetFile(path).read(columns=["item_orders", "label"]) for path, _ in corpus.files(split)]
        orders = np.concatenate([table["item_orders"].to_numpy() for table in tables])
        logits[split] = np.log1p(orders.astype(np.float64))
        labels[split] = np.concatenate([table["label"].to_numpy() for table in tables])
    calibration = fit_platt(labels["calibration"], logits["calibration"])
    return cvr_metrics(test.with_logits(logits["test"]), calibration, corpus.config.base_rate)


def write_curves(path: Path, curves: list[dict[str, float]]) -> None:
    """One CSV row per step; an empty cell where nothing was measured."""
    with path.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, fieldnames=list(curves[0]) if curves else ["step"])
        writer.writeheader()
        for row in curves:
            writer.writerow({name: "" if math.isnan(value) else f"{value:.6g}" for name, value in row.items()})
