"""Logs that quality is measured on.

They are simulated cities with known truth, or a real data directory. Each is embedded and sharded
once.

`python -m benchmarks.quality.worlds WORLD` prepares a JSON world.
"""

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from benchmarks.support.command import CAMENN
from benchmarks.support.processes import Children
from simulator.config import preset_config
from simulator.generate import generate_city

TEXT_TOKENS, GRID = 16, 4


@dataclass(frozen=True, kw_only=True)
class World:
    """One log.

    `city` has the fields of the simulator's configuration that differ from the preset's. None means
    an existing data directory.
    """

    name: str
    work: str
    preset: str = "default"
    city: dict[str, Any] | None = None
    data_directory: str | None = None
    image_root: str | None = None
    image_weights: str = ""
    text_encoder: str = ""
    flags: dict[str, list[str]] = field(default_factory=dict)
    """Additional flags of a stage"""

    @property
    def directory(self) -> Path:
        """Return the directory of the whole world."""
        return Path(self.work) / "worlds" / self.name

    @property
    def data(self) -> Path:
        """Return the directory of the tables."""
        return Path(self.data_directory) if self.data_directory else self.directory / "data"

    @property
    def shards(self) -> str:
        """Return the path of the shard set."""
        return str(self.directory / "shards")

    @property
    def truth(self) -> Path | None:
        """Return the directory of known truth (real log: None)."""
        return self.data / "truth" if self.city is not None else None

    def prepare(self) -> None:
        """Simulate, embed and shard.

        Each does nothing where neither its inputs nor its flags changed.
        """
        if self.city is not None:
            generate_city(self.data, preset_config(self.preset, self.city))
        store = self.directory / "store"
        images = ["--image_root", self.image_root] if self.image_root else []
        _camenn(
            "embed",
            "--data",
            str(self.data),
            "--store",
            str(store),
            "--image_weights",
            self.image_weights,
            "--text_encoder",
            self.text_encoder,
            "--grid",
            str(GRID),
            "--max_tokens",
            str(TEXT_TOKENS),
            *images,
            *self.flags.get("embed", []),
        )
        _camenn(
            "shards",
            "--data",
            str(self.data),
            "--store",
            str(store),
            "--out",
            self.shards,
            *self.flags.get("shards", []),
        )


def _camenn(*flags: str) -> None:
    """Run one stage in a process of its own."""
    command = [*CAMENN, *flags]
    with Children() as children:
        if status := children.run(command):
            raise subprocess.CalledProcessError(status, command)


@dataclass(frozen=True)
class Truth:
    """The truth of some examples.

    The fields are [n] each, in the examples' order.
    """

    p_order: np.ndarray
    """Probability of an order after the click, float64"""
    uniform: np.ndarray
    """True where the session was shown listings at random, bool"""
    cold: np.ndarray
    """True where the listing first appears in the test days, bool"""
    image_ok: np.ndarray
    text_ok: np.ndarray
    mismatched: np.ndarray
    ladder: dict[str, dict[str, float]]
    """Expected AUC ladder (`simulator.truth`), of these examples and of all of the simulator's strata"""


KEY = ["user_id", "session_id", "item_id"]


def read_keys(files: list[tuple[str, int]]) -> pd.DataFrame:
    """Read keys of files' examples, in their order."""
    return pd.concat([pq.ParquetFile(path).read(columns=KEY).to_pandas() for path, _ in files], ignore_index=True)


def read_truth(world: World, keys: pd.DataFrame) -> Truth:
    """Read the truth of examples.

    Raises:
        ValueError: an example that is unknown to the simulator.
    """
    assert world.truth is not None
    clicks = pq.read_table(
        world.data / "clicks.parquet", columns=["exposure_id", "user_id", "session_id", "item_id"]
    ).to_pandas()
    names = ["exposure_id", "p_order", "uniform", "cold_start", "image_ok", "text_ok", "mismatched"]
    truth = pq.read_table(world.truth / "clicks.parquet", columns=names).to_pandas()
    joined = clicks.merge(truth, on="exposure_id", validate="one_to_one")
    joined["no_order"] = 1 - joined["p_order"]
    # Clicks of a session on one listing are one example: it has an order unless none of them has one.
    of = {"no_order": "prod"} | dict.fromkeys(names[2:], "first")
    found = keys.merge(joined.groupby(KEY, as_index=False).agg(of), on=KEY, how="left", validate="many_to_one")
    if found["no_order"].isna().any():
        raise ValueError(
            f"{world.name}: {int(found['no_order'].isna().sum())} examples are not among the simulator's clicks"
        )
    return Truth(
        p_order=1 - found["no_order"].to_numpy(dtype=np.float64),
        uniform=found["uniform"].to_numpy(dtype=bool),
        cold=found["cold_start"].to_numpy(dtype=bool),
        image_ok=found["image_ok"].to_numpy(dtype=bool),
        text_ok=found["text_ok"].to_numpy(dtype=bool),
        mismatched=found["mismatched"].to_numpy(dtype=bool),
        ladder=json.loads((world.truth / "ladder.json").read_text()),
    )


def main(argv: list[str] | None = None) -> int:
    """Prepare the world of the first argument."""
    World(**json.loads((sys.argv[1:] if argv is None else argv)[0])).prepare()
    return 0


if __name__ == "__main__":
    sys.exit(main())
