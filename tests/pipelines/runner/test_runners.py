"""The same rows and model on every runner, with any number of workers, after a worker or a TaskManager was killed."""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from camenn_model.package import open_package
from pipelines import cli
from tests.support.encoder_sources import minilm
from tests.support.flink_cluster import PROJECT, FlinkCluster, free_port, kill, start_camenn, wait_until
from tests.support.listeners import beyond_loopback, listeners, listening
from tests.support.published_rows import assert_same, assert_scores_close

SLOW = pytest.mark.slow

TWO_PROCESSES = ["--direct_num_workers=2", "--direct_running_mode=multi_processing"]


class Night:
    """A tiny city's commands; each call names its runner."""

    def __init__(self, root: Path) -> None:
        self.root, self.data = root, root / "data"

    def embed(self, store: str) -> list[str]:
        encoders = ["--image_weights", "random:0", "--text_encoder", minilm(), "--grid", "2", "--max_tokens", "16"]
        return ["embed", "--data", str(self.data), "--store", str(self.root / store), *encoders]

    def shards(self, out: str, store: str = "store") -> list[str]:
        places = ["--store", str(self.root / store), "--out", str(self.root / out)]
        return ["shards", "--data", str(self.data), *places]

    def score(self, out: str) -> list[str]:
        places = ["--store", str(self.root / "store"), "--model", str(self.root / "model")]
        return ["score", "--data", str(self.data), *places, "--out", str(self.root / out), "--top_k", "0"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FlinkCluster]:
    cluster = FlinkCluster(tmp_path_factory.mktemp("flink"))
    try:
        cluster.up()
        yield cluster
    finally:
        cluster.script("down")


@pytest.fixture(scope="module")
def night(tmp_path_factory: pytest.TempPathFactory) -> Night:
    """The city, and its outputs of one FnApiRunner worker: store, shards, model, scores."""
    night = Night(tmp_path_factory.mktemp("night"))
    for argv in (
        ["simulate", "--out", str(night.data), "--preset", "tiny"],
        night.embed("store"),
        night.shards("shards"),
        ["train", "--shards", str(night.root / "shards"), "--out", str(night.root / "model")],
        night.score("scores"),
    ):
        assert cli.main(argv) == 0
    return night


def assert_same_model(night: Night, shards: str, model: str) -> None:
    """A training on a shard set that another runner built gives a bitwise equal package."""
    argv = ["train", "--shards", str(night.root / shards), "--out", str(night.root / model)]
    assert cli.main(argv) == 0
    found, expected = (open_package(str(night.root / name)) for name in (model, "model"))
    assert found.version == expected.version
    for name in ("retrieval.json", "curves.csv"):
        assert (found.directory / name).read_bytes() == (expected.directory / name).read_bytes()


def test_two_processes_give_the_same_rows(night: Night) -> None:
    for argv in (night.embed("store-2"), night.shards("shards-2", "store-2"), night.score("scores-2")):
        assert cli.main([*argv, *TWO_PROCESSES]) == 0
    assert_same(night.root / "store-2", night.root / "store")
    assert_same(night.root / "shards-2", night.root / "shards")
    assert_same_model(night, "shards-2", "model-2")
    assert_scores_close(night.root / "scores-2", night.root / "scores")


@pytest.mark.flink
@pytest.mark.parametrize("parallelism", [2, pytest.param(4, marks=SLOW)])
def test_flink_gives_the_same_rows(night: Night, cluster: FlinkCluster, parallelism: int) -> None:
    flags = cluster.flags(parallelism)
    store, shards, scores, model = (f"{name}-flink-{parallelism}" for name in ("store", "shards", "scores", "model"))
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(listeners(process)) for process in (os.getpid(), *cluster.processes())]
        for argv in (night.embed(store), night.shards(shards, store), night.score(scores)):
            assert cli.main([*argv, *flags]) == 0
    kept = set().union(*(listening({process}) for process in cluster.processes()))
    assert all(opened[:1]) and kept, "a job server and a cluster listen"
    assert not beyond_loopback(kept.union(*opened))
    assert_same(night.root / store, night.root / "store")
    assert_same(night.root / shards, night.root / "shards")
    assert_same_model(night, shards, model)
    assert_scores_close(night.root / scores, night.root / "scores")


