"""The cost of embedding: speed, a second night, and memory.

    python -m benchmarks.speed.embed --photos DIR --image_weights FILE --text_encoder DIR

`camenn embed` is measured against the encoders alone and against plain RunInference, and a second
night against the first.

`speed` is the pace of `camenn embed` on listings that each have a photo and a title of their own.
That pace covers reading, decoding, cutting, encoding photo and title, writing and publishing.
Start-up, a run over one listing, is kept apart. It is given over the pace of a bare torch loop on
the same photos and titles, and over that of a RunInference pipeline as Beam's documentation would
write it. Both are measured against the bare loop while they run: the clock of one is stopped while
the other encodes the same contents.

`nights` is a whole run, then the same catalog again, then 1 % of it changed. `memory` is peak
resident memory by listing, with stub encoders.

Each run is a process of its own, and medians are compared. The last line of stdout is one JSON
object, ratios first.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.speed.embed_loops import Job
from benchmarks.support.command import machine, names_of, progress_log, work_directory
from benchmarks.support.listings import change_listings, first_listing, make_listings, make_small_photos
from benchmarks.support.processes import run_watched

log = progress_log("embed")

PARTS = ("speed", "nights", "memory")
CHANGED = 0.01


def run_job(job: Job, timeout: float) -> tuple[dict[str, Any], float]:
    """Run one job in a process of its own.

    Returns (its result, its peak memory in MB). The result has `wall_seconds` of the whole process.
    """
    started = time.monotonic()
    out, peaks = run_watched(
        [sys.executable, "-m", "benchmarks.speed.embed_loops", json.dumps(asdict(job))], standing=False, timeout=timeout
    )
    result = json.loads(out.strip().splitlines()[-1])
    return result | {"wall_seconds": time.monotonic() - started}, sum((peaks or {}).values())


def matmul_ceilings() -> dict[str, float]:
    """Return the GFLOP/s of a matrix product by dtype.

    The product is of 2048 × 2048, and the best of several measurements counts, as the machine's
    present capacity.
    """
    import torch

    found = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a = torch.randn(2048, 2048, dtype=dtype)
        seconds = []
        for _ in range(6):
            started = time.monotonic()
            _ = a @ a
            seconds.append(time.monotonic() - started)
        found[name] = 2 * 2048**3 / min(seconds) / 1e9
    return found


def measure_speed(work: Path, arguments: argparse.Namespace, common: dict[str, Any]) -> dict[str, Any]:
    """Measure `camenn embed` and plain RunInference.

    Each is measured against a bare loop that encodes the same contents in between.
    """
    data = work / f"listings-{arguments.items}"
    make_listings(data, arguments.items, arguments.photos)
    single = work / "listings-1"
    first_listing(data, single)
    out = work / "measured" / "store"
    chosen, _ = run_job(
        Job(way="variants", data=str(data), out="", limit=min(64, arguments.items), **common), arguments.timeout
    )
    variants = chosen["variants"]
    log(f"bare loops: {chosen['variant_seconds']}")
    runs: dict[str, list[dict[str, Any]]] = {"whole": [], "plain": []}
    ceilings: list[dict[str, float]] = []
    for number in range(arguments.repeats):
        for way in runs:
            shutil.rmtree(out.parent, ignore_errors=True)
            limit = arguments.plain_items if way == "plain" else None
            job = Job(
                way=way, data=str(data), out=str(out), limit=limit, single=str(single), variants=variants, **common
            )
            ceilings.append(matmul_ceilings())
            result, peak = run_job(job, arguments.timeout)
            runs[way].append(result)
            pace = result["images"] / result["seconds"]
            log(f"{way} {number + 1}/{arguments.repeats}: {pace:.1f} listings/s, {peak:,.0f} MB, {json.dumps(result)}")
            if way == "whole" and (result["images"], result["titles"]) != (arguments.items, arguments.items):
                raise RuntimeError(
                    f"{result['images']} photos and {result['titles']} titles of {arguments.items} were encoded"
                )
    whole = [run["bare_seconds"] / run["seconds"] for run in runs["whole"]]
    # Seconds of the bare loop for a listing beside `plain`: its photo as measured there, its title
    # by its share beside `whole`.
    title_share = statistics.median(run["bare_seconds"] / run["bare_by_encoder"]["images"] for run in runs["whole"])
    plain = [run["bare_image_seconds"] * title_share / run["seconds"] for run in runs["plain"]]
    pace = {way: statistics.median(run["images"] / run["seconds"] for run in found) for way, found in runs.items()}
    return {
        "matmul_gflops": {name: [round(found[name]) for found in ceilings] for name in ceilings[0]},
        "vs_bare_torch": round(statistics.median(whole), 4),
        "vs_plain_runinference": round(statistics.median(whole) / statistics.median(plain), 3),
        "chunk_over_bare": {
            kind: round(statistics.median(run["chunk_over_bare"][kind] for run in runs["whole"]), 4)
            for kind in runs["whole"][0]["chunk_over_bare"]
        },
        "share_in_encoders": round(statistics.median(run["share_in_encoders"] for run in runs["whole"]), 4),
        "all_vs_bare_torch": [round(value, 4) for value in whole],
        "all_plain_vs_bare_torch": [round(value, 4) for value in plain],
        "listings_per_second": {way: round(value, 2) for way, value in pace.items()},
        "start_seconds": round(statistics.median(run["start_seconds"] for run in runs["whole"]), 1),
        "single_listing_seconds": round(statistics.median(run["single_listing_seconds"] for run in runs["whole"]), 1),
        "bare_loops": variants,
        "bare_loop_seconds": chosen["variant_seconds"],
        "kernels": runs["whole"][-1]["kernels"],
    }


def measure_nights(work: Path, arguments: argparse.Namespace, common: dict[str, Any]) -> dict[str, Any]:
    """Measure a first night and the nights after it.

    There is a whole run once. Then, from its store each time, the same catalog again and 1 % of it
    changed. The product decides whether to compile, which pays on the first night alone.
    """
    common = common | {"compile": "auto"}
    data = work / f"listings-{arguments.night_items}"
    make_listings(data, arguments.night_items, arguments.photos)
    tomorrow = work / f"listings-{arguments.night_items}-changed"
    changed = change_listings(data, tomorrow, CHANGED)
    first, second = work / "nights" / "first" / "store", work / "nights" / "second" / "store"
    record = work / "nights" / f"first-{arguments.night_items}.json"
    if not record.exists():
        shutil.rmtree(work / "nights", ignore_errors=True)
        found_first, _ = run_job(Job(way="whole", data=str(data), out=str(first), **common), arguments.timeout)
        record.write_text(json.dumps(found_first))
    # It takes an hour, so it is kept with --work, with its time.
    whole = json.loads(record.read_text())
    log(
        f"first night: {whole['seconds']:.1f} s for {whole['images']:,} photos, start-up {whole['start_seconds']:.1f} s"
    )
    found: dict[str, list[dict[str, Any]]] = {"unchanged": [], "changed": []}
    # Photos of the second night are links in another directory: moving the root does not change them.
    for number in range(arguments.repeats):
        for name, place in (("unchanged", data), ("changed", tomorrow)):
            shutil.rmtree(second.parent, ignore_errors=True)
            shutil.copytree(first, second, copy_function=os.link)
            result, _ = run_job(Job(way="whole", data=str(place), out=str(second), **common), arguments.timeout)
            found[name].append(result)
            log(
                f"{name} {number + 1}/{arguments.repeats}: {result['wall_seconds']:.1f} s in all, "
                f"{result['images']} photos and {result['titles']} titles encoded"
            )
    shutil.rmtree(work / "nights", ignore_errors=True)
    wall = {name: statistics.median(run["wall_seconds"] for run in runs) for name, runs in found.items()}
    return {
        "unchanged_rerun": {
            "encodes": max(run["images"] + run["titles"] for run in found["unchanged"]),
            "seconds": round(wall["unchanged"], 2),
        },
        "one_percent_changed": {
            "seconds": round(wall["changed"], 2),
            "limit": round(0.03 * whole["seconds"] + 10, 2),
            "encodes": found["changed"][-1]["images"] + found["changed"][-1]["titles"],
            "changed_listings": changed,
        },
        "first_night_seconds": round(whole["seconds"], 1),
        "first_night_start_seconds": round(whole["start_seconds"], 1),
    }


def measure_memory(work: Path, arguments: argparse.Namespace, common: dict[str, Any]) -> dict[str, Any]:
    """Measure the peak resident memory of two catalogs.

    One is ten times the other.
    """
    peaks: dict[int, list[float]] = {size: [] for size in arguments.memory_items}
    for size in peaks:
        make_small_photos(work / f"small-{size}", size)
    for number in range(arguments.repeats):
        for size, found in peaks.items():
            out = work / "measured" / "store"
            shutil.rmtree(out.parent, ignore_errors=True)
            result, peak = run_job(
                Job(way="stub", data=str(work / f"small-{size}"), out=str(out), **common), arguments.timeout
            )
            if result["images"] != size:
                raise RuntimeError(f"{result['images']} of {size} photos were encoded")
            found.append(peak)
            log(f"memory {number + 1}/{arguments.repeats}: {size:,} listings, {peak:,.0f} MB")
    few, many = sorted(peaks)
    medians = {size: statistics.median(found) for size, found in peaks.items()}
    return {
        "rss_bytes_per_item": round((medians[many] - medians[few]) * 2**20 / (many - few)),
        "peak_rss_mb": {str(size): round(value, 1) for size, value in medians.items()},
    }


MEASURES = {"speed": measure_speed, "nights": measure_nights, "memory": measure_memory}


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the flags."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed.embed", description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("--photos", type=Path, help="folder of real JPEGs (default: the simulator draws some)")
    parser.add_argument(
        "--image_weights", default="random:0", help="InceptionV4, as for camenn embed (default %(default)s)"
    )
    parser.add_argument("--text_encoder", required=True, help="BERT, as for camenn embed")
    parser.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16"), help="(default %(default)s)")
    parser.add_argument(
        "--compile", default="on", choices=("auto", "on", "off"), help="of camenn embed (default %(default)s)"
    )
    parser.add_argument(
        "--parts", type=names_of(PARTS), default=list(PARTS), help="of speed,nights,memory (default: all)"
    )
    parser.add_argument("--items", type=int, default=2_560, help="listings of the speed part (default %(default)s)")
    parser.add_argument(
        "--plain_items", type=int, default=200, help="listings given to plain RunInference (default %(default)s)"
    )
    parser.add_argument("--night_items", type=int, default=20_000, help="listings of the nights (default %(default)s)")
    parser.add_argument(
        "--memory_items",
        type=lambda text: [int(size) for size in text.split(",")],
        default=[20_000, 200_000],
        help="listings of the two catalogs of the memory part (default 20000,200000)",
    )
    parser.add_argument("--repeats", type=int, default=5, help="runs of each (default %(default)s)")
    parser.add_argument("--work", type=Path, help="directory kept for the next time (default: a temporary one)")
    parser.add_argument("--timeout", type=float, default=7_200, help="seconds after which a run is ended")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Measure, and print one JSON line."""
    arguments = build_parser().parse_args(argv)
    common = {name: getattr(arguments, name) for name in ("image_weights", "text_encoder", "precision", "compile")}
    found: dict[str, Any] = {}
    with work_directory(arguments.work, "embed") as work:
        for part in arguments.parts:
            found |= MEASURES[part](work, arguments, common)
    found |= {
        "items": arguments.items,
        "repeats": arguments.repeats,
        "photos": "real" if arguments.photos else "drawn",
        **machine(),
    }
    print(json.dumps(found), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
