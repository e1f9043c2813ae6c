"""The cost of a further day to `camenn shards`.

    python -m benchmarks.speed.shards_night

It gives the seconds of the night after the first over those of the first, as the log grows.

The log is that of a simulated city whose users are copied several times under ids of their own, a
file a day. Embeddings are those of the stub encoders, of real sizes. The first night has the log
without its last day, the second all of it. Every second night starts from the first one's outputs
(hard links), and all must give the same rows. With `--check` they must equal those of a build of
the whole log at once.

Seconds are the stage's own. The imports of a process (2 to 4 s) are not among them. Each run is a
process of its own. The last line of stdout is one JSON object.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from benchmarks.speed.shards import run_stage
from benchmarks.support.city import make_city, multiply_city
from benchmarks.support.command import machine, progress_log, work_directory
from pipelines.runs.manifest import read_latest

log = progress_log("shards_night")

LOGS = (("clicks", "clicked_at"), ("orders", "ordered_at"))
FLAGS = ["--direct_num_workers=1"]


def write_nights(city: Path, first: Path, second: Path) -> dict[str, int]:
    """Write the data of both nights.

    `first` and `second` are equal except for the last day of the logs, which `first` lacks. Returns
    the rows of the logs of `second`.
    """
    rows = {}
    for night in (first, second):
        shutil.rmtree(night, ignore_errors=True)
        night.mkdir(parents=True)
        for name in ("catalog.parquet", "stores.parquet"):
            os.link(city / name, night / name)
        shutil.copytree(city / "users", night / "users", copy_function=os.link)
    last = pc.max(pc.floor_temporal(pq.read_table(city / "clicks", columns=["clicked_at"])["clicked_at"], unit="day"))
    for name, column in LOGS:
        for night in (first, second):
            (night / name).mkdir()
        table = pq.read_table(city / name)
        rows[name] = table.num_rows
        day = pc.floor_temporal(table[column], unit="day")
        for value in sorted(pc.unique(day).to_pylist()):
            path = second / name / f"{value:%Y-%m-%d}.parquet"
            mine = table.filter(pc.equal(day, pa.scalar(value, day.type))).sort_by(column)
            pq.write_table(mine, path, compression="zstd", row_group_size=65_536)
            if value < last.as_py():
                os.link(path, first / name / path.name)
    return rows


def measure(work: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure the first night once, and some second nights."""
    city = work / "city"
    log(f"a city of {arguments.items:,} listings and about {arguments.clicks:,} clicks of {arguments.days} days")
    base = arguments.clicks // arguments.copies
    make_city(city / "once", arguments.items, base, 1, arguments.clicks_per_user, arguments.days)
    multiply_city(city / "once", city / "whole", arguments.copies)
    rows = write_nights(city / "whole", work / "first" / "data", work / "second" / "data")
    shutil.rmtree(city / "whole")
    store = work / "second" / "store"
    if read_latest(str(store)) is None:
        run_stage(work / "second", "embed", store, arguments.timeout, FLAGS)
    link = work / "first" / "store"
    if not link.is_symlink():
        link.symlink_to(store)
    out, left = work / "shards", work / "left"
    for directory in (out, left):
        shutil.rmtree(directory, ignore_errors=True)
    first, _ = run_stage(work / "first", "shards", out, arguments.timeout, FLAGS, rebuild=False)
    log(f"first night: {first['seconds']:.1f} s")
    out.rename(left)
    nights = []
    for number in range(arguments.repeats):
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(left, out, copy_function=os.link)
        nights.append(run_stage(work / "second", "shards", out, arguments.timeout, FLAGS, rebuild=False)[0])
        log(f"second night {number + 1}/{arguments.repeats}: {nights[-1]['seconds']:.1f} s")
    digests = {night["digest_examples"] for night in nights}
    manifest = read_latest(str(out))
    assert manifest is not None
    summary = manifest.summary
    if arguments.check:
        whole, _ = run_stage(work / "second", "shards", work / "whole", arguments.timeout, FLAGS)
        digests.add(whole["digest_examples"])
    if len(digests) != 1:
        raise RuntimeError(f"the rows differ: {digests}")
    second = statistics.median(night["seconds"] for night in nights)
    return {
        "ratio": round(second / first["seconds"], 3),
        "seconds": {"first": round(first["seconds"], 1), "second": round(second, 1)},
        "cpu_seconds": {
            "first": round(first["cpu_seconds"], 1),
            "second": round(statistics.median(night["cpu_seconds"] for night in nights), 1),
        },
        "days": {name: summary[f"days_{name}"] for name in ("built", "kept")},
        "log_rows": {name: summary[f"log_rows_{name}"] for name in ("read", "kept")},
        "rows": rows | {"examples": manifest.rows("examples"), "examples_built": summary["examples_built"]},
        "checked": arguments.check,
    }


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the flags."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed.shards_night", description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("--items", type=int, default=20_000, help="listings (default %(default)s)")
    parser.add_argument("--clicks", type=int, default=10_000_000, help="clicks, about (default %(default)s)")
    parser.add_argument("--days", type=int, default=365, help="days of the log (default %(default)s)")
    parser.add_argument("--clicks_per_user", type=int, default=130, help="clicks of a user (default %(default)s)")
    parser.add_argument("--copies", type=int, default=5, help="copies of the simulated users (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="second nights (default %(default)s)")
    parser.add_argument("--check", action="store_true", help="compare with a build of the whole log at once")
    parser.add_argument("--work", type=Path, help="directory kept for the next time (default: a temporary one)")
    parser.add_argument("--timeout", type=float, default=7_200, help="seconds after which a run is ended")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Measure, and print one JSON line."""
    arguments = build_parser().parse_args(argv)
    with work_directory(arguments.work, "shards_night") as work:
        found = measure(work, arguments)
    found |= {"stub_encoders": "meaningless embeddings of real sizes", "repeats": arguments.repeats, **machine()}
    print(json.dumps(found), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
