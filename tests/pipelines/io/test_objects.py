"""Objects of gs:// and s3://, against real servers on loopback."""

import io
import multiprocessing
import os
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.support.counting_proxy import CountingProxy
from pipelines.io import files, object_client, objects
from pipelines.io.object_client import PART, SOCKETS, ChangedError
from pipelines.io.object_file import TAIL
from schemas.errors import InputError
from tests.support.object_stores import ENDPOINTS, LocalStores

WRITERS = 16
SLASHES = ["a//b", "back\\slash.txt"]
"""Names as well, but SeaweedFS, which keeps objects in folders, takes them for a/b and back/slash.txt"""
ODD_NAMES = ["[1]*?.txt", "space and ümläut.txt", "%41#;&=+.txt", "'\".txt", "nested/x/y.txt", "日本.txt"]


@pytest.fixture(params=["gs", "s3"])
def proxy(request: pytest.FixtureRequest, stores: LocalStores, monkeypatch: pytest.MonkeyPatch) -> CountingProxy:
    monkeypatch.setattr(object_client, "FIRST_WAIT", 0.01)
    found = stores.proxies[request.param]
    found.clear()
    return found


@pytest.fixture
def place(request: pytest.FixtureRequest, proxy: CountingProxy, stores: LocalStores) -> str:
    """A prefix of this test's own."""
    scheme = next(name for name, found in stores.proxies.items() if found is proxy)
    place = f"{scheme}://camenn/{uuid.uuid4().hex}"
    # The client is made, and the bucket seen: what follows are a test's own requests.
    objects.put(f"{place}-ready", b"")
    proxy.clear()
    return place


def names(place: str) -> list[str]:
    return [found.path for found in objects.list_objects(f"{place}/")]


@pytest.mark.objects
def test_operations_take_one_request_each(place: str, proxy: CountingProxy) -> None:
    token = objects.put(f"{place}/a", b"0123456789")
    found = objects.stat(f"{place}/a")
    assert (found.path, found.bytes, found.token) == (f"{place}/a", 10, token)
    assert objects.read(f"{place}/a") == [b"0123456789"]
    assert objects.read(f"{place}/a", [(2, 5)], token) == [b"234"]
    for most, end in ((3, b"789"), (100, b"0123456789")):
        (end_of, data) = objects.read_end(f"{place}/a", most)
        assert (end_of.bytes, end_of.token, data) == (10, token, end)
    assert list(objects.list_objects(f"{place}/")) == [found]
    objects.delete([f"{place}/a"])
    assert len(proxy.requests) == 8
    assert not objects.exists(f"{place}/a") and names(place) == []
    objects.delete([f"{place}/a"])
    assert proxy.sockets <= SOCKETS


@pytest.mark.objects
def test_what_is_missing_is_named(place: str) -> None:
    scheme = place.partition("://")[0]
    for request in (objects.stat, objects.read, lambda path: objects.read_end(path, TAIL)):
        with pytest.raises(FileNotFoundError) as missing:
            request(f"{place}/none")
        assert missing.value.filename == f"{place}/none"
    nowhere = f"{scheme}://no-such-bucket-here"
    requests: list[Callable[[], object]] = [
        lambda: objects.stat(f"{nowhere}/a"),
        lambda: objects.read(f"{nowhere}/a"),
        lambda: objects.read_end(f"{nowhere}/a", TAIL),
        lambda: objects.put(f"{nowhere}/a", b""),
        lambda: objects.put_if(f"{nowhere}/a", b""),
        lambda: list(objects.list_objects(f"{nowhere}/")),
    ]
    for call in requests:
        with pytest.raises(InputError, match=rf"^{nowhere}: there is no such bucket at http.*Check the name"):
            call()
    with pytest.raises(InputError, match="is no object's address"):
        objects.stat(f"{scheme}:///name")


