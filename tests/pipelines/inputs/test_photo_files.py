"""The allowed addresses of photos, and the bytes read from them."""

import os
import socket
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.embed.resolve import ResolveItems
from pipelines.inputs import photo_files
from pipelines.inputs.photo_files import FileDefect, PhotoFiles, UriDefect, check_root_scheme, photo_status, resolve_uri
from pipelines.inputs.photos import Limits
from pipelines.io import objects
from pipelines.report.photos import Photos
from schemas.errors import InputError

BUCKET = "gs://bucket/photos"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root" / "a").mkdir(parents=True)
    (tmp_path / "root" / "a" / "1.jpg").write_bytes(b"1")
    (tmp_path / "root2").mkdir()
    (tmp_path / "root2" / "2.jpg").write_bytes(b"2")
    (tmp_path / "root" / "inside.jpg").symlink_to(tmp_path / "root" / "a" / "1.jpg")
    (tmp_path / "root" / "outside").symlink_to(tmp_path / "root2")
    return tmp_path / "root"


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where every store's library is installed."""
    monkeypatch.setattr(photo_files, "missing_library", lambda scheme: None)


def reason(uri: str, image_root: str, allow_absolute: bool = False) -> str:
    with pytest.raises(UriDefect) as caught:
        resolve_uri(uri, image_root, allow_absolute)
    assert "column 'image_uri'" in caught.value.detail and uri[:200] in caught.value.detail
    return caught.value.reason


# --- addresses


@pytest.mark.parametrize(
    "uri", ["a/1.jpg", "./a/1.jpg", "a/../a/1.jpg", "inside.jpg", "a/12:30.jpg", "missing.jpg", "%2e%2e/1.jpg"]
)
def test_resolve_uri_stays_under_the_root(root: Path, uri: str) -> None:
    assert resolve_uri(uri, str(root), False) == f"{root}/{uri}"


@pytest.mark.parametrize("uri", ["../root2/2.jpg", "a/../../root2/2.jpg", "outside/2.jpg", "/etc/hostname", ".."])
def test_resolve_uri_refuses_to_leave_the_root(root: Path, uri: str) -> None:
    with pytest.raises(UriDefect) as caught:
        resolve_uri(uri, str(root), False)
    assert caught.value.reason == "outside_root"
    assert "image_uri" in caught.value.detail and uri in caught.value.detail
    assert "--allow_absolute" in caught.value.detail
    assert resolve_uri(uri, str(root), True) == (uri if uri.startswith("/") else f"{root}/{uri}")


@pytest.mark.parametrize("uri", ["http://x/y.jpg", "HTTPS://x", "ftp://x", "data:image/png;base64,AA", "file:///x"])
def test_resolve_uri_refuses_other_schemes(root: Path, uri: str) -> None:
    for image_root in (str(root), BUCKET):
        assert reason(uri, image_root) == reason(uri, image_root, True) == "unsupported_scheme"


@pytest.mark.parametrize("uri", ["", "  ", "a\0b.jpg"])
def test_resolve_uri_refuses_what_is_no_path(root: Path, uri: str) -> None:
    for image_root in (str(root), BUCKET):
        assert reason(uri, image_root, True) == "malformed_uri"


@pytest.mark.parametrize(
    ("uri", "path"),
    [
        ("a/1.jpg", f"{BUCKET}/a/1.jpg"),
        (f"{BUCKET}/a/1.jpg", f"{BUCKET}/a/1.jpg"),
        ("GS://bucket/photos/1.jpg", f"{BUCKET}/1.jpg"),
        (f"{BUCKET}//1.jpg", f"{BUCKET}//1.jpg"),
        (f"{BUCKET}/50%.jpg", f"{BUCKET}/50%.jpg"),
        ("a b/..c/1...jpg", f"{BUCKET}/a b/..c/1...jpg"),
    ],
)
@pytest.mark.parametrize("image_root", [BUCKET, f"{BUCKET}/", "Gs://bucket/photos"])
def test_resolve_uri_finds_objects_under_the_root(libraries: None, uri: str, path: str, image_root: str) -> None:
    assert resolve_uri(uri, image_root, False) == path


