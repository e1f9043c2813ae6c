"""The same data by other routes give the same shard set and a bitwise equal model.

The routes: one run, three nights with merged parts, other cuts of everything. Two processes and
Flink: test_runners.py.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from benchmarks.support.city import make_city
from benchmarks.support.stage_process import digest
from benchmarks.support.stub_encoders import stub_handler, stub_specs
from camenn_model.package import VERSIONED, read_package
from camenn_model.training import fit_counts
from camenn_model.training.corpus import TrainOptions
from camenn_model.training.train import train
from pipelines.embed import stage as embed_stage
from pipelines.embed.options import EmbedOptions
from pipelines.features.time_index import DAY_US
from pipelines.inputs import contents
from pipelines.runs import store as runs_store
from pipelines.runs.manifest import Manifest, read_latest
from pipelines.shards import sizes
from pipelines.shards import stage as shards_stage
from tests.pipelines.shards.test_examples import shard_options

LISTINGS, DAYS = 60, 12
NIGHTS = ((6, 30), (9, 45), (DAYS, LISTINGS))
"""(days of the log, listings of the catalog) by each night"""
TIMES = {"clicks": "clicked_at", "orders": "ordered_at"}
WRITTEN = ("curves.csv", "retrieval.json", *VERSIONED)
"""Files of a package; metrics.json, which has seconds too, is compared separately."""


@dataclass(frozen=True)
class City:
    """A city that grows: a listing is clicked only from the night on whose catalog has it."""

    root: Path

    @classmethod
    def make(cls, root: Path) -> "City":
        """Write what each night finds."""
        make_city(root / "city", LISTINGS, 2_000, 1, 40, DAYS)
        catalog = pq.read_table(root / "city" / "catalog.parquet")
        listed = catalog["item_id"].combine_chunks()
        edges = [0, *(rows for _, rows in NIGHTS)]
        since = np.repeat([0, *(days for days, _ in NIGHTS[:-1])], np.diff(edges))
        logs = {name: pq.read_table(root / "city" / name) for name in TIMES}
        first = pc.min(logs["clicks"]["clicked_at"].cast(pa.int64())).as_py() // DAY_US
        for number, (days, rows) in enumerate(NIGHTS):
            data = root / f"data-{number}"
            data.mkdir()
            # Photos lie beside the catalog, under addresses that begin there.
            (data / "images").symlink_to(root / "city" / "images")
            pq.write_table(catalog.slice(0, rows), data / "catalog.parquet")
            pq.write_table(pq.read_table(root / "city" / "users.parquet"), data / "users.parquet")
            for name, time in TIMES.items():
                day = logs[name][time].cast(pa.int64()).to_numpy() // DAY_US - first
                item = pc.index_in(logs[name]["item_id"], listed).to_numpy()
                pq.write_table(
                    logs[name].filter(pa.array((day < days) & (day >= since[item]))), data / f"{name}.parquet"
                )
        return cls(root)

    def night(self, number: int, route: str) -> None:
        """Embeddings and shards of one night's data."""
        data = str(self.root / f"data-{number}")
        # More features than listings: the order of sums affects directions that few listings determine.
        image, text = stub_specs((1, 96), (6, 64))
        embed_stage.run(
            EmbedOptions(
                data=data,
                store=str(self.root / route / "store"),
                image_root=data,
                allow_absolute=False,
                image=image,
                text=text,
                max_reject_rate=0.0,
            ),
            [],
            make_handler=stub_handler,
        )
        flags = {"attribution_hours": 12.0, "late_days": 0.5, "test_share": 0.25, "max_reject_rate": 0.0}
        options = shard_options(Path(data), self.root / route / "store", self.root / route / "shards", **flags)
        shards_stage.run(options, [])

    def published(self, route: str, output: str) -> Manifest:
        """A stage's."""
        manifest = read_latest(str(self.root / route / output))
        assert manifest is not None
        return manifest

    def train(self, route: str) -> dict[str, Any]:
        """The outputs of a training of a few steps."""
        options = TrainOptions(
            shards=str(self.root / route / "shards"),
            out=str(self.root / route / "model"),
            batch_size=64,
            evaluations=2,
            alignment_passes=2,
            choice_passes=1,
        )
        directory = Path(options.out)
        directory.mkdir()
        train(options, directory, lambda *_: None)
        metrics = json.loads((directory / "metrics.json").read_text())
        del metrics["seconds"], metrics["train"]["seconds"], metrics["train"]["examples_per_second"]
        return {
            "version": read_package(directory).version,
            "metrics": metrics,
            **{name: (directory / name).read_bytes() for name in WRITTEN},
        }


def by_route(city: City, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Build the last night's shard set by each route; returns their names."""
    last = len(NIGHTS) - 1
    city.night(last, "once")
    with monkeypatch.context() as patch:
        # Row groups of a part, files and user buckets as many as a large city has.
        patch.setattr(runs_store, "ROW_GROUP", 8)
        patch.setattr(contents, "CONTENT_FILE_BYTES", 10 * 2 * 96)
        patch.setattr(sizes, "ROWS_PER_BUCKET", 500)
        patch.setattr(sizes, "ROWS_PER_FILE", 20)
        city.night(last, "pieces")
    with monkeypatch.context() as patch:
        patch.setattr(runs_store, "SMALL_PARTS", 1)
        for number in range(len(NIGHTS)):
            city.night(number, "nights")
    return ["once", "pieces", "nights"]


def test_every_route_gives_the_same_shard_set_and_the_same_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    city = City.make(tmp_path)
    routes = by_route(city, monkeypatch)
    # The routes do differ: parts were merged, days kept, contents and examples are in other files.
    merged = Path(city.published("nights", "store").paths("image_embeddings")[0])
    assert json.loads(merged.with_suffix(".json").read_text())["replaces"]
    shards = {route: city.published(route, "shards") for route in routes}
    assert shards["nights"].summary["days_kept"] > 3
    for table in ("contents_images", "contents_titles", "examples"):
        lengths = {route: [record.rows for record in shards[route].records(table)] for route in routes}
        assert len({tuple(found) for found in lengths.values()}) == len(routes), table
        assert len({sum(found) for found in lengths.values()}) == 1, table
    assert len({digest(manifest) for manifest in shards.values()}) == 1
    monkeypatch.setattr(fit_counts, "EPOCHS", 2)
    once, *others = (city.train(route) for route in routes)
    for route, other in zip(routes[1:], others, strict=True):
        for name, value in once.items():
            assert other[name] == value, f"{name} of {route}"