@pytest.mark.objects
def test_names_are_taken_literally(place: str) -> None:
    odd = ODD_NAMES + (SLASHES if place.startswith("gs") else [])
    paths = [f"{place}/{name}" for name in odd]
    for number, path in enumerate(paths):
        objects.put(path, str(number).encode())
    objects.put(f"{place}/1X.txt", b"what [1]*? would match as a pattern")
    assert sorted(names(place)) == sorted([*paths, f"{place}/1X.txt"])
    for number, path in enumerate(paths):
        assert objects.read(path) == [str(number).encode()] and objects.stat(path).path == path
    assert [found.path for found in objects.list_objects(f"{place}/[1]")] == [f"{place}/[1]*?.txt"]
    objects.delete(paths)
    assert names(place) == [f"{place}/1X.txt"]


@pytest.mark.objects
def test_empty_objects_are_objects(place: str) -> None:
    path = f"{place}/empty"
    objects.put(path, b"")
    assert objects.stat(path).bytes == 0 and objects.read(path) == [b""] and names(place) == [path]
    with objects.open_read(path) as handle:
        assert handle.seek(0, os.SEEK_END) == 0 and handle.read(10) == b"" and handle.read() == b""
    with objects.upload(path):
        pass
    assert objects.stat(path).bytes == 0


@pytest.mark.objects
def test_a_thousand_objects_take_one_request(place: str, proxy: CountingProxy) -> None:
    paths = [f"{place}/{number:04}" for number in range(1203)]
    sockets = proxy.sockets
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda path: objects.put(path, b""), paths))
    proxy.clear()
    assert names(place) == paths
    assert proxy.methods == ["GET", "GET"]
    proxy.clear()
    objects.delete(paths)
    assert len(proxy.requests) == (2 if place.startswith("s3") else len(paths))
    assert names(place) == []
    # However many threads there are.
    assert proxy.sockets <= sockets + SOCKETS


@pytest.mark.objects
def test_of_many_writers_one_creates_an_object(place: str) -> None:
    for path in (f"{place}/{number}" for number in range(5)):
        assert _race(path, None) == 1


@pytest.mark.objects
def test_of_many_writers_one_replaces_a_version(place: str) -> None:
    token = objects.put(f"{place}/a", b"first")
    for _ in range(5):
        assert _race(f"{place}/a", token) == 1
        assert objects.stat(f"{place}/a").token != token
        token = objects.stat(f"{place}/a").token
    with pytest.raises(ChangedError):
        objects.put_if(f"{place}/none", b"", token)
    assert not objects.exists(f"{place}/none")


def _race(path: str, token: str | None) -> int:
    """Let all write at once; the object must be the one winner's. Returns how many won."""
    gate = threading.Barrier(WRITERS)
    # Bytes of an earlier round would bring its token back on s3.
    data = [uuid.uuid4().bytes for _ in range(WRITERS)]

    def write(number: int) -> tuple[int, str | None]:
        gate.wait()
        try:
            return number, objects.put_if(path, data[number], token)
        except ChangedError as error:
            assert error.filename == path
            return number, None

    with ThreadPoolExecutor(WRITERS) as pool:
        won = [(number, written) for number, written in pool.map(write, range(WRITERS)) if written]
    assert objects.read(path) == [data[won[0][0]]] and objects.stat(path).token == won[0][1]
    return len(won)


@pytest.mark.objects
@pytest.mark.parametrize("size", [0, 10, PART, PART + 1, 3 * PART + 5])
def test_uploads_of_any_size_are_whole(place: str, size: int) -> None:
    data = np.random.default_rng(size).bytes(size)
    with objects.upload(f"{place}/big") as sink:
        for start in range(0, size, 3_000_000):
            assert not objects.exists(f"{place}/big")
            sink.write(memoryview(data)[start : start + 3_000_000])
    assert objects.read(f"{place}/big") == [data]


