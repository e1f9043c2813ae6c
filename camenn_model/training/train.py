"""Train CameNN on a shard set and write its package."""

import csv
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from camenn_model.data.shard_set import ShardSet
from camenn_model.evaluation.predictions import CALIBRATED_ON, Predictions, calibrate, cvr_metrics, predict, reliability
from camenn_model.evaluation.representation import representation
from camenn_model.tensors import save_tensors
from camenn_model.training.checkpoints import Checkpoints
from camenn_model.training.corpus import Corpus, Progress, TrainOptions, open_corpus
from camenn_model.training.distributed import Processes
from camenn_model.training.trainer import Trainer


def train(
    options: TrainOptions,
    directory: Path,
    progress: Progress,
    processes: Processes | None = None,
    *,
    shards: ShardSet | None = None,
    checkpoints: Checkpoints | None = None,
) -> dict[str, Any]:
    """Train CameNN and write the package into `directory`.

    It trains, calibrates, measures, and writes. Of several processes only the first one does all of
    it. The others take part in the steps, and return {}.

    Args:
        options: of the run.
        directory: that the package is written to.
        progress: is told of every step.
        processes: of which this one is one. None = it is alone.
        shards: the shard set. None = that of `options.shards`, on this machine.
        checkpoints: where the training goes on. None = those in `options.out`, on this machine.

    Returns:
        The metrics.

    Raises:
        InputError: the shard set cannot be trained on (see `open_corpus`), or the loss stopped
            being finite.
    """
    started = time.monotonic()
    corpus = open_corpus(options, shards)
    trainer = Trainer(corpus, options, progress, processes, checkpoints)
    if not trainer.processes.first:
        trainer.run()
        return {}
    trainer.run()
    model, state = trainer.model, trainer.state

    def report(split: str) -> Callable[[int, int], None]:
        return lambda done, total: progress(f"measure {split}", done, total, "")

    found = {
        split: predict(
            model,
            corpus.reader,
            corpus.table,
            corpus.blocks(split),
            report(split),
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
            "batch_size": trainer.batch_size,
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
    }
    (directory / "config.json").write_text(json.dumps(meta, indent=1, sort_keys=True))
    corpus.space.write(directory)
    (directory / "calibration.json").write_text(calibration.to_json())
    (directory / "metrics.json").write_text(json.dumps(metrics, indent=1, allow_nan=False))
    (directory / "retrieval.json").write_text(json.dumps(retrieval, indent=1))
    write_curves(directory / "curves.csv", state.curves)
    trainer.checkpoints.finished()
    return metrics


def popularity(corpus: Corpus, split: str) -> NDArray[np.float64]:
    """Return the popularity logit of each example, [n].

    It is log(1 + orders of the listing before the session), for the examples of a split.
    """
    files = [pq.ParquetFile(path).read(columns=["item_orders"]) for path, _ in corpus.files(split)]
    return np.log1p(np.concatenate([table["item_orders"].to_numpy() for table in files]).astype(np.float64))


def popularity_metrics(corpus: Corpus, found: dict[str, Predictions]) -> dict[str, Any]:
    """Measure the popularity baseline, calibrated like the model.

    It scores listings by their orders before the session. `found` holds predictions of the same
    examples.
    """
    popular = {split: predictions.with_logits(popularity(corpus, split)) for split, predictions in found.items()}
    return cvr_metrics(popular["test"], calibrate(popular), corpus.config.base_rate)


def write_curves(path: Path, curves: list[dict[str, float]]) -> None:
    """Write one CSV row per step.

    A cell is empty where nothing was measured.
    """
    with path.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, fieldnames=list(curves[0]) if curves else ["step"])
        writer.writeheader()
        for row in curves:
            writer.writerow({name: "" if math.isnan(value) else f"{value:.6g}" for name, value in row.items()})
