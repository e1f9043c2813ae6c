"""Copies of objects on this machine: made once, whole or not at all, and forgotten in time."""

import errno
import os
import subprocess
import sys
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from benchmarks.support.counting_proxy import CountingProxy
from camenn_model.integrity import DamagedError
from camenn_model.published import ListedFile
from pipelines.io import cache, files, objects
from pipelines.io.errors import explain_system_error
from pipelines.io.files import Written
from pipelines.io.object_client import ChangedError
from schemas.errors import InputError
from tests.support.object_stores import LocalStores

pytestmark = [pytest.mark.slow, pytest.mark.objects]
AGAIN = "Run it again."
READ = """
import pathlib, sys
from pipelines.io import cache

cache._hold(pathlib.Path(sys.argv[1]))
print(1, flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CAMENN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CAMENN_CACHE_GB", raising=False)
    cache._forget_unused.cache_clear()
    return tmp_path / "cache"


@pytest.fixture(params=["gs", "s3"])
def root(request: pytest.FixtureRequest, stores: LocalStores) -> str:
    return f"{request.param}://camenn/{uuid.uuid4().hex}/scores"


def proxy_of(stores: LocalStores, root: str) -> CountingProxy:
    return stores.proxies[root[:2]]


def write(root: str, name: str, data: bytes) -> ListedFile:
    """Write a file of an output as stages do."""
    with cache.write_through(root, f"{root}/{name}") as sink:
        sink.write(data)
    written: Written = sink.written
    return ListedFile(f"{root}/{name}", written.bytes, written.sha256)


def put(root: str, name: str, data: bytes) -> ListedFile:
    """Write a file of an output from elsewhere: this machine has no copy."""
    entry = write(root, name, data)
    os.remove(cache.copy_path(root, entry.path))
    return entry


def test_a_copy_is_made_once(root: str, stores: LocalStores) -> None:
    sizes = (0, 1, cache.PIECE, 2 * cache.PIECE + 17)
    entries = [put(root, f"runs/R/part-{number}.arrow", os.urandom(size)) for number, size in enumerate(sizes)]
    proxy = proxy_of(stores, root)
    proxy.clear()
    # Eight readers at once, as the processes of one machine.
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: cache.local_copies(root, entries, AGAIN), range(8)))
    assert all(paths == found[0] for paths in found)
    for entry, path in zip(entries, found[0], strict=True):
        assert Path(path).read_bytes() == b"".join(objects.read(entry.path))
    reads = sum(request.bytes_out for request in proxy.requests if request.method == "GET")
    # Each was downloaded once, and read once more by this test.
    assert sum(sizes) * 2 <= reads < sum(sizes) * 2 + 10_000
    proxy.clear()
    assert cache.local_copies(root, entries, AGAIN) == found[0]
    assert proxy.requests == []


def test_a_writer_keeps_a_copy(root: str, stores: LocalStores) -> None:
    entry = write(root, "contents/part.arrow", b"x" * 100_000)
    proxy = proxy_of(stores, root)
    proxy.clear()
    (path,) = cache.local_copies(root, [entry], AGAIN)
    assert proxy.requests == []
    assert Path(path).read_bytes() == b"x" * 100_000


def test_a_damaged_copy_is_made_again(root: str) -> None:
    entry = write(root, "contents/part.arrow", b"x" * 1_000)
    copy = Path(cache.copy_path(root, entry.path))
    for damage in (b"x" * 999, b"y" * 1_000):
        copy.write_bytes(damage)
        assert cache.local_copies(root, [entry], AGAIN) == [str(copy)]
        assert copy.read_bytes() == b"x" * 1_000


@pytest.mark.parametrize("change", ["gone", "longer", "other"])
def test_a_damaged_object_is_told(root: str, change: str) -> None:
    entry = put(root, "contents/part.arrow", b"x" * 1_000)
    if change == "gone":
        objects.delete([entry.path])
    else:
        objects.put(entry.path, b"x" * 1_001 if change == "longer" else b"y" * 1_000)
    with pytest.raises(DamagedError, match=r"part\.arrow: .*\. .*"):
        cache.local_copies(root, [entry], AGAIN)
    assert not os.path.exists(cache.copy_path(root, entry.path))


@pytest.mark.parametrize("name", ["../other/part.arrow", "runs//part.arrow", "runs/./part.arrow"])
def test_a_manifest_cannot_name_other_places(root: str, name: str) -> None:
    with pytest.raises(DamagedError, match="is not in"):
        cache.local_copies(root, [ListedFile(f"{root}/{name}", 1, "")], AGAIN)


def test_a_write_that_fails_leaves_nothing(root: str, own_cache: Path) -> None:
    with pytest.raises(RuntimeError), cache.write_through(root, f"{root}/part.arrow") as sink:
        sink.write(b"half")
        raise RuntimeError
    assert not objects.exists(f"{root}/part.arrow")
    assert [path for path in own_cache.rglob("*") if path.is_file()] == []


def test_uploads_that_fail_leave_nothing(root: str, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error of a thread is the command's, and what waited behind it is not sent either."""

    def fail(local: str, path: str) -> None:
        raise OSError(errno.EIO, "no network", path)

    monkeypatch.setattr(cache, "upload_file", fail)
    with pytest.raises(OSError, match="no network"), cache.Uploads() as uploads:
        for number in range(4):
            with cache.write_through(root, f"{root}/part-{number}.arrow", uploads) as sink:
                sink.write(b"x" * 1_000)
    assert list(objects.list_objects(f"{root}/")) == []
    assert [path.name for path in own_cache.rglob("*.arrow*") if path.is_file()] == []


