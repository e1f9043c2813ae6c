"""The cost of shards: speed, memory and bytes.

    python -m benchmarks.speed.shards

It measures clicks per second, also against an expert's Polars, memory by click on FnApiRunner, and
bytes of the shard set.

The log is that of a simulated city whose users are copied several times under ids of their own.
Embeddings are those of the stub encoders, of real sizes.

`vs_polars` is the seconds of the same labels and features in Polars
(benchmarks/peers/polars_shards.py, the faster of its two engines) over the seconds of `camenn
shards --rebuild`, whose embeddings were copied by a first run. Both write their examples, and the
rows must be bitwise equal.

`rss_bytes_per_click` is the growth of peak memory from the log of one copy of the users to the
whole log. `bytes_ratio` is the bytes of the shard set over those of the distinct embeddings and of
the examples as one plain zstd Parquet table.

`skew` is seconds and peak memory where one listing has 30 % of all clicks and one user 5 %, over
those of the same log without skew (one copy of the users). Its rows must equal Polars' too. Each
run is a process of its own. The last line of stdout is one JSON object.
"""

import argparse
import json
import shutil
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from benchmarks.support.city import make_city, multiply_city, skew_city
from benchmarks.support.command import machine, progress_log, work_directory
from benchmarks.support.processes import run_watched
from benchmarks.support.stage_process import SORTED_BY, Job, digest_examples
from pipelines.runs.manifest import Manifest, read_latest
from schemas.training import EXAMPLES

log = progress_log("shards")

IMAGE_SHAPE, TEXT_SHAPE = (16, 1536), (32, 384)
ENGINES = ("in-memory", "streaming")
CLICKS_PER_USER = 50


def run_stage(
    work: Path, stage: str, out: Path, timeout: float, beam_flags: list[str], rebuild: bool = True
) -> tuple[dict[str, Any], float]:
    """Run one stage in a process of its own.

    Returns (its result, peak memory of all its processes in MB).
    """
    job = Job(
        stage=stage,
        work=str(work),
        out=str(out),
        beam_flags=tuple(beam_flags),
        image_shape=IMAGE_SHAPE,
        text_shape=TEXT_SHAPE,
        rebuild=rebuild,
    )
    out_text, peaks = run_watched(
        [sys.executable, "-m", "benchmarks.support.stage_process", json.dumps(asdict(job))],
        standing=False,
        timeout=timeout,
    )
    return json.loads(out_text.strip().splitlines()[-1]), sum((peaks or {}).values())


def run_polars(data: Path, out: Path, engine: str, timeout: float) -> dict[str, Any]:
    """Run Polars once in a process of its own.

    The result has the digest of its rows.
    """
    shutil.rmtree(out, ignore_errors=True)
    started = time.monotonic()
    text, peaks = run_watched(
        [sys.executable, "-m", "benchmarks.peers.polars_shards", str(data), str(out), engine],
        standing=False,
        timeout=timeout,
    )
    found: dict[str, Any] = json.loads(text.strip().splitlines()[-1])
    days = {path.name: [str(part) for part in sorted(path.glob("*.parquet"))] for path in sorted(out.iterdir())}
    return found | {
        "digest_examples": digest_examples(days),
        "peak_mb": sum((peaks or {}).values()),
        "wall_seconds": time.monotonic() - started,
    }


