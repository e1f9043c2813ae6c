"""Leases: what `flock` is on a local disk, on gs:// and s3://."""

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from benchmarks.support.counting_proxy import CountingProxy
from pipelines import cli
from pipelines.io import files, lease, object_client, objects
from pipelines.io.lease import InUseError, Lease, LostLeaseError
from pipelines.ops import doctor
from schemas.errors import InputError
from tests.support.object_stores import LocalStores

ROOT = Path(__file__).resolve().parents[3]
SCHEMES = ("gs", "s3")


def place_in(scheme: str) -> str:
    return f"{scheme}://camenn/{uuid.uuid4().hex}"


@pytest.fixture(params=SCHEMES)
def root(request: pytest.FixtureRequest, stores: LocalStores, monkeypatch: pytest.MonkeyPatch) -> str:
    """An output of this test's own."""
    monkeypatch.setattr(object_client, "FIRST_WAIT", 0.01)
    stores.proxies[request.param].clear()
    return place_in(request.param)


@pytest.fixture
def proxy(root: str, stores: LocalStores) -> Iterator[CountingProxy]:
    proxy = stores.proxies[root.partition("://")[0]]
    yield proxy
    proxy.without_conditions = False


def put_method(root: str) -> str:
    return "POST" if root.startswith("gs") else "PUT"


def read(root: str) -> "lease._Found":
    found = lease._read(f"{root}/{lease.LEASE}")
    assert found is not None
    return found


@pytest.mark.objects
def test_one_of_eight_contenders_holds_it(root: str) -> None:
    ready, done = threading.Barrier(8), threading.Barrier(8)

    def contend(_: int) -> str:
        ready.wait(20)
        try:
            with files.single_writer(root) as writer:
                done.wait(20)
                writer.check()
                return "held"
        except InUseError as refused:
            done.wait(20)
            return str(refused)

    with ThreadPoolExecutor(8) as pool:
        for epoch in (1, 2):
            ended = list(pool.map(contend, range(8)))
            refused = [words for words in ended if words != "held"]
            assert len(refused) == 7 and all("other camenn process" in words for words in refused)
            # Released, not removed: the next holder counts on.
            assert read(root).epoch == epoch and read(root).free
    with files.single_writer(root), pytest.raises(InUseError, match=rf"\(process {os.getpid()} on .*lease ends 20"):
        files.single_writer(root).__enter__()


@pytest.mark.objects
def test_it_takes_few_requests(root: str, proxy: CountingProxy) -> None:
    objects.exists(root)
    proxy.clear()
    with files.single_writer(root) as writer:
        # Looked for, written, and two writes that the store must refuse.
        assert len(proxy.requests) == 4
        for _ in range(100):
            writer.check()
        assert len(proxy.requests) == 4
    assert len(proxy.requests) == 5
    assert [found.path for found in objects.list_objects(f"{root}/")] == [f"{root}/{lease.LEASE}"]


@pytest.mark.objects
def test_errors_release_it(root: str) -> None:
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), files.single_writer(root):
            raise error
        assert read(root).free


@contextlib.contextmanager
def wait_for(root: str) -> Iterator[lease.Writer]:
    """Hold an output as soon as it is free."""
    end = time.monotonic() + 20
    while True:
        with contextlib.ExitStack() as stack:
            try:
                writer = stack.enter_context(files.single_writer(root))
            except InUseError:
                assert time.monotonic() < end
                time.sleep(0.2)
                continue
            yield writer
            return


SLEEPER = """
import sys
from pipelines.io import files, lease
from pipelines.runs import garbage
from pipelines.runs.manifest import Manifest
from pipelines.runs.publication import Position, publish
from schemas.errors import InputError

lease.TTL, lease.RENEW = 1.0, 0.3
held = []
for root in sys.argv[1:3]:
    writer = files.single_writer(root)
    held.append((root, writer, writer.__enter__(), Position.of(root)))
print("holds", flush=True)
sys.stdin.readline()
for root, manager, writer, position in held:
    for work in (writer.check, lambda: publish(root, Manifest(stage="score", run="late"), position, writer)):
        try:
            work()
            print("NOT REFUSED")
        except lease.LostLeaseError as error:
            print(error)
    manager.__exit__(None, None, None)
print("told", flush=True)
for root in sys.argv[3:5]:
    held.append(files.single_writer(root))
    held[-1].__enter__()
print("holds", flush=True)
sys.stdin.readline()
"""


