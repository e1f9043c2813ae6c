"""Training rates of common peers on a shard set.

    python -m benchmarks.support.peer_rates JOB

JOB is JSON with `shards`. The last line of stdout has the examples that each peer trains in a CPU
second: LightGBM in a whole fit with early stop, deepctr-torch's MMoE in one epoch with its
defaults.
"""

import json
import sys
import time
from typing import Any

import numpy as np
import torch

from benchmarks.baselines import PARAMETERS, PATIENCE, ROUNDS
from benchmarks.quality.baselines import Inputs, content_features, draw_settings, mmoe_data, mmoe_model
from camenn_model.training.corpus import TrainOptions, open_corpus


def lightgbm_rate(inputs: Inputs) -> float:
    """Measure LightGBM's training examples a CPU second."""
    import lightgbm

    frames = {split: inputs.frame(split) for split in ("train", "early_stop")}
    started = time.process_time()
    train = lightgbm.Dataset(frames["train"], inputs.labels("train"))
    stop = train.create_valid(frames["early_stop"], inputs.labels("early_stop"))
    lightgbm.train(
        PARAMETERS | {"num_threads": 1},
        train,
        ROUNDS,
        valid_sets=[stop],
        callbacks=[lightgbm.early_stopping(PATIENCE, verbose=False)],
    )
    return len(frames["train"]) / (time.process_time() - started)


def mmoe_rate(inputs: Inputs) -> float:
    """Measure deepctr-torch's MMoE: examples a CPU second of one epoch."""
    settings: dict[str, Any] = draw_settings("mmoe")
    frame = inputs.frame("train", content=content_features(inputs.table), ids=True)
    columns, targets = mmoe_data(inputs, frame)
    model = mmoe_model(frame, settings, seed=0)
    started = time.process_time()
    model.fit(columns, targets, batch_size=settings["batch_size"], epochs=1, verbose=0)
    return len(frame) / (time.process_time() - started)


def main() -> None:
    """Measure both peers."""
    torch.set_num_threads(1)
    corpus = open_corpus(TrainOptions(shards=json.loads(sys.argv[1])["shards"], out=""))
    config = corpus.config
    inputs = Inputs.read(corpus.shards, corpus.space, corpus.table, config.history_length, config.position_size)
    found = {"lightgbm": lightgbm_rate(inputs), "mmoe": mmoe_rate(inputs)}
    print(json.dumps({name: round(float(np.float64(rate)), 1) for name, rate in found.items()}), flush=True)


if __name__ == "__main__":
    main()
