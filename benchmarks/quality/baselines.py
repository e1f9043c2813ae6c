"""Tuned baselines: common alternative models.

They are tuned by random search with the same number of trials each, on the same parts of the log
and the same as-of features.

`lightgbm` has every feature that CameNN has. `lightgbm_content` is the same with the pooled frozen
embeddings. `mmoe` is deepctr-torch's multi-gate mixture of experts, on the same with ids and pooled
embeddings. Its second task is whether the session has an order.

Each trial is judged by log loss on the early-stop part. The test part is opened once, by the best
trial.
"""

import contextlib
import io
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from benchmarks.baselines import feature_frame
from benchmarks.quality.job import TUNED
from camenn_model.data.batching import concat_rows
from camenn_model.data.examples import ExampleReader, Rows
from camenn_model.data.feature_space import FeatureSpace
from camenn_model.data.item_table import ItemTable
from camenn_model.data.shard_set import ShardSet
from camenn_model.evaluation.predictions import CALIBRATED_ON
from pipelines.io.files import write_json

Floats = NDArray[np.float64]
SPLITS = ("train", "early_stop", "calibration", "test")
CONTENT_DIMENSIONS = 64
"""Number of principal components of each modality's pooled embeddings in the baselines' features."""
ROUNDS, PATIENCE = 3_000, 60
EPOCHS = 3


@dataclass(frozen=True)
class Inputs:
    """Examples of each split, encoded, and their frames."""

    table: ItemTable
    space: FeatureSpace
    rows: dict[str, Rows]

    @classmethod
    def read(cls, shards: ShardSet, space: FeatureSpace, table: ItemTable, history: int, positions: int) -> "Inputs":
        """Read all splits."""
        reader = ExampleReader(space, table, shards.users, history, positions)
        rows = {split: concat_rows([reader.read(path) for path, _ in shards.examples(split)]) for split in SPLITS}
        return cls(table, space, rows)

    def latest(self, share: float) -> "Inputs":
        """Return the same with the latest training examples."""
        train = self.rows["train"]
        rows = np.argsort(train.start, kind="stable")[round((1 - share) * len(train)) :]
        return replace(self, rows=self.rows | {"train": train.take(rows)})

    def frame(self, split: str, *, content: NDArray[np.float32] | None = None, ids: bool = False) -> pd.DataFrame:
        """Return one split's features."""
        rows = self.rows[split]
        frame = feature_frame(rows, self.table, self.space, ids=ids)
        if content is not None:
            names = [f"content_{number}" for number in range(content.shape[1])]
            frame = pd.concat([frame, pd.DataFrame(content[rows.item], columns=names)], axis=1)
        return frame

    def labels(self, split: str) -> NDArray[np.float64]:
        """Return the labels, 0 or 1."""
        return self.rows[split].label.astype(np.float64)


def principal(values: NDArray[np.float16], fit: NDArray[np.bool_], dimensions: int) -> NDArray[np.float32]:
    """Return the first principal components of rows.

    They are fitted on some of the rows, and each has spread 1.
    """
    given = values.astype(np.float32)
    mean = given[fit].mean(axis=0)
    _, vectors = np.linalg.eigh(np.cov(given[fit], rowvar=False))
    projected = (given - mean) @ vectors[:, ::-1][:, :dimensions].astype(np.float32)
    return np.asarray(projected / np.maximum(projected[fit].std(axis=0), 1e-6), dtype=np.float32)


def content_features(table: ItemTable) -> NDArray[np.float32]:
    """Return principal components of photo and title.

    They are [N, 2·64] for the listings, and 0 where there is none.
    """
    pieces = []
    for pooled, row in ((table.pooled_images, table.image_row), (table.pooled_titles, table.title_row)):
        dimensions = min(CONTENT_DIMENSIONS, pooled.shape[1])
        found = principal(pooled, np.ones(len(pooled), dtype=bool), dimensions)
        pieces.append(np.where((row >= 0)[:, None], found[row], 0))
    return np.concatenate(pieces, axis=1)