def test_a_changed_table_is_told(root: str) -> None:
    path = f"{root}/clicks.parquet"
    objects.put(path, b"x" * 100)
    found = files.find([path])
    objects.put(path, b"y" * 100)
    with pytest.raises(ChangedError) as raised:
        cache.keep_inputs(found)
    explained = explain_system_error(raised.value, [root])
    assert str(explained) == f"{path}: was written by another process meanwhile. Run again."


def test_inputs_are_copied_by_version(root: str, stores: LocalStores, monkeypatch: pytest.MonkeyPatch) -> None:
    path, proxy = f"{root}/clicks.parquet", proxy_of(stores, root)
    for version in (b"monday" * 1_000, b"tuesday" * 1_000):
        objects.put(path, version)
        cache.keep_inputs(files.find([path]))
        proxy.clear()
        for _ in range(3):
            with cache.open_input(path) as handle:
                assert handle.read() == version
        assert proxy.bytes_out < 3_000
    # What would take half of the limit is read by ranges.
    objects.put(path, b"wednesday")
    monkeypatch.setenv("CAMENN_CACHE_GB", "0.000000001")
    cache.keep_inputs(files.find([path]))
    proxy.clear()
    with cache.open_input(path) as handle:
        assert handle.read() == b"wednesday"
    assert "GET" in proxy.methods


def test_what_is_not_used_is_forgotten(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [write(root, f"part-{age}.arrow", b"x" * 1_000) for age in range(4)]
    copies = [Path(cache.copy_path(root, entry.path)) for entry in entries]
    for age, copy in enumerate(copies):
        used = os.stat(f"{copy}{cache.USED}").st_mtime - age * cache.IN_USE_S
        os.utime(f"{copy}{cache.USED}", (used, used))
    monkeypatch.setenv("CAMENN_CACHE_GB", "0.0000025")
    cache._forget_unused()
    assert [copy.exists() for copy in copies] == [True, True, False, False]
    # What a process reads stays, even if it was not used for days.
    reading = subprocess.Popen(
        [sys.executable, "-c", READ, cache.copy_root(root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert reading.stdin is not None and reading.stdout is not None
    reading.stdout.read(1)
    monkeypatch.setenv("CAMENN_CACHE_GB", "0")
    cache._forget_unused.cache_clear()
    cache._forget_unused()
    assert [copy.exists() for copy in copies] == [True, True, False, False]
    reading.communicate()
    # The last day's stay, whatever the limit.
    monkeypatch.setenv("CAMENN_CACHE_GB", "0")
    cache._forget_unused.cache_clear()
    cache._forget_unused()
    assert [copy.exists() for copy in copies] == [True, False, False, False]
    monkeypatch.setenv("CAMENN_CACHE_GB", "much")
    with pytest.raises(InputError, match="CAMENN_CACHE_GB=much"):
        cache.keep_inputs(files.find([entries[0].path]))


def test_no_room(root: str, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = put(root, "part.arrow", b"x")
    # Where a directory should be there is a file.
    monkeypatch.setenv("CAMENN_CACHE", str(own_cache / "full"))
    own_cache.mkdir(exist_ok=True)
    (own_cache / "full").mkdir()
    (own_cache / "full" / "objects").write_text("")
    with pytest.raises(InputError, match="CAMENN_CACHE"):
        cache.local_copies(root, [entry], AGAIN)