@pytest.mark.objects
@pytest.mark.parametrize("size", [10, 2 * PART + 5])
def test_failed_uploads_change_nothing(place: str, proxy: CountingProxy, size: int) -> None:
    objects.put(f"{place}/old", b"old")
    for name in ("new", "old"):
        with pytest.raises(RuntimeError, match="full"), objects.upload(f"{place}/{name}") as sink:
            sink.write(bytes(size))
            raise RuntimeError("full")
    assert names(place) == [f"{place}/old"] and objects.read(f"{place}/old") == [b"old"]
    begun = [request for request in proxy.requests if request.method == "POST" and "upload" in request.path]
    dropped = [request for request in proxy.requests if request.method == "DELETE"]
    assert len(dropped) == (2 if size > PART else 0)
    if place.startswith("s3") and size > PART:
        assert len(begun) == 2
        import boto3

        left = boto3.client("s3").list_multipart_uploads(Bucket="camenn", Prefix=place.rpartition("/")[2])
        assert left.get("Uploads", []) == []


@pytest.mark.objects
def test_ranges_are_the_bytes_of_a_local_file(place: str, proxy: CountingProxy) -> None:
    data = np.random.default_rng(0).bytes(300_000)
    objects.put(f"{place}/a", data)
    random = np.random.default_rng(1)
    ranges = [(int(start), int(start + 1 + random.integers(5000))) for start in random.integers(0, 290_000, 20)]
    assert objects.read(f"{place}/a", ranges) == [data[start:stop] for start, stop in ranges]
    local = io.BytesIO(data)
    with objects.open_read(f"{place}/a") as handle:
        for _ in range(60):
            offset, size = int(random.integers(310_000)), int(random.integers(9000))
            assert handle.seek(offset) == local.seek(offset)
            assert handle.read(size) == local.read(size) and handle.tell() == offset + len(data[offset : offset + size])
        handle.seek(-100, os.SEEK_END)
        assert handle.read() == data[-100:]
    proxy.clear()
    with objects.open_read(f"{place}/a") as handle:
        handle.seek(1000)
        handle.read(10)
        handle.seek(-8, os.SEEK_END)
        handle.read(8)
    # The end comes first: it tells the size.
    assert [request.bytes_out for request in proxy.requests] == [TAIL, 10]


@pytest.mark.objects
def test_pieces_are_of_one_version(place: str) -> None:
    objects.put(f"{place}/a", bytes(200_000))
    with objects.open_read(f"{place}/a") as handle:
        handle.read(10)
        objects.put(f"{place}/a", bytes([1]) * 200_000)
        with pytest.raises(ChangedError, match="another process"):
            handle.read(10)


@pytest.mark.objects
def test_parquet_reads_what_it_needs(place: str, proxy: CountingProxy) -> None:
    rows = 40_000
    random = np.random.default_rng(0)
    table = pa.table({"key": [f"{n:040}" for n in range(rows)], "wide": [random.bytes(200) for _ in range(rows)]})
    with objects.upload(f"{place}/t.parquet") as sink:
        pq.write_table(table, files.Sink(cast(BinaryIO, sink)), row_group_size=4000)
    size = objects.stat(f"{place}/t.parquet").bytes
    assert size > PART
    proxy.clear()
    with objects.open_read(f"{place}/t.parquet") as handle:
        keys = pq.ParquetFile(handle, pre_buffer=True).read(columns=["key"])
    assert keys == table.select(["key"])
    # The footer, and a range for each of ten row groups.
    assert len(proxy.requests) <= 11 and proxy.bytes_out < size / 8
    proxy.clear()
    with objects.open_read(f"{place}/t.parquet") as handle:
        assert pq.ParquetFile(handle, pre_buffer=True).read() == table
    assert proxy.bytes_out < 1.02 * size