def _draw_lightgbm(rng: np.random.Generator, first: bool) -> dict[str, Any]:
    if first:
        # The settings of benchmarks/baselines.py.
        return {
            "learning_rate": 0.03,
            "num_leaves": 31,
            "min_data_in_leaf": 100,
            "feature_fraction": 0.7,
            "bagging_fraction": 0.8,
            "lambda_l1": 0.0,
            "lambda_l2": 0.0,
            "max_cat_threshold": 16,
            "cat_smooth": 50.0,
            "ids": False,
        }

    def log_uniform(low: float, high: float) -> float:
        return float(np.exp(rng.uniform(np.log(low), np.log(high))))

    return {
        "learning_rate": log_uniform(0.01, 0.15),
        "num_leaves": int(rng.choice((7, 15, 31, 63, 127))),
        "min_data_in_leaf": int(log_uniform(10, 1_000)),
        "feature_fraction": float(rng.uniform(0.3, 1.0)),
        "bagging_fraction": float(rng.uniform(0.5, 1.0)),
        "lambda_l1": log_uniform(1e-3, 30),
        "lambda_l2": log_uniform(1e-3, 30),
        "max_cat_threshold": int(rng.choice((8, 16, 32, 64))),
        "cat_smooth": log_uniform(1, 200),
        "ids": bool(rng.random() < 0.3),
    }


def _try_lightgbm(
    inputs: Inputs,
    content: NDArray[np.float32] | None,
    given: dict[str, Any],
    seed: int,
    threads: int,
    columns: list[str] | None = None,
) -> tuple[float, Callable[[str], Floats]]:
    import lightgbm

    def frame(split: str) -> pd.DataFrame:
        every = inputs.frame(split, content=content, ids=given["ids"])
        return every if columns is None else every[columns]

    parameters = {name: value for name, value in given.items() if name != "ids"} | {
        "objective": "binary",
        "metric": "binary_logloss",
        "bagging_freq": 1,
        "verbosity": -1,
        "seed": seed,
        "deterministic": True,
        "force_row_wise": True,
        "num_threads": threads,
    }
    frames = {split: frame(split) for split in SPLITS[:2]}
    train = lightgbm.Dataset(frames["train"], inputs.labels("train"), free_raw_data=False)
    stop = train.create_valid(frames["early_stop"], inputs.labels("early_stop"))
    booster = lightgbm.train(
        parameters, train, ROUNDS, valid_sets=[stop], callbacks=[lightgbm.early_stopping(PATIENCE, verbose=False)]
    )
    loss = float(booster.best_score["valid_0"]["binary_logloss"])

    def raw(split: str) -> Floats:
        return np.asarray(booster.predict(frame(split), raw_score=True))

    return loss, raw


PLAIN = [
    f"{key}_{count}" for key in ("item", "pair", "store_item", "user_subcategory") for count in ("clicks", "orders")
] + ["user_clicks_per_day", "user_orders_per_day"]
"""As-of counts that anybody's first attempt has"""


def _draw_plain(rng: np.random.Generator, first: bool) -> dict[str, Any]:
    return {"learning_rate": 0.1, "num_leaves": 63, "ids": False}


