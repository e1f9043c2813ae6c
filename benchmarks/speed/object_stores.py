"""The cost of an object store.

The same night is run on a local disk and on gs:// or s3://.

    scripts/object_store_local.sh up s3 && eval "$(scripts/object_store_local.sh env)"
    python -m benchmarks.speed.object_stores --place s3://camenn/bench --work WORK

One city lies on both. `shards` and `score` run on each in turns, as commands of their own, each
time with an empty `CAMENN_CACHE`. `cpu_ratio`, `wall_ratio` and `memory_ratio` are medians over the
turns: object store over local disk. `same_rows` is true where the rows of both are bitwise equal.

Requests and bytes are counted apart from the time, by a proxy on loopback: of a first `embed` and
an unchanged one, of `shards` and `score` with an empty cache, and of a night in which nothing
changed. The encoders are stubs, and the model is untrained: neither changes a byte that is read.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.support.city import make_city, multiply_city
from benchmarks.support.command import CAMENN, machine, progress_log, work_directory
from benchmarks.support.counting_proxy import CountingProxy
from benchmarks.support.processes import run_watched
from benchmarks.support.stage_process import Job, digest
from pipelines.io import cache, files, objects
from pipelines.runs.manifest import read_latest

log = progress_log("object_stores")

IMAGE_SHAPE, TEXT_SHAPE = (16, 1536), (32, 384)
CLICKS_PER_USER = 50
ENDPOINTS = {"gs": "STORAGE_EMULATOR_HOST", "s3": "AWS_ENDPOINT_URL_S3"}
TIMEOUT_S = 3_600.0
STAGES = ("shards", "score")


@dataclass(frozen=True)
class Place:
    """A place with a city and its outputs.

    It is a directory, or a prefix of an object store.
    """

    name: str
    path: str
    caches: Path

    def run(self, stage: str, out: str, cache_name: str, environment: dict[str, str] | None = None) -> dict[str, Any]:
        """Run one command, and return what it took."""
        at = {name: files.join(self.path, name) for name in ("data", "store", "shards", "model")}
        flags = {
            "shards": ["--data", at["data"], "--store", at["store"], "--out", out, "--rebuild"],
            "score": ["--data", at["data"], "--store", at["store"], "--model", at["model"], "--out", out],
        }[stage]
        return self.measured([*CAMENN, stage, *flags, "--direct_num_workers=1", "--json"], cache_name, environment)

    def embed(self, cache_name: str, environment: dict[str, str] | None = None) -> dict[str, Any]:
        """Embed with stubs."""
        job = Job(
            stage="embed",
            work=self.path,
            out=files.join(self.path, "store"),
            beam_flags=("--direct_num_workers=1",),
            image_shape=IMAGE_SHAPE,
            text_shape=TEXT_SHAPE,
            digests=False,
        )
        command = [sys.executable, "-m", "benchmarks.support.stage_process", json.dumps(asdict(job))]
        return self.measured(command, cache_name, environment)

    def measured(self, command: list[str], cache_name: str, environment: dict[str, str] | None) -> dict[str, Any]:
        before = dict(os.environ)
        os.environ.update({"CAMENN_CACHE": str(self.caches / cache_name), **(environment or {})})
        began, used = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
        try:
            _, peaks = run_watched(command, standing=False, timeout=TIMEOUT_S)
        finally:
            os.environ.clear()
            os.environ.update(before)
        now = resource.getrusage(resource.RUSAGE_CHILDREN)
        return {
            "seconds": round(time.monotonic() - began, 2),
            "cpu_seconds": round(now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime, 2),
            "megabytes": max((peaks or {}).values(), default=0.0),
        }

    def size(self, prefix: str) -> int:
        """Return the bytes below a name."""
        if files.is_local(self.path):
            return sum(path.stat().st_size for path in Path(self.path, prefix).rglob("*") if path.is_file())
        return sum(found.bytes for found in objects.list_objects(files.join(self.path, prefix)))


def lay_out_photos(data: Path) -> int:
    """Move inline photos to files, and return how many."""
    path = data / "catalog.parquet"
    catalog = pq.ParquetFile(path).read()
    if "image_bytes" not in catalog.column_names:
        return len(list((data / "images").iterdir()))
    (data / "images").mkdir(exist_ok=True)
    names = [f"images/{number:06d}.jpg" for number in range(catalog.num_rows)]
    for name, photo in zip(names, catalog["image_bytes"].to_pylist(), strict=True):
        (data / name).write_bytes(photo)
    place = catalog.column_names.index("image_uri")
    path.unlink()  # It may be a link to the source's own file.
    pq.write_table(
        catalog.set_column(place, "image_uri", pa.array(names)).drop_columns(["image_bytes"]),
        path,
        compression="zstd",
        row_group_size=8_192,
    )
    return len(names)


def copy_tree(source: Path, place: str) -> None:
    """Upload a directory."""
    for path in sorted(path for path in source.rglob("*") if path.is_file()):
        cache.upload_file(str(path), f"{place}/{path.relative_to(source)}")


@contextmanager
def counted(scheme: str) -> Iterator[tuple[CountingProxy, dict[str, str]]]:
    """Yield a proxy to the store, and its environment."""
    proxy = CountingProxy(os.environ[ENDPOINTS[scheme]])
    try:
        yield proxy, {ENDPOINTS[scheme]: proxy.url}
    finally:
        proxy.close()


def count_requests(place: Place, scheme: str, results: dict[str, Any]) -> None:
    """Count requests, bytes and sockets of each step."""
    with counted(scheme) as (proxy, environment):

        def step(name: str, work: Any) -> None:
            proxy.clear()
            sockets = proxy.sockets
            work()
            results[name] = {
                "requests": len(proxy.requests),
                "bytes_read": proxy.bytes_out,
                "sockets": proxy.sockets - sockets,
            }
            log(f"{name}: {results[name]}")

        step("embed_unchanged", lambda: place.embed("counted", environment))
        out = files.join(place.path, "counted")
        step("shards", lambda: place.run("shards", f"{out}/shards", "counted", environment))
        step("score", lambda: place.run("score", f"{out}/scores", "counted", environment))

        def unchanged() -> None:
            place.embed("counted", environment)
            at = {name: files.join(place.path, name) for name in ("data", "store", "model")}
            for stage, more in (("shards", []), ("score", ["--model", at["model"]])):
                flags = ["--data", at["data"], "--store", at["store"], *more, "--out", f"{out}/{stage.rstrip('s')}s"]
                place.measured([*CAMENN, stage, *flags, "--direct_num_workers=1", "--json"], "counted", environment)

        step("unchanged_night", unchanged)


def prepare_local(local: Place) -> None:
    """Make the missing ones of store, shards and model."""
    if read_latest(files.join(local.path, "store")) is None:
        local.embed("local")
    if read_latest(files.join(local.path, "shards")) is None:
        local.run("shards", files.join(local.path, "shards"), "local")
    if read_latest(files.join(local.path, "model")) is None:
        write_model(local)


def measure(work: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure all."""
    make_city(work / "city", arguments.items, arguments.clicks // arguments.copies, 1, CLICKS_PER_USER)
    local = Place("local", str(work / "local"), work / "caches")
    data = work / "local" / "data"
    rows = multiply_city(work / "city", data, arguments.copies)
    photos = lay_out_photos(data)
    log(f"{rows}, {photos} photos")
    remote = Place("remote", arguments.place.rstrip("/"), work / "caches")
    scheme = objects.split(remote.path)[0]
    results: dict[str, Any] = {"rows": rows, "photos": photos}
    shutil.rmtree(work / "caches", ignore_errors=True)
    prepare_local(local)
    if not files.exists(files.join(remote.path, "data/catalog.parquet")):
        log("uploading")
        copy_tree(data, files.join(remote.path, "data"))
    if read_latest(files.join(remote.path, "model")) is None:
        copy_tree(Path(local.path, "model"), files.join(remote.path, "model"))
    if read_latest(files.join(remote.path, "store")) is None:
        with counted(scheme) as (proxy, environment):
            remote.embed("first", environment)
            results["embed_first"] = {"requests": len(proxy.requests), "bytes_read": proxy.bytes_out}
            log(f"embed_first: {results['embed_first']}")
    count_requests(remote, scheme, results)
    results |= {
        "listings": rows["catalog"],
        "log_bytes": remote.size("data/clicks/") + remote.size("data/orders/"),
        "data_bytes": remote.size("data/") - remote.size("data/images/"),
        "store_bytes": remote.size("store/"),
        "contents_bytes": remote.size("counted/shards/contents/"),
    }
    log(json.dumps(results))
    for stage in STAGES:
        runs: dict[str, list[dict[str, Any]]] = {"local": [], "remote": []}
        digests = set()
        for turn in range(arguments.repeats):
            places = [local, remote] if turn % 2 == 0 else [remote, local]
            for place in places:
                cache_name = f"{stage}-{place.name}-{turn}"
                out = files.join(place.path, "turns", f"{stage}-{turn}")
                result = place.run(stage, out, cache_name)
                runs[place.name].append(result)
                log(f"{stage} {turn + 1}/{arguments.repeats} {place.name}: {result}")
                manifest = read_latest(out)
                assert manifest is not None
                digests.add(digest(manifest))
                files.delete_directory(out)
                shutil.rmtree(place.caches / cache_name, ignore_errors=True)
        pairs = list(zip(runs["remote"], runs["local"], strict=True))
        results[f"{stage}_time"] = {
            **{
                f"{name}_ratio": round(statistics.median(a[key] / b[key] for a, b in pairs), 3)
                for name, key in (("cpu", "cpu_seconds"), ("wall", "seconds"), ("memory", "megabytes"))
            },
            "runs": runs,
            "same_rows": len(digests) == 1,
        }
    return results


def write_model(local: Place) -> None:
    """Publish an untrained model."""
    job = Job(
        stage="model",
        work=local.path,
        out=files.join(local.path, "model"),
        beam_flags=(),
        image_shape=IMAGE_SHAPE,
        text_shape=TEXT_SHAPE,
    )
    local.measured([sys.executable, "-m", "benchmarks.support.stage_process", json.dumps(asdict(job))], "local", None)


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the flags."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed.object_stores", description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("--place", required=True, help="empty prefix of a store: s3://BUCKET/NAME or gs://BUCKET/NAME")
    parser.add_argument("--items", type=int, default=20_000, help="listings (default %(default)s)")
    parser.add_argument("--clicks", type=int, default=2_000_000, help="clicks, about (default %(default)s)")
    parser.add_argument("--copies", type=int, default=10, help="copies of the users (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="turns (default %(default)s)")
    parser.add_argument("--work", type=Path, help="directory kept for the next time (default: a temporary one)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Measure, and print one JSON line."""
    arguments = build_parser().parse_args(argv)
    with work_directory(arguments.work, "object-stores") as work:
        found = measure(work, arguments)
    print(json.dumps(found | {"stub_encoders": "meaningless embeddings of real sizes", **machine()}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