def prepare(work: Path, items: int, clicks: int, copies: int, timeout: float) -> dict[str, dict[str, int]]:
    """Make the logs and the store.

    They are a part of the log (one copy of the users), the same with skew, the whole log, and one
    store. Existing ones are reused. Returns the rows of the tables.
    """
    make_city(work / "city", items, clicks // copies, 1, CLICKS_PER_USER)
    rows = {
        name: multiply_city(work / "city", work / name / "data", times)
        for name, times in (("part", 1), ("whole", copies))
    }
    rows["skew"] = skew_city(work / "part" / "data", work / "skew" / "data")
    if read_latest(str(work / "whole" / "store")) is None:
        log(f"embedding {items:,} listings with the stub encoders")
        run_stage(work / "whole", "embed", work / "whole" / "store", timeout, ["--direct_num_workers=1"])
    for name in ("part", "skew"):
        link = work / name / "store"
        if not link.is_symlink():
            link.symlink_to(work / "whole" / "store")
    return rows


def bytes_ratio(manifest: Manifest, scratch: Path) -> float:
    """Return a shard set's bytes over the least possible.

    The least possible is the raw bytes of its embeddings, and its examples as one zstd Parquet
    file.
    """
    whole = sum(entry["bytes"] for table in manifest.tables.values() for entry in table["files"])
    plain = 0
    for kind in ("images", "titles"):
        shape = IMAGE_SHAPE if kind == "images" else TEXT_SHAPE
        plain += manifest.rows(f"contents_{kind}") * shape[0] * shape[1] * 2
    path = scratch / "plain.parquet"
    with pq.ParquetWriter(path, EXAMPLES.schema, compression="zstd") as writer:
        for part in manifest.paths("examples"):
            writer.write_table(pq.ParquetFile(part).read())
    plain += path.stat().st_size
    path.unlink()
    return whole / plain


def measure(work: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure all figures."""
    flags = [f"--direct_num_workers={arguments.workers}"]
    if arguments.workers > 1:
        flags.append("--direct_running_mode=multi_processing")
    rows = prepare(work, arguments.items, arguments.clicks, arguments.copies, arguments.timeout)
    for name, found in rows.items():
        log(f"{name}: {found}")
        if read_latest(str(work / name / "shards")) is None:
            # Copies the embeddings, which the measured runs then reuse.
            run_stage(work / name, "shards", work / name / "shards", arguments.timeout, flags)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in ("part", "skew", "whole", *ENGINES)}
    peaks: dict[str, list[float]] = {"part": [], "skew": [], "whole": []}
    for number in range(arguments.repeats):
        for name, results in runs.items():
            if name in peaks:
                result, peak = run_stage(work / name, "shards", work / name / "shards", arguments.timeout, flags)
                peaks[name].append(peak)
            else:
                result = run_polars(work / "whole" / "data", work / "polars", name, arguments.timeout)
                peak = result["peak_mb"]
            results.append(result)
            log(f"{name} {number + 1}/{arguments.repeats}: {result['seconds']:.1f} s, {peak:,.0f} MB")
    skewed = run_polars(work / "skew" / "data", work / "polars", ENGINES[0], arguments.timeout)
    digests = {name: {run["digest_examples"] for run in results} for name, results in runs.items()}
    for same in (
        {*digests["skew"], skewed["digest_examples"]},
        set.union(*(digests[name] for name in ("whole", *ENGINES))),
    ):
        if len(same) != 1:
            raise RuntimeError(f"the rows differ: {digests}, skew in Polars {skewed['digest_examples']}")
    seconds = {name: statistics.median(run["seconds"] for run in results) for name, results in runs.items()}
    clicks = {name: rows[name]["clicks"] for name in ("part", "whole")}
    grown = statistics.median(peaks["whole"]) - statistics.median(peaks["part"])
    manifest = read_latest(str(work / "whole" / "shards"))
    assert manifest is not None
    return {
        "clicks_per_second": round(clicks["whole"] / seconds["whole"]),
        "vs_polars": round(min(seconds[engine] for engine in ENGINES) / seconds["whole"], 3),
        "rss_bytes_per_click": round(grown * 2**20 / (clicks["whole"] - clicks["part"])),
        "bytes_ratio": round(bytes_ratio(manifest, work), 4),
        "skew": {
            "seconds_ratio": round(seconds["skew"] / seconds["part"], 3),
            "rss_ratio": round(statistics.median(peaks["skew"]) / statistics.median(peaks["part"]), 3),
        },
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "peak_rss_mb": {name: round(statistics.median(values)) for name, values in peaks.items()}
        | {engine: round(statistics.median(run["peak_mb"] for run in runs[engine])) for engine in ENGINES},
        "rows": rows["whole"] | {name: manifest.rows(name) for name in SORTED_BY if manifest.paths(name)},
    }


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the flags."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed.shards", description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("--items", type=int, default=100_000, help="listings (default %(default)s)")
    parser.add_argument("--clicks", type=int, default=10_000_000, help="clicks, about (default %(default)s)")
    parser.add_argument("--copies", type=int, default=10, help="copies of the simulated users (default %(default)s)")
    parser.add_argument("--workers", type=int, default=1, help="worker processes of FnApiRunner (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each (default %(default)s)")
    parser.add_argument("--work", type=Path, help="directory kept for the next time (default: a temporary one)")
    parser.add_argument("--timeout", type=float, default=7_200, help="seconds after which a run is ended")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Measure, and print one JSON line."""
    arguments = build_parser().parse_args(argv)
    with work_directory(arguments.work, "shards") as work:
        found = measure(work, arguments)
    found |= {
        "stub_encoders": "meaningless embeddings of real sizes",
        "workers": arguments.workers,
        "repeats": arguments.repeats,
        **machine(),
    }
    print(json.dumps(found), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
