"""LightGBM on the same as-of features, as a baseline.

It is a common alternative, on the same as-of features and the same parts of the log, with the same
metrics.

The command reads a shard set and a trained package, and writes the package's metrics with
`baselines.lightgbm` added. It needs the extra `baselines`.
"""

import argparse
import json
import os
import sys
import time
from typing import Any

import numpy as np
import pandas as pd

from camenn_model.calibration import fit_platt
from camenn_model.data.batching import concat_rows
from camenn_model.data.examples import ExampleReader, Rows
from camenn_model.data.feature_space import FeatureSpace
from camenn_model.data.item_table import ItemTable
from camenn_model.data.shard_set import ShardSet
from camenn_model.evaluation.predictions import Predictions, cvr_metrics
from camenn_model.package import open_package
from pipelines.io.files import write_document

PARAMETERS = {
    "objective": "binary",
    "metric": "binary_logloss",
    "learning_rate": 0.03,
    "num_leaves": 31,
    "min_data_in_leaf": 100,
    "feature_fraction": 0.7,
    "bagging_fraction": 0.8,
    "bagging_freq": 1,
    "max_cat_threshold": 16,
    "cat_smooth": 50.0,
    "verbosity": -1,
    "seed": 0,
    "deterministic": True,
    "force_row_wise": True,
}
ROUNDS, PATIENCE = 2_000, 50


def feature_frame(rows: Rows, table: ItemTable, space: FeatureSpace, *, ids: bool = False) -> pd.DataFrame:
    """Return every scalar that CameNN reads of an example.

    The columns are codes and normalised values. Missing numbers are NaN. Hashed ids are included
    only on request, as trees overfit them.
    """
    sizes = {field.name: field.size for field in space.fields}
    item_names = [field.name for field in space.fields if field.group == "item"]
    audience_names = [field.name for field in space.fields if field.group == "audience"]
    columns: dict[str, Any] = {}
    for names, cats in ((item_names, table.cats[rows.item]), (audience_names, rows.audience_cats)):
        for place, name in enumerate(names):
            if ids or name not in space.ids:
                columns[name] = pd.Categorical(cats[:, place], categories=range(sizes[name]))
    numbers = (
        (("item_numeric", "item_quality"), table.values[rows.item], table.buckets[rows.item]),
        (("audience_counts",), rows.audience_values, rows.audience_buckets),
        (("item_counts", "pair_counts"), rows.values, rows.buckets),
    )
    for groups, values, buckets in numbers:
        names = [field.name for group in groups for field in space.fields if field.group == group]
        for place, name in enumerate(names):
            columns[name] = np.where(buckets[:, place] == 0, np.nan, values[:, place])
    columns["history_purchases"] = (rows.history.kind == 2).sum(axis=1)[rows.session]
    columns["history_clicks"] = (rows.history.kind == 1).sum(axis=1)[rows.session]
    return pd.DataFrame(columns)


def run(shards_root: str, model_root: str) -> dict[str, Any]:
    """Fit LightGBM and measure it on the test part.

    It is fitted on train, stopped on early_stop, calibrated on calibration and measured on test.
    """
    import lightgbm

    package = open_package(model_root)
    shards = ShardSet(shards_root)
    table = ItemTable(shards.items, shards.images, shards.titles).encode(package.space)
    reader = ExampleReader(
        package.space, table, shards.users, package.config.history_length, package.config.position_size
    )
    parts = {
        split: concat_rows([reader.read(path) for path, _ in shards.examples(split)])
        for split in ("train", "early_stop", "calibration", "test")
    }
    frames = {split: feature_frame(rows, table, package.space) for split, rows in parts.items()}
    started = time.monotonic()
    train = lightgbm.Dataset(frames["train"], parts["train"].label, free_raw_data=False)
    stop = train.create_valid(frames["early_stop"], parts["early_stop"].label)
    booster = lightgbm.train(
        PARAMETERS | {"num_threads": os.cpu_count() or 1},
        train,
        ROUNDS,
        valid_sets=[stop],
        callbacks=[lightgbm.early_stopping(PATIENCE, verbose=False)],
    )
    seconds = time.monotonic() - started
    raw = {split: np.asarray(booster.predict(frames[split], raw_score=True)) for split in ("calibration", "test")}
    calibration = fit_platt(parts["calibration"].label, raw["calibration"])
    test = parts["test"]
    _, user = np.unique(test.user, return_inverse=True)
    found = Predictions(raw["test"], test.label.astype(np.float64), user.astype(np.int64), test.session)
    return cvr_metrics(found, calibration, package.config.base_rate) | {
        "rounds": booster.best_iteration,
        "features": frames["train"].shape[1],
        "seconds": round(seconds, 1),
    }


def main(argv: list[str] | None = None) -> int:
    """Parse, run, write, and print one JSON line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.baselines", description=__doc__.splitlines()[0])
    parser.add_argument("--shards", required=True, help="shard set that `camenn shards` wrote")
    parser.add_argument("--model", required=True, help="model directory that `camenn train` wrote")
    parser.add_argument(
        "--out", required=True, help="metrics.json to write: the package's metrics with baselines.lightgbm"
    )
    arguments = parser.parse_args(argv)
    metrics = dict(open_package(arguments.model).metrics)
    metrics["baselines"] = metrics["baselines"] | {"lightgbm": run(arguments.shards, arguments.model)}
    write_document(arguments.out, metrics)
    lines = {
        name: {key: figures[key] for key in ("auc", "gauc", "log_loss", "ne", "pcoc")}
        for name, figures in {"camenn": metrics["test"], **metrics["baselines"]}.items()
    }
    print_table(lines)
    print(json.dumps(lines))
    return 0


def print_table(lines: dict[str, dict[str, float]]) -> None:
    """Print model and baselines side by side, to stderr."""
    print(
        f"\n{'test part':<12}" + "".join(f"{name:>10}" for name in ("auc", "gauc", "log_loss", "ne", "pcoc")),
        file=sys.stderr,
    )
    for name, figures in lines.items():
        print(
            f"{name:<12}"
            + "".join(f"{value:>10.4f}" if value is not None else f"{'-':>10}" for value in figures.values()),
            file=sys.stderr,
        )
    print(file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
