"""Jobs for Dataflow with every path on gs://, built against a real server on loopback.

No disk is shared: what a job holds must be of use on another machine.
"""

import base64
import bz2
import copy
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from apache_beam.internal import pickler
from apache_beam.portability import common_urns
from apache_beam.portability.api import beam_runner_api_pb2

from benchmarks.support.counting_proxy import Request
from benchmarks.support.stub_encoders import StubImageHandler, stub_handler, stub_specs
from camenn_model.encoders.spec import ImageSpec, TextSpec
from pipelines import cli
from pipelines.embed import stage as embed_stage
from pipelines.embed.handlers import EncodedImages, ImageChunk
from pipelines.embed.options import EmbedOptions
from pipelines.inputs.photo_files import read_photo
from pipelines.io import objects
from pipelines.runner.exit_codes import DryRun
from pipelines.runner.flags import parse_with_beam
from pipelines.runs.manifest import read_latest
from pipelines.score.command import build_parser
from pipelines.score.stage import check_containers
from tests.support.dataflow_jobs import MAINS, documented_command, write_city
from tests.support.object_stores import LocalStores

pytest.importorskip("apache_beam.runners.dataflow.internal.apiclient", reason="apache_beam[gcp] is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.objects]

PLACE = "gs://camenn/night"


@dataclass
class Night:
    """The inputs of the three stages on gs://, and a submitter's disk."""

    submitter: Path
    """Scratch of the submitting machine: nothing of it may travel"""
    bert: Path
    """Text encoder, which lies under the same path in the worker image"""
    jobs: dict[str, Any] = field(default_factory=dict)

    def build(self, stage: str) -> Any:
        """The job that the documented command would submit."""
        if stage not in self.jobs:
            with pytest.raises(DryRun) as built:
                MAINS[stage](self.documented(stage))
            self.jobs[stage] = built.value.job
        return self.jobs[stage]

    def documented(self, stage: str) -> list[str]:
        places = {"DATA": f"{PLACE}/data", "PHOTOS": f"{PLACE}/photos", "WORK": PLACE}
        return documented_command(stage, places, self.bert, f"{PLACE}/dry/{stage}")


@pytest.fixture(scope="module")
def night(stores: LocalStores, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Night]:
    submitter = tmp_path_factory.mktemp("submitter")
    bert = tmp_path_factory.mktemp("image") / "bert"
    write_city(submitter / "city", bert)
    for path in sorted((submitter / "city").rglob("*")):
        if path.is_file():
            objects.put(f"{PLACE}/{path.relative_to(submitter / 'city')}", path.read_bytes())
    objects.put(f"{PLACE}/photos/i0.jpg", b"not a photo, but bytes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CAMENN_CACHE", str(submitter / "cache"))
        patch.setenv("TMPDIR", str(submitter / "tmp"))
        (submitter / "tmp").mkdir()
        patch.setattr(tempfile, "tempdir", None)
        yield Night(submitter, bert)


@pytest.fixture(autouse=True)
def loopback_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A look-up of an account, a bucket of Google's or a metadata server fails the test immediately."""
    look_up, connect = socket.getaddrinfo, socket.socket.connect

    def guarded_look_up(host: Any, *rest: Any, **named: Any) -> Any:
        assert host in ("127.0.0.1", "localhost"), f"the network was asked for {host}"
        return look_up(host, *rest, **named)

    def guarded_connect(own: socket.socket, address: Any) -> None:
        local = own.family == socket.AF_UNIX or address[0] in ("127.0.0.1", "::1")
        assert local, f"the network was asked for {address}"
        connect(own, address)

    monkeypatch.setattr(socket, "getaddrinfo", guarded_look_up)
    monkeypatch.setattr(socket.socket, "connect", guarded_connect)


def unpacked(data: bytes) -> Iterator[bytes]:
    """Bytes, and what is packed in them as Beam packs Python objects."""
    yield data
    for word in re.findall(rb"[A-Za-z0-9+/=]{64,}", data):
        try:
            inner = bz2.decompress(base64.b64decode(word, validate=True))
        except (ValueError, OSError):
            continue
        yield from unpacked(inner)


def held(job: Any) -> list[bytes]:
    """All that a job sends to the service and to workers, as bytes to search."""
    pipeline = copy.deepcopy(job.proto_pipeline)
    for environment in pipeline.components.environments.values():
        # Files that Beam uploads when it submits, such as the session of the command itself.
        del environment.dependencies[:]
    options = json.dumps(job.options.get_all_options(), default=str).encode()
    return [*unpacked(pipeline.SerializeToString()), options]


def step(job: Any, name: str) -> Any:
    """The DoFn of a step, as a worker unpacks it."""
    (transform,) = [
        each
        for each in job.proto_pipeline.components.transforms.values()
        if each.unique_name == name and each.spec.urn == common_urns.primitives.PAR_DO.urn
    ]
    payload = beam_runner_api_pb2.ParDoPayload.FromString(transform.spec.payload)
    return pickler.loads(payload.do_fn.payload)[0]


@pytest.mark.parametrize("stage", MAINS)
def test_a_job_holds_no_path_of_the_submitters_disk(night: Night, stage: str) -> None:
    found = held(night.build(stage))
    # So much is searched that what is looked for would be found: the run's directory is there.
    directory = f"{PLACE}/dry/{stage}/runs/".encode()
    assert sum(directory in piece for piece in found) > 1
    for piece in found:
        for local in (str(night.submitter), tempfile.gettempdir()):
            place = piece.find(local.encode())
            assert place < 0, piece[max(0, place - 100) : place + 200]


def test_a_path_of_the_submitter_would_be_found(night: Night, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it would be if shuffles were spilled where the command runs."""
    monkeypatch.setattr("pipelines.shards.stage.is_local_run", lambda _: True)
    with pytest.raises(DryRun) as built:
        MAINS["shards"](night.documented("shards"))
    assert any(str(night.submitter / "cache" / "scratch").encode() in piece for piece in held(built.value.job))


def test_workers_of_score_are_told_addresses_alone(night: Night) -> None:
    given = step(night.build("score"), "Score/ScoreTile").given
    assert given.model == f"{PLACE}/model/runs/20240101T000000-bbbbbb"
    assert given.out == f"{PLACE}/dry/score" and given.directory.startswith(f"{given.out}/runs/")
    assert {record.path.rpartition("/contents/")[0] for record in (*given.images, *given.titles)} == {given.out}
    assert given.progress is None


@pytest.mark.parametrize("stage", MAINS)
def test_a_dry_run_on_a_store_publishes_nothing(night: Night, stage: str) -> None:
    night.build(stage)
    out = f"{PLACE}/dry/{stage}"
    assert read_latest(out) is None
    names = [found.path.removeprefix(f"{out}/") for found in objects.list_objects(f"{out}/")]
    assert names and not [name for name in names if name.startswith("published/") or name == "latest.json"]


def test_score_warns_where_each_core_would_download_the_embeddings(
    night: Night, caplog: pytest.LogCaptureFixture
) -> None:
    _, flags = parse_with_beam(build_parser(), night.documented("score"))
    many = [flag for flag in flags if "no_use_multiple" not in flag]
    assert len(many) == len(flags) - 1
    for out, given, warned in ((PLACE, flags, False), (PLACE, many, True), (PLACE, [], False), ("/out", many, False)):
        caplog.clear()
        check_containers(out, given)
        assert ("--experiments=no_use_multiple_sdk_containers" in caplog.text) == warned


WORKER = """
import json, pathlib, re, sys, threading
from apache_beam.internal import pickler
from pipelines.score import tiles

first, second = (pickler.loads(open(sys.argv[1], "rb").read()) for _ in range(2))
loads, load = [], tiles._load
tiles._load = lambda given: loads.append(1) or load(given)
step_of = lambda step: (step.setup(), step.start_bundle())
threads = [threading.Thread(target=step_of, args=(step,)) for step in (first, second)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(json.dumps({
    "loads": len(loads),
    "shared": first.table is second.table and first.snapshot is second.snapshot,
    "listings": len(first.table),
    # Not getrusage: its peak begins with that of the process that started this one.
    "peak": 1024 * int(re.search(r"VmHWM:\\s*(\\d+)", pathlib.Path("/proc/self/status").read_text())[1]),
}))
"""


def start_worker(fn: Any, cache: Path) -> dict[str, Any]:
    """Set the step up twice, as two threads do, in a process with a disk of its own."""
    cache.mkdir()
    (cache / "step").write_bytes(pickler.dumps(fn))
    done = subprocess.run(
        [sys.executable, "-c", WORKER, str(cache / "step")],
        env={**os.environ, "CAMENN_CACHE": str(cache), "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def downloaded(requests: list[Request], *parts: str) -> int:
    """Bytes of the objects whose names have one of the parts, not of what was asked about them."""
    return sum(
        request.bytes_out
        for request in requests
        if request.method == "GET" and any(part in request.path for part in parts) and "alt=media" in request.path
    )


def test_plan_says_what_a_worker_of_score_downloads(
    night: Night, stores: LocalStores, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fn = step(night.build("score"), "Score/ScoreTile")
    capfd.readouterr()
    flags = [flag for flag in night.documented("score") if flag != "--dry_run=True"]
    before = {found.path for found in objects.list_objects(f"{PLACE}/")}
    assert cli.main(["score", *flags, "--plan", "--json"]) == 0
    said = json.loads(capfd.readouterr().out.strip().splitlines()[-1])
    assert {found.path for found in objects.list_objects(f"{PLACE}/")} == before
    stores.proxies["gs"].clear()
    worker = start_worker(fn, tmp_path / "worker")
    requests = list(stores.proxies["gs"].requests)

    assert worker["loads"] == 1 and worker["shared"]
    planned = {name: 1e6 * size for name, size in said["worker_downloads_megabytes"].items()}
    assert planned["contents"] == pytest.approx(downloaded(requests, "%2Fcontents%2F"), rel=0.1)
    # The manifest is read to check the others, and copied.
    assert planned["package"] == pytest.approx(downloaded(requests, "%2Fmodel%2Fruns"), rel=0.02)
    tables = downloaded(requests, f"%2Fdry%2Fscore%2Fruns%2F{fn.given.directory.rpartition('/')[2]}")
    assert 0 < tables <= planned["tables_at_most"]
    kept = sum(path.stat().st_size for path in (tmp_path / "worker").rglob("*") if path.suffix not in ("", ".lock"))
    assert 1e9 * said["worker_disk_gigabytes"]["copies"] == pytest.approx(kept, rel=0.1)
    assert said["disk_size_gb"] == 26 and said["worker_threads"] == 2
    memory = said["worker_memory_megabytes"]
    # Nothing was scored: the tiles of both threads are not in it.
    assert 1e6 * (memory["sum"] - memory["tile"]) == pytest.approx(worker["peak"], rel=0.3)


class ReadingImages(StubImageHandler):
    """A stub that reads its photos, as the encoder does."""

    def run_inference(
        self, batch: Sequence[ImageChunk], model: None, inference_args: dict[str, Any] | None = None
    ) -> Iterable[EncodedImages]:
        for chunk in batch:
            for uri in chunk.uris:
                assert uri is not None and read_photo(uri)
        return super().run_inference(batch, model, inference_args)


def reading_handler(spec: ImageSpec | TextSpec, threads: int | None) -> Any:
    return ReadingImages(spec) if isinstance(spec, ImageSpec) else stub_handler(spec, threads)


def test_plan_says_what_workers_of_embed_download(
    night: Night, stores: LocalStores, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embed_stage, "measure_pace", lambda *_: 0.01)
    photos = {"i0": b"a" * 50_000, "i1": b"a" * 50_000, "i10": b"b" * 70_000, "i2": b"c" * 90_000}
    for item, data in photos.items():
        objects.put(f"{PLACE}/photos/{item}.jpg", data)
    image, text = stub_specs((4, 64), (3, 2))
    options = EmbedOptions(
        data=f"{PLACE}/data",
        store=f"{PLACE}/stub",
        image_root=f"{PLACE}/photos",
        allow_absolute=False,
        image=image,
        text=text,
        max_reject_rate=0.0,
    )
    one = ["--direct_num_workers=1"]
    planned = embed_stage.plan(options, one)
    megabytes = planned["workers_together_download_megabytes"]
    # Two listings have the same photo: it is encoded once, but each is looked at.
    assert megabytes == {"photos_hashed": 0.26, "photos_encoded": 0.21}
    assert planned["disk_size_gb"] == 25
    stores.proxies["gs"].clear()
    embed_stage.run(options, one, make_handler=reading_handler)
    assert downloaded(stores.proxies["gs"].requests, ".jpg") == pytest.approx(1e6 * sum(megabytes.values()))
    again = embed_stage.plan(options, one)["workers_together_download_megabytes"]
    assert set(again.values()) == {0}


def test_plan_says_what_workers_of_shards_download(night: Night, capfd: pytest.CaptureFixture[str]) -> None:
    def plan(out: str) -> dict[str, Any]:
        places = ["--data", f"{PLACE}/data", "--store", f"{PLACE}/store", "--out", f"{PLACE}/{out}"]
        before = {found.path for found in objects.list_objects(f"{PLACE}/")}
        assert cli.main(["shards", *places, "--attribution_hours=6", "--plan", "--json"]) == 0
        assert {found.path for found in objects.list_objects(f"{PLACE}/")} == before
        said: dict[str, Any] = json.loads(capfd.readouterr().out.strip().splitlines()[-1])
        return said

    first, next_night = plan("new"), plan("shards")
    sizes = sum((night.submitter / "city" / "data" / f"{name}.parquet").stat().st_size for name in ("clicks", "orders"))
    # A file is its row groups, and a footer.
    assert 0.8 * sizes < 1e6 * first["workers_together_download_megabytes"]["logs"] < sizes
    assert first["contents_to_copy"] == 8 and first["contents_kept"] == 0
    assert first["workers_together_download_megabytes"]["embeddings"] > 0
    assert first["log_rows_kept"] == first["days_kept"] == 0

    # Both logs have a row that is rejected, so all of them is read again.
    assert next_night["log_rows_to_read"] == first["log_rows_to_read"]
    assert next_night["days_kept"] > 0 and next_night["clicks_to_build"] < first["clicks_to_build"]
    assert next_night["contents_to_copy"] == 0 and next_night["contents_kept"] == 8
    megabytes = next_night["workers_together_download_megabytes"]
    assert megabytes["embeddings"] == 0 and megabytes["open_days"] > 0