def _draw_mmoe(rng: np.random.Generator, first: bool) -> dict[str, Any]:
    if first:
        # deepctr-torch's own defaults.
        return {
            "num_experts": 3,
            "expert_dnn_hidden_units": (256, 128),
            "gate_dnn_hidden_units": (64,),
            "tower_dnn_hidden_units": (64,),
            "l2_reg_embedding": 1e-5,
            "dnn_dropout": 0.0,
            "embedding": 8,
            "learning_rate": 1e-3,
            "batch_size": 256,
        }
    return {
        "num_experts": int(rng.choice((2, 3, 4, 8))),
        "expert_dnn_hidden_units": [(64,), (128, 64), (256, 128), (256, 128, 64)][rng.integers(4)],
        "gate_dnn_hidden_units": [(), (64,)][rng.integers(2)],
        "tower_dnn_hidden_units": [(32,), (64,), (128, 64)][rng.integers(3)],
        "l2_reg_embedding": float(np.exp(rng.uniform(np.log(1e-6), np.log(1e-3)))),
        "dnn_dropout": float(rng.choice((0.0, 0.1, 0.2, 0.3, 0.5))),
        "embedding": int(rng.choice((4, 8, 16))),
        "learning_rate": float(np.exp(rng.uniform(np.log(1e-4), np.log(5e-3)))),
        "batch_size": int(rng.choice((128, 256, 512, 1024))),
    }


def _mmoe_columns(frame: pd.DataFrame) -> dict[str, NDArray[Any]]:
    """Return a frame's columns as MMoE takes them.

    Codes are unchanged. Missing numbers become 0, with an indicator column where some are missing.
    """
    columns: dict[str, NDArray[Any]] = {}
    for name in frame:
        if isinstance(frame[name].dtype, pd.CategoricalDtype):
            columns[name] = frame[name].cat.codes.to_numpy().astype(np.int64)
        else:
            values = frame[name].to_numpy(dtype=np.float32)
            columns[name] = np.nan_to_num(values)
            columns[f"{name}_missing"] = np.isnan(values).astype(np.float32)
    return columns


def mmoe_model(frame: pd.DataFrame, given: dict[str, Any], seed: int) -> Any:
    """Build deepctr-torch's MMoE for a frame's columns."""
    import torch
    from deepctr_torch.inputs import DenseFeat, SparseFeat
    from deepctr_torch.models.multitask import MMOE

    torch.manual_seed(seed)
    columns = [
        SparseFeat(name, max(2, len(frame[name].cat.categories)), embedding_dim=given["embedding"])
        if isinstance(frame[name].dtype, pd.CategoricalDtype)
        else DenseFeat(name, 1)
        for name in frame
    ] + [DenseFeat(f"{name}_missing", 1) for name in frame if not isinstance(frame[name].dtype, pd.CategoricalDtype)]
    names = ("num_experts", "expert_dnn_hidden_units", "gate_dnn_hidden_units", "tower_dnn_hidden_units")
    model = MMOE(
        columns,
        task_types=["binary", "binary"],
        task_names=["order", "session_order"],
        l2_reg_embedding=given["l2_reg_embedding"],
        dnn_dropout=given["dnn_dropout"],
        seed=seed,
        device="cpu",
        **{name: given[name] for name in names},
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=given["learning_rate"])
    model.compile(optimizer, loss=["binary_crossentropy"] * 2, metrics=[])
    return model


def mmoe_data(inputs: Inputs, frame: pd.DataFrame) -> tuple[dict[str, NDArray[Any]], NDArray[np.float32]]:
    """Return MMoE's columns and targets of the training examples."""
    train = inputs.rows["train"]
    ordered = np.bincount(train.session, weights=train.label) > 0
    return _mmoe_columns(frame), np.stack([train.label, ordered[train.session]], axis=1).astype(np.float32)


