"""Photos below a root in an object store: listed once, looked up by bucket, known by their version."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.embed import resolve
from pipelines.embed.resolve import ResolveItems
from pipelines.inputs import photo_listing
from pipelines.inputs.photo_files import PhotoStatus
from pipelines.inputs.photo_listing import PhotoListing, list_photos
from pipelines.inputs.photos import LIMITS
from pipelines.io import objects
from pipelines.io.object_client import Stat
from schemas.reasons import Reason

pytest.importorskip("boto3")
ROOT = "s3://photos/city"


def stat(name: str, size: int = 9, token: str = "v1") -> Stat:
    return Stat(f"{ROOT}/{name}", size, 100.0, token)


def lists(monkeypatch: pytest.MonkeyPatch, *found: Stat) -> None:
    """Let the root hold some objects, and no single look succeed."""

    def list_objects(prefix: str) -> Iterator[Stat]:
        assert prefix == f"{ROOT}/"
        yield from found

    def look(path: str) -> Stat:
        raise AssertionError(path)

    monkeypatch.setattr(objects, "list_objects", list_objects)
    monkeypatch.setattr(objects, "stat", look)


def test_photos_are_looked_up_in_the_listing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lists(monkeypatch, stat("a.jpg"), stat("b/ü.jpg", 7, '"v2"'))
    path = list_photos("S3://photos/city/", 2, str(tmp_path))
    found = PhotoListing(ROOT, path).look([f"{ROOT}/b/ü.jpg", f"{ROOT}/none.jpg", "s3://photos/city2/a.jpg", "/a.jpg"])
    assert found == {f"{ROOT}/b/ü.jpg": stat("b/ü.jpg", 7, '"v2"'), f"{ROOT}/none.jpg": None}
    assert list_photos(str(tmp_path), 2, str(tmp_path)) is None and PhotoListing(ROOT, None).look(["x"]) == {}


def test_an_empty_root_has_no_photo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lists(monkeypatch)
    path = list_photos(ROOT, 2, str(tmp_path))
    assert PhotoListing(ROOT, path).look([f"{ROOT}/a.jpg"]) == {f"{ROOT}/a.jpg": None}


@pytest.mark.parametrize(("objects_there", "listings", "listed"), [(20, 1, True), (21, 1, False), (30, 2, True)])
def test_a_root_of_far_more_objects_than_listings_is_not_listed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    objects_there: int,
    listings: int,
    listed: bool,
) -> None:
    monkeypatch.setattr(photo_listing, "LEAST_PAGES", 0)
    lists(monkeypatch, *(stat(f"{number}.jpg") for number in range(objects_there)))
    with caplog.at_level(logging.WARNING, "camenn.embed"):
        path = list_photos(ROOT, listings, str(tmp_path))
    assert (path is not None) == listed == (caplog.text == "") == bool(list(tmp_path.iterdir()))
    assert listed or "holds more than 20 objects" in caplog.text


def test_a_root_that_may_not_be_listed_is_looked_at_singly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(prefix: str) -> Iterator[Stat]:
        raise PermissionError(13, "403 AccessDenied", prefix)
        yield

    monkeypatch.setattr(objects, "list_objects", refuse)
    with caplog.at_level(logging.WARNING, "camenn.embed"):
        assert list_photos(ROOT, 2, str(tmp_path)) is None
    assert "may not be listed (403 AccessDenied)" in caplog.text and not list(tmp_path.iterdir())


def test_a_photo_is_read_where_its_version_is_new(monkeypatch: pytest.MonkeyPatch) -> None:
    step = ResolveItems(ROOT, False)
    step.listed = {found.path: found for found in (stat("a.jpg"), stat("huge.jpg", LIMITS.bytes + 1))}
    step.listed[f"{ROOT}/none.jpg"] = None
    asked: list[Stat | None] = []

    def read(path: str, found: Stat | None) -> bytes:
        asked.append(found)
        return b"the photo"

    monkeypatch.setattr(type(step.photos), "read", lambda self, path, found: read(path, found))
    first = step._photo("a.jpg", None, None)
    assert (first.size, first.mtime, first.version, first.defect) == (9, 100.0, "v1", None)
    assert asked == [stat("a.jpg")]
    # Another listing of the bucket with the same photo.
    assert step._photo("a.jpg", None, None) == first and len(asked) == 1
    for version, size, reads in (("v1", 9, 0), ("v2", 9, 1), (None, 9, 1), ("v1", 8, 1)):
        step.keys.clear()
        asked.clear()
        known = resolve._Known("a.jpg", size, 100.0, version, "known")
        assert step._photo("a.jpg", None, known).key == (first.key if reads else "known")
        assert len(asked) == reads
    assert step._photo("none.jpg", None, None).defect == Reason.MISSING_IMAGE
    assert step._photo("huge.jpg", None, None).defect == Reason.TOO_MANY_BYTES


def test_a_local_photo_is_known_by_size_and_time() -> None:
    known = resolve._Known("a.jpg", 9, 100.0, None, "key")
    assert known.holds("a.jpg", PhotoStatus(9, 100.0))
    for uri, size, time in (("a.jpg", 9, 101.0), ("a.jpg", 8, 100.0), ("b.jpg", 9, 100.0)):
        assert not known.holds(uri, PhotoStatus(size, time))