IN_THE_MIDDLE = {"embed": "runs/*/items/*.parquet", "shards": "contents/*/*/*.arrow"}
"""The file that a stage writes once its workers have read their input, with most of the work still to do."""


def running_job(cluster: FlinkCluster, before: str, command: subprocess.Popen[str], out: Path, pattern: str) -> str:
    """Id of the job that a command submits, once it is in the middle of its work."""

    def running() -> str:
        assert command.poll() is None, command.communicate()[1]
        job = cluster.newest_job()
        if not job or job["jid"] == before or job["state"] != "RUNNING":
            return ""
        return str(job["jid"]) if any(out.glob(pattern)) else ""

    return wait_until(running, 180, "the job to be in the middle")


@pytest.mark.slow
@pytest.mark.flink
@pytest.mark.parametrize(("stage", "victim"), [("embed", "worker"), ("shards", "taskmanager")])
def test_killed_in_the_middle_and_run_again(night: Night, cluster: FlinkCluster, stage: str, victim: str) -> None:
    cluster.up()
    out = f"{stage}-killed-{victim}"
    argv = [*getattr(night, stage)(out), *cluster.flags(2), "--json"]
    before = cluster.newest_job().get("jid", "")
    # Workers of the jobs before end some seconds after them.
    wait_until(lambda: not cluster.workers(), 60, "earlier workers to end")
    command = start_camenn(*argv)
    job = running_job(cluster, before, command, night.root / out, IN_THE_MIDDLE[stage])
    kill(cluster.workers()[0] if victim == "worker" else cluster.process("taskmanager-1"))
    _, errors = command.communicate(timeout=300)
    assert cluster.ask(f"jobs/{job}/exceptions")["exceptionHistory"]["entries"], "nothing was in the middle of anything"
    cluster.up()
    if command.returncode != 0:
        assert not (night.root / out / "latest.json").exists(), "a failed run changes nothing that is published"
        again = start_camenn(*argv)
        _, errors = again.communicate(timeout=300)
        assert again.returncode == 0, errors
    assert_same(night.root / out, night.root / {"embed": "store", "shards": "shards"}[stage])


@pytest.mark.flink
def test_a_worker_with_another_package_refuses(night: Night, cluster: FlinkCluster, tmp_path: Path) -> None:
    """For example a pool that was started before an upgrade."""
    for name in ("schemas", "camenn_model", "pipelines"):
        shutil.copytree(PROJECT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "pipelines" / "features" / "as_of.py").open("a") as source:
        source.write("\n# another version\n")
    port = free_port()
    pool = subprocess.Popen(
        [sys.executable, "-m", "pipelines.runner.worker_pool", "--port", str(port), "--logs", str(tmp_path / "logs")],
        cwd=tmp_path,
        stderr=subprocess.DEVNULL,
    )
    try:
        flags = [
            f"--environment_config=localhost:{port}" if "environment_config" in flag else flag
            for flag in cluster.flags(1)
        ]
        command = start_camenn(*night.shards("refused"), *flags)
        _, errors = command.communicate(timeout=300)
    finally:
        pool.terminate()
        pool.wait(30)
    assert command.returncode == 2, errors
    said = errors.strip().splitlines()[-1]
    assert said.startswith("camenn: error: worker on ") and "Install the same camenn" in said
    assert not (night.root / "refused" / "latest.json").exists()


@pytest.mark.flink
def test_bad_input_ends_a_flink_job_with_the_same_message(night: Night, cluster: FlinkCluster, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(night.data, data)
    orders = pq.read_table(data / "orders.parquet")
    broken = orders.set_column(
        orders.schema.get_field_index("user_id"), "user_id", pa.nulls(orders.num_rows, pa.string())
    )
    pq.write_table(broken, data / "orders.parquet")
    argv: list[Any] = ["shards", "--data", str(data), "--store", str(night.root / "store")]
    messages = []
    for name, flags in (("local", []), ("flink", cluster.flags(2))):
        command = start_camenn(*argv, "--out", str(tmp_path / name), *flags)
        _, errors = command.communicate(timeout=300)
        assert command.returncode == 2, errors
        messages.append(errors[errors.index("camenn: error:") :].strip())
    assert messages[0] == messages[1]
    assert "user_id" in messages[0]
