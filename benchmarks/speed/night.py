"""The cost of a night after the first.

    python -m benchmarks.speed.night --image_weights inception_v4_grocery.safetensors --text_encoder MINILM --work DIR

On the second night a hundredth of the catalog has changed, photos as well as titles, and there is
one more day of logs. It is measured stage by stage, each in a process of its own as `camenn
nightly` starts it.

The city is drawn, the encoders are real. Listings of a city share photos, so the changed ones are
those that show every hundredth photo. Training is left out of both nights: the model has initial
weights, which score as fast as trained ones.

Every second night starts from the first one's outputs (hard links). Seconds are a stage's wall time
with the start of its process. Scoring rescores every pair each night. The last line of stdout is
one JSON object.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from benchmarks.support.command import CAMENN, machine, progress_log, work_directory
from benchmarks.support.processes import run_watched
from benchmarks.support.stage_process import write_untrained_model
from pipelines.runs.manifest import read_latest
from pipelines.stages import OUTPUT_FOLDERS
from schemas.catalog import CATALOG
from schemas.contract import conform
from simulator.config import CityConfig
from simulator.generate import generate_city

log = progress_log("night")

CHANGED = 0.01


def write_night(city: Path, data: Path, *, second: bool) -> dict[str, int]:
    """Write the tables of a night into `data`.

    Its photos are those of the city. The first night has the log without its last day. The second
    has all of it, and some listings changed.
    """
    data.mkdir(exist_ok=True)
    if not (data / "images").exists():
        shutil.copytree(city / "images", data / "images", copy_function=os.link)
    rows = {}
    days = pc.floor_temporal(pq.read_table(city / "clicks.parquet", columns=["clicked_at"])["clicked_at"], unit="day")
    last = pc.max(days)
    for name, column in (("clicks", "clicked_at"), ("orders", "ordered_at")):
        table = pq.read_table(city / f"{name}.parquet")
        # Orders follow their click: those of the log's last minutes fall after its last day.
        table = table if second else table.filter(pc.less(table[column], last))
        rows[name] = table.num_rows
        pq.write_table(table, data / f"{name}.parquet", row_group_size=65_536)
    for name in ("users", "stores"):
        shutil.copy(city / f"{name}.parquet", data / f"{name}.parquet")
    listings = pq.read_table(city / "catalog.parquet").to_pylist()
    photos = {row["image_uri"] for row in listings if row["image_uri"]}
    retaken = set(sorted(photos)[:: round(1 / CHANGED)]) if second else set()
    changed = [row for row in listings if row["image_uri"] in retaken]
    for row in changed:
        row["title"] = f"{row['title'] or ''} new"
        photo = city / row["image_uri"]
        path = data / "images" / f"changed-{photo.name}"
        path.write_bytes(photo.read_bytes() + b"changed")
        row["image_uri"] = f"images/{path.name}"
    table = conform(pa.Table.from_pylist(listings, schema=CATALOG.schema), CATALOG, "catalog")
    pq.write_table(table, data / "catalog.parquet", row_group_size=8_192)
    return rows | {"listings": len(listings), "photos": len(photos), "changed": len(changed), "retaken": len(retaken)}


def run_night(data: Path, work: Path, arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Run embed, shards and score of one night.

    Returns each one's seconds and closing table. A model is written in between, if there is none.
    """
    found = {}
    for stage, flags in (
        (
            "embed",
            [
                *("--image_root", str(data), "--image_weights", arguments.image_weights),
                *("--text_encoder", arguments.text_encoder, "--store", str(work / "store")),
            ],
        ),
        ("shards", ["--store", str(work / "store"), "--out", str(work / "shards")]),
        (
            "score",
            ["--store", str(work / "store"), "--model", str(work / "model"), "--out", str(work / "scores"), "--rerun"],
        ),
    ):
        if stage == "score" and read_latest(str(work / "model")) is None:
            write_untrained_model(str(work / "shards"), str(work / "model"), 0)
        command = [*CAMENN, stage, "--data", str(data)]
        started = time.monotonic()
        text, _ = run_watched([*command, *flags, "--json"], standing=False, timeout=arguments.timeout)
        seconds = time.monotonic() - started
        found[stage] = {"wall_seconds": seconds, **json.loads(text.strip().splitlines()[-1])}
        log(f"{stage}: {seconds:.1f} s")
    return found


def measure(work: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure the first night once, and some second nights."""
    city, data = work / "city", work / "data"
    log(f"a city of {arguments.items:,} listings and about {arguments.clicks:,} clicks")
    generate_city(
        city,
        CityConfig(
            listings=arguments.items,
            clicks=arguments.clicks,
            photos=arguments.photos,
            stores=max(2, arguments.items // 100),
            users=max(20, arguments.clicks // 130),
            days=arguments.days,
        ),
    )
    for name in ("data", "first", "second"):
        shutil.rmtree(work / name, ignore_errors=True)
    rows = {"first": write_night(city, data, second=False)}
    first = run_night(data, work / "first", arguments)
    rows["second"] = write_night(city, data, second=True)
    nights = []
    for number in range(arguments.repeats):
        log(f"second night {number + 1}/{arguments.repeats}")
        shutil.rmtree(work / "second", ignore_errors=True)
        for name in OUTPUT_FOLDERS.values():
            shutil.copytree(work / "first" / name, work / "second" / name, copy_function=os.link)
        nights.append(run_night(data, work / "second", arguments))
    seconds = {
        stage: (first[stage]["wall_seconds"], statistics.median(night[stage]["wall_seconds"] for night in nights))
        for stage in first
    }
    return {
        "embed": {
            "seconds": round(seconds["embed"][1], 1),
            "limit": round(0.03 * seconds["embed"][0] + 10, 1),
            "encoded": nights[-1]["embed"]["encoded_images"] + nights[-1]["embed"]["encoded_titles"],
        },
        "shards_ratio": round(seconds["shards"][1] / seconds["shards"][0], 3),
        "score": {"pairs": nights[-1]["score"]["pairs"], "first_night_pairs": first["score"]["pairs"]},
        "seconds": {
            stage: {"first": round(whole, 1), "second": round(again, 1)} for stage, (whole, again) in seconds.items()
        },
        "days_built": nights[-1]["shards"]["days_built"],
        "rows": rows,
    }


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the flags."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed.night", description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("--image_weights", required=True, help="as of `camenn embed`")
    parser.add_argument("--text_encoder", required=True, help="as of `camenn embed`")
    parser.add_argument("--items", type=int, default=20_000, help="listings of the city (default %(default)s)")
    parser.add_argument("--clicks", type=int, default=300_000, help="clicks of the city (default %(default)s)")
    parser.add_argument("--photos", type=int, default=4_000, help="different photos of the city (default %(default)s)")
    parser.add_argument("--days", type=int, default=56, help="days of the log (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="second nights (default %(default)s)")
    parser.add_argument("--work", type=Path, help="directory that keeps the city (default: a temporary one)")
    parser.add_argument("--timeout", type=float, default=7_200, help="seconds after which a stage is ended")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Measure, and print one JSON line."""
    arguments = build_parser().parse_args(argv)
    with work_directory(arguments.work, "night") as work:
        found = measure(work.absolute(), arguments)
    print(json.dumps(found | {"repeats": arguments.repeats, **machine()}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