@pytest.mark.parametrize(
    "uri",
    [
        "gs://other-bucket/photos/1.jpg",
        "gs://bucket/1.jpg",
        "gs://bucket/photos2/1.jpg",
        "gs://BUCKET/photos/1.jpg",
        "gs://bucket/Photos/1.jpg",
        "s3://bucket/photos/1.jpg",
    ],
)
def test_resolve_uri_refuses_other_buckets_and_prefixes(libraries: None, root: Path, uri: str) -> None:
    for image_root in (BUCKET, str(root)):
        assert reason(uri, image_root) == "outside_root"
        assert resolve_uri(uri, image_root, True) == uri
    assert reason("/etc/hostname", BUCKET) == "outside_root"
    assert resolve_uri("/etc/hostname", BUCKET, True) == "/etc/hostname"


@pytest.mark.parametrize(
    "name",
    ["../1.jpg", "a/../1.jpg", "a/..", "./1.jpg", "%2e%2e/1.jpg", "a/%2E./1.jpg", "a/.%2e", "..%2f1.jpg/%2e%2E/x"],
)
def test_resolve_uri_refuses_dots_in_an_object_store(libraries: None, name: str) -> None:
    for uri in (name, f"{BUCKET}/{name}"):
        assert reason(uri, BUCKET) == reason(uri, BUCKET, True) == "outside_root"


@pytest.mark.parametrize(
    "uri",
    [
        "gs://",
        "gs:///1.jpg",
        "gs://bucket",
        "gs://bucket/",
        "gs://bucket//",
        "gs://BUCKET@x/1.jpg",
        "s3://u:p@bucket/1.jpg",
        "gs://bucket:80/1.jpg",
        "gs://..//1.jpg",
        "gs://%62ucket/1.jpg",
    ],
)
def test_resolve_uri_refuses_addresses_of_no_object(libraries: None, root: Path, uri: str) -> None:
    for image_root in (BUCKET, str(root)):
        assert reason(uri, image_root) == reason(uri, image_root, True) == "malformed_uri"


HIDDEN = """
import sys
for name in ("boto3", "google.cloud.storage", "apitools"):
    sys.modules[name] = None
from pipelines.inputs.photo_files import UriDefect, check_root_scheme, resolve_uri
from schemas.errors import InputError
for scheme in ("gs", "s3"):
    try:
        print(resolve_uri(f"{scheme}://bucket/1.jpg", "/photos", True))
    except UriDefect as defect:
        print(defect)
    try:
        print(check_root_scheme(f"{scheme}://bucket/photos"))
    except InputError as error:
        print(error)
"""


def test_an_address_whose_library_is_missing_is_a_defect_and_a_root_stops_the_run() -> None:
    """One listing is no reason to keep a city from being scored; a root is all photos' place."""
    answer = subprocess.run([sys.executable, "-c", HIDDEN], capture_output=True, text=True, check=True)
    google, google_root, amazon, amazon_root = answer.stdout.splitlines()
    assert google.startswith("unsupported_scheme: ") and "pip install 'camenn[gcp]'" in google
    assert amazon.startswith("unsupported_scheme: ") and "pip install 'camenn[aws]'" in amazon
    assert google_root.startswith("--image_root gs://bucket/photos: ") and google_root[-40:] == google[-40:]
    assert amazon_root.startswith("--image_root s3://bucket/photos: ") and amazon_root[-40:] == amazon[-40:]
    with pytest.raises(InputError, match="--image_root http://x: 'http' addresses are not read"):
        check_root_scheme("http://x")
    check_root_scheme("photos")


# --- what is read


def endless(path: Path) -> None:
    os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 5))