@pytest.mark.objects
def test_files_of_objects_are_like_local_ones(place: str) -> None:
    store = f"{place}/s[1]"
    for name in (
        "a/part-1.json",
        "a/part-2.json",
        "a/part-1.parquet",
        "b/c/part-3.json",
        "t/x.parquet",
        "t/_y.parquet",
    ):
        files.write_document(files.join(store, name), {"name": name})
    files.write_document(files.join(place, "s1", "a", "part-9.json"), {})

    def below(pattern: str) -> list[str]:
        return sorted(found.path.removeprefix(f"{store}/") for found in files.match(store, pattern))

    assert below("a/part-*.json") == ["a/part-1.json", "a/part-2.json"]
    assert below("*/part-*.json") == ["a/part-1.json", "a/part-2.json"]
    assert below("**.json") == ["a/part-1.json", "a/part-2.json", "b/c/part-3.json"]
    assert files.read_document(f"{store}/a/part-1.json", {"name"}, "") == {"name": "a/part-1.json"}
    assert files.exists(f"{store}/a/part-1.json") and not files.exists(f"{store}/a/part-")
    assert files.has_table(f"{store}/t") and files.has_table(f"{store}/t/x") and not files.has_table(f"{store}/none")
    assert files.list_parquet(f"{store}/t", "t") == [f"{store}/t/x.parquet"]
    found = files.find([f"{store}/a/part-1.json", f"{store}/none", f"{store}/t/x.parquet"])
    assert [one.path for one in found] == [f"{store}/a/part-1.json", f"{store}/t/x.parquet"]
    with pytest.raises(RuntimeError), files.atomic_write(f"{store}/a/part-1.json") as sink:
        sink.write(b"half")
        raise RuntimeError
    assert files.read_document(f"{store}/a/part-1.json", {"name"}, "") == {"name": "a/part-1.json"}
    files.delete([f"{store}/a/part-1.json"])
    files.delete_directory(f"{store}/a")
    assert below("**") == ["b/c/part-3.json", "t/_y.parquet", "t/x.parquet"]
    assert names(f"{place}/s1") == [f"{place}/s1/a/part-9.json"]


@pytest.mark.objects
@pytest.mark.parametrize("fault", [429, 503, 500, "reset"])
def test_requests_that_fail_are_sent_again(place: str, proxy: CountingProxy, fault: int | str) -> None:
    writing = "POST" if place.startswith("gs") else "PUT"
    looking = "GET" if place.startswith("gs") else "HEAD"
    proxy.spoil(writing, fault, fault)
    token = objects.put_if(f"{place}/a", b"0123456789")
    proxy.spoil(looking, fault, fault)
    assert objects.stat(f"{place}/a").token == token
    proxy.spoil("GET", fault, fault)
    assert objects.read(f"{place}/a", [(3, 6)]) == [b"345"]
    proxy.spoil("GET", fault, fault)
    assert names(place) == [f"{place}/a"]
    proxy.spoil("POST" if place.startswith("s3") else "DELETE", fault)
    objects.delete([f"{place}/a"])
    assert names(place) == []


@pytest.mark.objects
def test_bytes_that_are_cut_off_are_read_again(place: str, proxy: CountingProxy) -> None:
    data = np.random.default_rng(0).bytes(100_000)
    objects.put(f"{place}/a", data)
    proxy.spoil("GET", "short", "short")
    assert objects.read(f"{place}/a") == [data]
    proxy.spoil("GET", "short", "short")
    assert objects.read(f"{place}/a", [(5, 90_000)]) == [data[5:90_000]]
    proxy.spoil("GET", "short", "short")
    assert objects.read_end(f"{place}/a", TAIL)[1] == data[-TAIL:]


@pytest.mark.objects
def test_a_lost_answer_does_not_lose_the_race(place: str, proxy: CountingProxy) -> None:
    writing = "POST" if place.startswith("gs") else "PUT"
    proxy.spoil(writing, "lost", 503)
    token = objects.put_if(f"{place}/a", b"mine")
    assert objects.stat(f"{place}/a").token == token
    proxy.spoil(writing, 503)
    with pytest.raises(ChangedError):
        objects.put_if(f"{place}/a", b"mine")
    proxy.spoil(writing, "lost")
    assert objects.put_if(f"{place}/a", b"again", token) == objects.stat(f"{place}/a").token


@pytest.mark.objects
@pytest.mark.parametrize("fault", [503, "reset"])
def test_parts_that_fail_are_sent_again(place: str, proxy: CountingProxy, fault: int | str) -> None:
    data = np.random.default_rng(0).bytes(3 * PART + 5)
    proxy.spoil("PUT", fault)
    with objects.upload(f"{place}/a") as sink:
        sink.write(data[:PART])
        sink.write(data[PART : 2 * PART + 1])
        if place.startswith("s3"):
            proxy.spoil("PUT", fault)
        sink.write(data[2 * PART + 1 :])
        if place.startswith("s3"):
            proxy.spoil("POST", "lost", fault)
    assert objects.read(f"{place}/a") == [data]


