"""Train and save after every step, as a process that a test can kill: SHARDS OUT."""

import sys
from pathlib import Path

import torch

from camenn_model.training.corpus import TrainOptions
from camenn_model.training.train import train


def main(shards: str, out: str) -> None:
    """The package goes to OUT/package."""
    torch.set_num_threads(1)
    directory = Path(out) / "package"
    directory.mkdir(parents=True, exist_ok=True)
    options = TrainOptions(shards=shards, out=out, batch_size=32, epochs=2, checkpoint_seconds=0.0)
    train(options, directory, lambda *_: None)


if __name__ == "__main__":
    main(*sys.argv[1:])
