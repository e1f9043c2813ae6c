"""The worker pool from a runner's side, and the package check of every DoFn."""

import importlib.metadata
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import apache_beam as beam
import grpc
import pytest
from apache_beam.portability.api import beam_fn_api_pb2, beam_fn_api_pb2_grpc, endpoints_pb2

from pipelines.io.errors import input_error_behind
from pipelines.runner import worker_version
from pipelines.runner.loopback import TABLES, loopback_addresses
from pipelines.runner.worker_version import check_package, guard, package_fingerprint
from schemas.errors import InputError
from tests.support.flink_cluster import PROJECT, free_port, wait_until
from tests.support.listeners import beyond_loopback, listening


class Pool:
    """A pool in a process of its own, and a runner's side of it."""

    def __init__(self, logs: Path, program: tuple[str, ...] = ("-m", "pipelines.runner.worker_pool")) -> None:
        self.logs, self.port = logs, free_port()
        self.process = subprocess.Popen(
            [sys.executable, *program, "--port", str(self.port), "--logs", str(logs)],
            cwd=PROJECT,
            stderr=subprocess.PIPE,
            text=True,
        )
        channel = grpc.insecure_channel(f"127.0.0.1:{self.port}", options=[("grpc.enable_http_proxy", 0)])
        grpc.channel_ready_future(channel).result(timeout=60)
        self.calls = beam_fn_api_pb2_grpc.BeamFnExternalWorkerPoolStub(channel)

    def start_worker(self, port: int) -> None:
        address = endpoints_pb2.ApiServiceDescriptor(url=f"localhost:{port}")
        answer = self.calls.StartWorker(beam_fn_api_pb2.StartWorkerRequest(worker_id="1-1", control_endpoint=address))
        assert not answer.error

    def workers(self) -> list[str]:
        found = subprocess.run(["pgrep", "-P", str(self.process.pid)], capture_output=True, text=True, check=False)
        return found.stdout.split()

    def stop(self) -> str:
        self.process.terminate()
        return self.process.communicate(timeout=60)[1]


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Pool]:
    pool = Pool(tmp_path / "logs")
    yield pool
    if pool.process.poll() is None:
        pool.stop()


def test_pool_ends_a_worker_when_its_runner_is_gone_and_no_other(pool: Pool) -> None:
    """Two TaskManagers of one machine both call their worker 1-1."""
    runners = [socket.create_server(("localhost", 0)) for _ in range(2)]
    for runner in runners:
        pool.start_worker(runner.getsockname()[1])
    pool.calls.StopWorker(beam_fn_api_pb2.StopWorkerRequest(worker_id="1-1"))
    assert len(pool.workers()) == 2
    runners[0].close()
    wait_until(lambda: len(pool.workers()) == 1, 60, "the first runner's worker to end")
    assert len(list(pool.logs.glob("worker-*.log"))) == 2
    said = pool.stop()
    assert "worker 1-1" in said and f"camenn package {package_fingerprint()}" in said
    runners[1].close()


def test_pool_ends_its_workers_with_itself(pool: Pool) -> None:
    with socket.create_server(("localhost", 0)) as runner:
        pool.start_worker(runner.getsockname()[1])
        (worker,) = pool.workers()
        pool.stop()
        assert subprocess.run(["ps", "-p", worker], capture_output=True, check=False).returncode != 0


def test_pool_listens_on_loopback_and_says_when_a_port_is_taken(pool: Pool) -> None:
    if Path(TABLES[0]).exists():
        sockets = listening({pool.process.pid})
        assert {port for _, port in sockets} == {pool.port}
        assert len(sockets) == len(loopback_addresses()) and not beyond_loopback(sockets)
    second = subprocess.run(
        [sys.executable, "-m", "pipelines.runner.worker_pool", "--port", str(pool.port), "--logs", str(pool.logs)],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert second.returncode == 2
    assert "is in use" in second.stderr


OTHERS_ONLY = """
import sys
from pipelines.runner import loopback, worker_pool
loopback.served_users = lambda: {4242}
sys.exit(worker_pool.main(sys.argv[1:]))
"""


@pytest.mark.skipif(not Path(TABLES[0]).exists(), reason="the system has no table of connections")
def test_pool_starts_no_worker_for_another_user(tmp_path: Path) -> None:
    pool = Pool(tmp_path / "logs", program=("-c", OTHERS_ONLY))
    try:
        with pytest.raises(grpc.RpcError) as refused:
            pool.start_worker(1)
        assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED
        assert not pool.workers() and not list(pool.logs.iterdir())
    finally:
        said = pool.stop()
    assert "refused ipv4:127.0.0.1" in said


class Double(beam.DoFn):
    def setup(self) -> None:
        self.factor = 2

    def process(self, element: int) -> Iterator[int]:
        yield self.factor * element


def test_every_dofn_brings_the_check_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build() -> beam.Pipeline:
        pipeline = beam.Pipeline(runner="FnApiRunner")
        double = Double()  # type: ignore[no-untyped-call]  # Beam's own __init__ has no annotations
        doubled = pipeline | beam.Create([1, 2]) | beam.ParDo(double) | beam.Map(str)
        _ = doubled | beam.io.WriteToText(str(tmp_path / "doubled"))
        guard(pipeline)
        return pipeline

    build().run().wait_until_finish()
    lines = [line for path in tmp_path.glob("doubled*") for line in path.read_text().splitlines()]
    assert sorted(lines) == ["2", "4"]
    pipeline = build()
    monkeypatch.setattr(worker_version, "package_fingerprint", lambda: "another")
    words = "worker on .* has camenn package another .*was submitted with .*Install the same"
    with pytest.raises(Exception, match=words) as caught:
        pipeline.run().wait_until_finish()
    assert isinstance(input_error_behind(caught.value), InputError)


def test_fingerprint_ignores_a_librarys_build_but_not_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def fingerprint(torch: str) -> str:
        monkeypatch.setattr(importlib.metadata, "version", lambda name: torch if name == "torch" else "1.0")
        return worker_version.package_fingerprint.__wrapped__()

    assert fingerprint("2.15.0+cpu") == fingerprint("2.15.0") != fingerprint("2.16.0")
    monkeypatch.undo()
    check_package(package_fingerprint())


@pytest.mark.parametrize("module", ["pipelines/cli.py", "pipelines/features/as_of.py", "camenn_model/model/towers.py"])
def test_a_change_of_any_module_is_another_package(tmp_path: Path, module: str) -> None:
    for name in ("schemas", "camenn_model", "pipelines"):
        shutil.copytree(PROJECT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))

    def fingerprint() -> str:
        script = "from pipelines.runner.worker_version import package_fingerprint as f; print(f())"
        return subprocess.check_output([sys.executable, "-c", script], cwd=tmp_path, text=True).strip()

    assert fingerprint() == package_fingerprint()
    with (tmp_path / module).open("a") as source:
        source.write("\n# another version\n")
    assert fingerprint() != package_fingerprint()