@pytest.mark.objects
def test_a_store_that_stays_away_ends_it(place: str, proxy: CountingProxy) -> None:
    proxy.spoil("GET", *[503] * object_client.ATTEMPTS)
    with pytest.raises(InputError, match=rf"^{place}/a: the store does not answer.*503.*then run again"):
        objects.read(f"{place}/a")
    assert len(proxy.requests) == object_client.ATTEMPTS


@pytest.mark.objects
def test_a_store_that_refuses_is_reported(place: str, proxy: CountingProxy) -> None:
    proxy.spoil("GET", 403)
    with pytest.raises(PermissionError, match="refuses access") as refused:
        objects.read(f"{place}/a")
    assert refused.value.filename == f"{place}/a"


@pytest.mark.objects
def test_wrong_keys_are_refused(stores: LocalStores, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", stores.proxies["s3"].url + "/")
    with pytest.raises(PermissionError, match="403"):
        objects.stat("s3://camenn/a")
    with pytest.raises(PermissionError, match="SignatureDoesNotMatch"):
        list(objects.list_objects("s3://camenn/a"))


@pytest.mark.objects
def test_a_store_without_conditions_is_refused(stores: LocalStores) -> None:
    stores.proxies["s3"].clear()
    stores.proxies["s3"].spoil("PUT", 501)
    with pytest.raises(InputError, match="no conditional writes"):
        objects.put_if("s3://camenn/x", b"")


def _read_in_child(path: str, answers: "multiprocessing.Queue[list[bytes]]") -> None:
    answers.put(objects.read(path))


@pytest.mark.objects
def test_forked_and_spawned_processes_make_their_own_client(place: str) -> None:
    objects.put(f"{place}/a", b"seen")
    for method in ("fork", "spawn"):
        context: Any = multiprocessing.get_context(method)
        answers: multiprocessing.Queue[list[bytes]] = context.Queue()
        child = context.Process(target=_read_in_child, args=(f"{place}/a", answers))
        child.start()
        assert answers.get(timeout=60) == [b"seen"]
        child.join()
    assert objects.read(f"{place}/a") == [b"seen"]


def test_libraries_are_imported_at_the_first_access(tmp_path: Path) -> None:
    code = (
        "import sys; import pipelines.io.objects, pipelines.cli; "
        "print([name for name in ('boto3', 'google.cloud.storage') if name in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


@pytest.mark.parametrize(("scheme", "library", "extra"), [("s3", "boto3", "aws"), ("gs", "google", "gcp")])
def test_a_missing_library_is_named_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, scheme: str, library: str, extra: str
) -> None:
    monkeypatch.setattr(objects, "_clients", {})
    monkeypatch.delitem(sys.modules, f"pipelines.io.object_{scheme}", raising=False)
    for name in [name for name in sys.modules if name == library or name.startswith(f"{library}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(InputError, match=rf"pip install 'camenn\[{extra}\]'"):
        objects.stat(f"{scheme}://bucket/a")


def test_only_two_schemes_are_objects() -> None:
    assert objects.is_object("gs://b/k") and objects.is_object("s3://b/k")
    assert not any(map(objects.is_object, ["/a/b", "a/gs", "hdfs://h/p", "gs:/b", ""]))
    assert set(ENDPOINTS) == set(objects.SCHEMES)


def test_a_browser_is_told_what_a_page_is(place: str) -> None:
    for name, size in (("small.html", 10), ("large.html", PART + 1), ("rows.parquet", 10)):
        with objects.upload(f"{place}/{name}") as upload:
            upload.write(b"x" * size)
        scheme, bucket, key = objects.split(f"{place}/{name}")
        client: Any = objects._client(scheme)
        if scheme == "s3":
            found = client._s3.head_object(Bucket=bucket, Key=key)["ContentType"]
        else:
            found = client._gs.bucket(bucket).get_blob(key).content_type
        assert found == ("text/html; charset=utf-8" if name.endswith(".html") else "application/octet-stream")