def listen(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(os.path.relpath(path))


MAKE: dict[str, Callable[[Path], None]] = {
    "a FIFO": os.mkfifo,
    "a directory": Path.mkdir,
    "a socket": listen,
    "a device": endless,
}


@pytest.mark.parametrize("kind", MAKE)
def test_what_is_no_file_is_not_read(root: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """No reader of photos opens it, whatever it has cached before; and none waits for a writer."""
    path = root / "a" / "it.jpg"
    monkeypatch.chdir(root)
    try:
        MAKE[kind](path)
    except PermissionError:
        pytest.skip("only root may make a device")
    photos = PhotoFiles(str(root), False)
    for read in (photo_status, photos.read, PhotoFiles("/", True).read):
        with pytest.raises(FileDefect) as caught:
            read(str(path))
        assert caught.value.reason == "not_a_file" and kind in caught.value.detail
    # As if it had replaced a file after the first check.
    regular = os.stat(root / "a" / "1.jpg")
    monkeypatch.setattr(os, "stat", lambda path: regular)
    if kind != "a socket":
        with pytest.raises(FileDefect, match=kind):
            photos.read(str(path))
    monkeypatch.undo()
    photo = ResolveItems(str(root), False)._photo("a/it.jpg", None, None)
    assert photo.defect == "not_a_file" and "'a/it.jpg' is " + kind in (photo.detail or "")
    assert Photos(str(root), allow_absolute=False).find("a/it.jpg").reason == "not a file"


def test_dev_zero_is_not_read_with_allow_absolute(root: Path) -> None:
    assert ResolveItems(str(root), True)._photo("/dev/zero", None, None).defect == "not_a_file"
    assert Photos(str(root), allow_absolute=True).find("/dev/zero").reason == "not a file"


def test_no_more_is_read_than_a_photo_may_have(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reported size is not trusted: one of the kernel's files reports 0."""
    monkeypatch.setattr(photo_files, "LIMITS", Limits(bytes=10))
    photos = PhotoFiles(str(root), False)
    path = root / "a" / "1.jpg"
    path.write_bytes(b"0123456789")
    assert photos.read(str(path)) == b"0123456789"
    path.write_bytes(b"01234567890")
    for read in (photo_status, photos.read):
        with pytest.raises(FileDefect, match="too_many_bytes"):
            read(str(path))
    asked: list[int] = []
    os_read = os.read

    def read_recorded(fd: int, size: int) -> bytes:
        asked.append(size)
        return os_read(fd, size)

    monkeypatch.setattr(photo_files, "_check_status", lambda status: None)
    monkeypatch.setattr(os, "read", read_recorded)
    with pytest.raises(FileDefect, match="too_many_bytes"):
        photos.read(str(path))
    assert sum(asked) == 11
    if Path("/proc/self/maps").exists():
        assert photo_status("/proc/self/maps")[0] == 0
        with pytest.raises(FileDefect, match="too_many_bytes"):
            PhotoFiles("/", True).read("/proc/self/maps")


def test_a_link_put_on_the_way_after_the_check_leads_nowhere(root: Path) -> None:
    photos = PhotoFiles(str(root), False)
    path = photos.resolve("a/1.jpg")
    assert photos.read(path) == b"1"
    (root / "a").rename(root / "b")
    (root / "a").symlink_to(root.parent / "root2")
    (root.parent / "root2" / "1.jpg").write_bytes(b"secret")
    with pytest.raises(UriDefect, match="outside_root"):
        photos.read(path)
    assert PhotoFiles(str(root), True).read(path) == b"secret"
    # The root itself may be reached through a link, and links within it lead to its own photos.
    (root.parent / "link").symlink_to(root)
    photos = PhotoFiles(str(root.parent / "link"), False)
    (root / "b" / "2.jpg").symlink_to("1.jpg")
    assert photos.read(photos.resolve("b/2.jpg")) == b"1"


def test_an_object_is_read_no_further_than_a_photo_may_have(monkeypatch: pytest.MonkeyPatch) -> None:
    class Endless:
        asked = 0

        def __enter__(self) -> "Endless":
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def read(self, size: int) -> bytes:
            self.asked += size
            return b"0" * size

    handle = Endless()
    monkeypatch.setattr(photo_files, "LIMITS", Limits(bytes=10))
    monkeypatch.setattr(objects, "open_read", lambda path, found: handle)
    with pytest.raises(FileDefect, match="too_many_bytes"):
        PhotoFiles(BUCKET, False).read(f"{BUCKET}/1.jpg")
    assert handle.asked == 11