@pytest.mark.objects
def test_who_sleeps_is_told_and_who_dies_is_replaced_at_once(stores: LocalStores) -> None:
    asleep, dead = [place_in(scheme) for scheme in SCHEMES], [place_in(scheme) for scheme in SCHEMES]
    with subprocess.Popen(
        [sys.executable, "-c", SLEEPER, *asleep, *dead],
        cwd=ROOT,
        env={**os.environ, **stores.environment(), "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        try:
            assert holder.stdin is not None and holder.stdout is not None
            assert holder.stdout.readline() == "holds\n"
            # While it is awake it renews.
            time.sleep(2.5)
            for root in asleep:
                with pytest.raises(InUseError, match=rf"\(process {holder.pid} on"):
                    files.single_writer(root).__enter__()
            holder.send_signal(signal.SIGSTOP)
            for root in asleep:
                with wait_for(root) as writer:
                    assert read(root).epoch == 2
                    if root == asleep[-1]:
                        holder.send_signal(signal.SIGCONT)
                        holder.stdin.write("\n")
                        holder.stdin.flush()
                        told = [holder.stdout.readline() for _ in range(5)]
                        # Its release leaves this lease alone.
                        writer.check()
                        assert not read(root).free
            assert told[-1] == "told\n"
            for line, root in zip(told[:4], [asleep[0], asleep[0], asleep[1], asleep[1]], strict=True):
                assert line.startswith(f"{root}: another camenn process (process {os.getpid()} on")
                assert "for more than 1 s. It removed and published nothing more" in line
            assert not any(objects.exists(f"{root}/latest.json") for root in asleep)

            assert holder.stdout.readline() == "holds\n"
            for root in dead:
                with pytest.raises(InUseError):
                    files.single_writer(root).__enter__()
        finally:
            holder.kill()
    begun = time.monotonic()
    for root in dead:
        # Not by time: as if its lease ran for an hour.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(lease, "store_time", lambda path: 0.0)
            with files.single_writer(root):
                assert read(root).epoch == 2
    assert time.monotonic() - begun < 5


def test_only_a_process_of_this_machine_is_known_to_be_gone() -> None:
    here = lease._this_process()
    if here is None:
        pytest.skip("this system does not tell")
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    assert not lease._is_gone(here)
    assert lease._is_gone(here | {"pid": gone.pid})
    # Its number is another process's by now.
    assert lease._is_gone(here | {"started": "1"})
    for name in ("boot", "host", "namespace"):
        assert not lease._is_gone(here | {"pid": gone.pid, name: "another"})
    others: list[Any] = [None, [], {}, here | {"pid": None}, here | {"pid": 0}, here | {"pid": -1}]
    for other in others:
        assert not lease._is_gone(other)


@pytest.mark.objects
def test_answers_that_are_lost_lose_no_lease(root: str, proxy: CountingProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    objects.exists(root)
    proxy.spoil(put_method(root), "lost")
    with files.single_writer(root) as writer:
        monkeypatch.setattr(lease, "RENEW", 0.0)
        for _ in range(3):
            proxy.spoil(put_method(root), "lost", 503, "lost")
            writer.check()
        # Every answer is lost, so that nobody knows the token of what was written: the holder's name tells.
        monkeypatch.setattr(object_client, "ATTEMPTS", 1)
        proxy.spoil(put_method(root), "lost")
        with pytest.raises(InputError, match="the store does not answer"):
            writer.check()
        writer.check()
        monkeypatch.setattr(object_client, "ATTEMPTS", 8)
        proxy.spoil(put_method(root), "lost")
    assert read(root).free
    proxy.clear()


@pytest.mark.objects
def test_a_lease_that_was_removed_is_lost(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with files.single_writer(root) as writer:
        objects.delete([f"{root}/{lease.LEASE}"])
        writer.check()
        monkeypatch.setattr(lease, "RENEW", 0.0)
        for _ in range(2):
            with pytest.raises(LostLeaseError, match="the lease was removed"):
                writer.check()
    assert not objects.exists(f"{root}/{lease.LEASE}")


@pytest.mark.objects
def test_what_is_no_lease_is_not_taken(root: str) -> None:
    objects.put(f"{root}/{lease.LEASE}", b"{}")
    with pytest.raises(InputError, match=r"/\.lease: is no lease of camenn .*remove it"):
        files.single_writer(root).__enter__()
    with pytest.raises(InputError, match="there is no such bucket"):
        files.single_writer(f"{root.partition('://')[0]}://no-such-bucket-here/a").__enter__()


@pytest.mark.objects
def test_it_is_one_process_s_own(root: str) -> None:
    with files.single_writer(root) as writer:
        assert isinstance(writer, Lease)
        with pytest.raises(TypeError, match="one process"):
            pickle.dumps(writer)
        child = os.fork()
        if child == 0:
            # As where a forked worker ends through the block.
            code = 1
            try:
                writer.release()
                writer.check()
            except RuntimeError:
                code = 0
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        writer.check()
        assert not read(root).free


@pytest.mark.objects
def test_a_store_that_ignores_conditions_is_refused(
    root: str, proxy: CountingProxy, capsys: pytest.CaptureFixture[str]
) -> None:
    found = doctor.check_store(root)
    assert found.status == doctor.OK and "conditional writes hold" in found.found and "ms a request" in found.found
    proxy.without_conditions = True
    words = "the store has no conditional writes, without which two writers at once would harm each other"
    with pytest.raises(InputError, match=words):
        files.single_writer(root).__enter__()
    assert cli.main(["doctor", "--out", root]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"camenn: error: {root}: {words}") and shown.count("\n") == 1
    proxy.without_conditions = False
    assert list(objects.list_objects(f"{root}/")) == []


@pytest.mark.objects
def test_a_store_that_ignores_versions_alone_is_refused(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    put_if = objects.put_if

    def by_absence_alone(path: str, data: bytes, token: str | None = None) -> str:
        return put_if(path, data) if token is None else objects.put(path, data)

    monkeypatch.setattr(objects, "put_if", by_absence_alone)
    for use in (lambda: files.single_writer(root).__enter__(), lambda: doctor.check_store(root)):
        with pytest.raises(InputError, match="no conditional writes"):
            use()