def _try_mmoe(
    inputs: Inputs, content: NDArray[np.float32] | None, given: dict[str, Any], seed: int, threads: int
) -> tuple[float, Callable[[str], Floats]]:
    import torch

    torch.set_num_threads(threads)
    frame = inputs.frame("train", content=content, ids=True)
    model = mmoe_model(frame, given, seed)
    columns, targets = mmoe_data(inputs, frame)
    cache: dict[str, dict[str, NDArray[Any]]] = {"train": columns}

    def raw(split: str) -> Floats:
        if split not in cache:
            cache[split] = _mmoe_columns(inputs.frame(split, content=content, ids=True))
        p = np.clip(model.predict(cache[split], batch_size=4_096)[:, 0].astype(np.float64), 1e-7, 1 - 1e-7)
        return np.log(p) - np.log1p(-p)

    best, kept = np.inf, None
    labels = inputs.labels("early_stop")
    for _ in range(EPOCHS):
        # One epoch per call, so that the weights of the best one are kept.
        with contextlib.redirect_stdout(io.StringIO()):
            # It prints its device and sizes even so.
            model.fit(cache["train"], targets, batch_size=given["batch_size"], epochs=1, verbose=0)
        logits = raw("early_stop")
        loss = float(np.mean(np.logaddexp(0, logits) - labels * logits))
        if loss >= best:
            break
        best, kept = loss, {name: value.clone() for name, value in model.state_dict().items()}
    assert kept is not None
    model.load_state_dict(kept)
    return best, raw


def draw_settings(name: str) -> dict[str, Any]:
    """Return a baseline's own defaults, the first that are tried."""
    return DRAW[name](np.random.default_rng(0), True)


DRAW = {
    "lightgbm": _draw_lightgbm,
    "lightgbm_content": _draw_lightgbm,
    "lightgbm_plain": _draw_plain,
    "mmoe": _draw_mmoe,
}
TRY: dict[str, Callable[..., tuple[float, Callable[[str], Floats]]]] = {
    "lightgbm": _try_lightgbm,
    "lightgbm_content": _try_lightgbm,
    "lightgbm_plain": partial(_try_lightgbm, columns=PLAIN),
    "mmoe": _try_mmoe,
}
WITH_CONTENT = ("lightgbm_content", "mmoe")


def tune(
    name: str,
    inputs: Inputs,
    trials: int,
    seed: int,
    threads: int,
    kept: Path,
    log: Callable[[str], None],
    settings: dict[str, Any] | None = None,
    share: float = 1.0,
) -> tuple[dict[str, Floats], dict[str, Any]]:
    """Tune a baseline and return its best raw scores.

    Returns (raw scores, trials). The scores are of the parts that models are calibrated on and of
    test, by the best of `trials`, or by given settings. With a `share` below 1 the trials are fitted
    on the latest part of the training examples, and the best settings then on all of them.

    Trials are written to `kept` one by one, and those recorded there are not repeated.
    """
    rng = np.random.default_rng([seed, 19])
    content = content_features(inputs.table) if name in WITH_CONTENT else None
    trials = trials if name in TUNED else 1
    drawn = [settings] if settings is not None else [DRAW[name](rng, number == 0) for number in range(trials)]
    tried: list[dict[str, Any]] = json.loads(kept.read_text()) if kept.exists() else []
    best_loss, best = min((trial["early_stop_log_loss"] for trial in tried), default=np.inf), None
    share = 1.0 if len(drawn) == 1 else share
    few = inputs if share == 1.0 else inputs.latest(share)
    for number in range(len(tried), len(drawn)):
        started = time.monotonic()
        loss, raw = TRY[name](few, content, drawn[number], seed, threads)
        tried.append({**drawn[number], "early_stop_log_loss": loss, "seconds": round(time.monotonic() - started, 1)})
        write_json(str(kept), tried)
        if loss < best_loss:
            best_loss, best = loss, raw if share == 1.0 else None
        log(f"{name} trial {number + 1}/{len(drawn)}: {loss:.5f}, best {best_loss:.5f}, {tried[-1]['seconds']} s")
    found = drawn[int(np.argmin([trial["early_stop_log_loss"] for trial in tried]))]
    if best is None:
        # Another process ran the best trial, or the trials were fitted on fewer examples.
        best_loss, best = TRY[name](inputs, content, found, seed, threads)
    raw_scores = {split: best(split) for split in (*CALIBRATED_ON, "test")}
    return raw_scores, {"settings": found, "trials": tried, "early_stop_log_loss": best_loss}
