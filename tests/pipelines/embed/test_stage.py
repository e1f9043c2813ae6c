"""The embed stage as a whole, with the real encoders.

It meets every kind of bad photo and odd title, its row counts reconcile, and nothing is encoded
twice.
"""

import datetime
import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from camenn_model.encoders.machine import has_compiler
from camenn_model.hashing import normalise_title
from pipelines import cli
from pipelines.runs import store as store_module
from pipelines.runs.manifest import read_latest
from pipelines.runs.publication import check_whole, published_manifests
from schemas.catalog import CATALOG
from schemas.embeddings import KERNELS_KEY, embedding_shape
from schemas.manifest import KEEP
from tests.support.encoder_sources import minilm


def picture(seed: int, size: tuple[int, int] = (90, 90)) -> Image.Image:
    """A picture of noise: every seed has its own content."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))


def jpeg(image: Image.Image, **options: Any) -> bytes:
    sink = io.BytesIO()
    image.save(sink, "JPEG", **options)
    return sink.getvalue()


def other(image: Image.Image, kind: str, **options: Any) -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def rotated_exif() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return jpeg(picture(5), exif=exif.tobytes())


def bomb() -> bytes:
    """A PNG of 120 megapixels in some kilobytes."""
    sink = io.BytesIO()
    Image.new("1", (12_000, 10_000)).save(sink, "PNG")
    return sink.getvalue()


GOOD: dict[str, Callable[[], bytes]] = {
    "plain.jpg": lambda: jpeg(picture(1)),
    "cmyk.jpg": lambda: jpeg(picture(2).convert("CMYK")),
    "sixteen.png": lambda: other(
        Image.fromarray(np.random.default_rng(3).integers(0, 65535, (90, 90), dtype=np.uint16)), "PNG"
    ),
    "animated.gif": lambda: other(picture(4), "GIF", save_all=True, append_images=[picture(40)]),
    "rotated.jpg": rotated_exif,
}
BAD: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty.jpg": (lambda: b"", "empty_image"),
    "html.jpg": (lambda: b"<!DOCTYPE html><html><body>404</body></html>", "not_an_image"),
    "truncated.jpg": (lambda: jpeg(picture(6))[:900], "truncated_image"),
    "bomb.png": (bomb, "too_many_pixels"),
    "huge.jpg": (lambda: jpeg(picture(7)) + b"\\0" * (33 << 20), "too_many_bytes"),
}
ODD_URIS = {
    "missing.jpg": "missing_image",
    "../outside.jpg": "outside_root",
    "http://example.com/a.jpg": "unsupported_scheme",
}
TITLES = ["", None, "x" * 10_000, "有机苹果 红富士", "🍎🍏 fresh!", "red apples 1 kg", "  red   apples 1 kg "]


def write_catalog(data: Path, rows: list[dict[str, Any]]) -> None:
    data.mkdir(exist_ok=True, parents=True)
    columns = [name for name in CATALOG.names if name not in ("image_bytes", "product_key", "store_id")]
    pq.write_table(
        pa.table(
            {name: pa.array([row.get(name) for row in rows], CATALOG.schema.field(name).type) for name in columns}
        ),
        data / "catalog.parquet",
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = tmp_path_factory.mktemp("catalog")
    uris = [*GOOD, *BAD, *ODD_URIS]
    for name, make in {**GOOD, **{name: make for name, (make, _) in BAD.items()}}.items():
        (data / name).write_bytes(make())
    shutil.copy(data / "plain.jpg", data / "same_bytes.jpg")
    rows: list[dict[str, Any]] = [
        {"item_id": f"photo-{uri}", "title": "apples", "image_uri": uri} for uri in [*uris, "same_bytes.jpg"]
    ]
    rows += [{"item_id": f"title-{place}", "title": title} for place, title in enumerate(TITLES)]
    write_catalog(data, rows)
    return data


def data_with_title(data: Path, target: Path, title: str) -> Path:
    """The same catalog, whose photos stay where they are, with another title for one listing."""
    rows = pq.read_table(data / "catalog.parquet").to_pylist()
    next(row for row in rows if row["item_id"] == "photo-plain.jpg")["title"] = title
    write_catalog(target, rows)
    return target


class Store:
    """An embedding store, and the command that fills it."""

    def __init__(self, root: Path, data: Path, capfd: pytest.CaptureFixture[str]) -> None:
        self.root, self.data, self.capfd = root, data, capfd

    def embed(self, *extra: str, seed: int = 0) -> dict[str, Any]:
        places = [
            "--data",
            str(self.data),
            "--store",
            str(self.root),
            "--text_encoder",
            minilm(),
            "--image_weights",
            f"random:{seed}",
        ]
        assert cli.main(["embed", *places, "--grid", "1", "--max_tokens", "8", "--json", *extra]) == 0
        return json.loads(self.capfd.readouterr().out.strip().splitlines()[-1])

    def table(self, name: str) -> dict[str, dict[str, Any]]:
        """Rows of a published table by their first key column."""
        manifest = read_latest(str(self.root))
        assert manifest is not None
        rows = [row for path in manifest.paths(name) for row in pq.ParquetFile(path).read().to_pylist()]
        key = {"items": "item_id", "defects": "key", "image_embeddings": "image_key", "title_embeddings": "title_key"}[
            name
        ]
        return {row[key]: row for row in rows}


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    return tmp_path_factory.mktemp("store")


def test_embed_keeps_every_row_and_names_every_defect(
    filled: Path, data: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    store = Store(filled, data, capfd)
    summary = store.embed()
    listings = len(GOOD) + len(BAD) + len(ODD_URIS) + 1 + len(TITLES)
    assert summary["rows_in"] == summary["rows_out"] == listings
    assert summary["rejected"] == 0
    defects = store.table("defects")
    expected = {f"catalog:photo-{uri}": reason for uri, (_, reason) in BAD.items()} | {
        f"catalog:photo-{uri}": reason for uri, reason in ODD_URIS.items()
    }
    assert {key: row["reason"] for key, row in defects.items()} == expected
    for key, row in defects.items():
        # Who, which column, which value.
        assert key.removeprefix("catalog:") in row["detail"] and "image_uri" in row["detail"], row
    # plain and same_bytes share one row.
    assert summary["encoded_images"] == len(GOOD)
    items = store.table("items")
    assert items["photo-plain.jpg"]["image_key"] == items["photo-same_bytes.jpg"]["image_key"]
    assert items["title-5"]["title_key"] == items["title-6"]["title_key"]
    assert items["title-0"]["title_key"] is None and items["title-1"]["title_key"] is None
    # "apples", three odd titles, "red apples 1 kg".
    assert summary["encoded_titles"] == 5


def test_embeddings_carry_shape_and_are_finite(filled: Path, data: Path, capfd: pytest.CaptureFixture[str]) -> None:
    manifest = read_latest(str(filled))
    assert manifest is not None
    for name, width in (("image_embeddings", 1536), ("title_embeddings", 384)):
        for path in manifest.paths(name):
            table = pq.ParquetFile(path).read()
            shape = embedding_shape(table.schema)
            assert shape[1] == width
            for value in table["embedding"].to_pylist():
                array = np.frombuffer(value, dtype=np.float16).reshape(shape)
                assert np.isfinite(array).all() and array.any()


def test_second_embed_encodes_nothing_and_publishes_the_same(
    filled: Path, data: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    store = Store(filled, data, capfd)
    before = {name: store.table(name) for name in ("items", "defects", "image_embeddings")}
    summary = store.embed()
    assert summary["encoded_images"] == summary["encoded_titles"] == 0
    assert {name: store.table(name) for name in before} == before


def test_changed_title_encodes_one_title_and_no_photo(
    filled: Path, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    changed = data_with_title(data, tmp_path / "changed", "pears")
    summary = Store(filled, changed, capfd).embed("--image_root", str(data))
    assert (summary["encoded_images"], summary["encoded_titles"]) == (0, 1)


def test_mended_photo_is_encoded_and_no_longer_a_defect(
    filled: Path, data: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    store = Store(filled, data, capfd)
    (data / "empty.jpg").write_bytes(jpeg(picture(77)))
    summary = store.embed()
    assert summary["encoded_images"] == 1
    assert "catalog:photo-empty.jpg" not in store.table("defects")


def test_other_weights_start_a_generation_of_their_own(
    filled: Path, data: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    store = Store(filled, data, capfd)

    def parts() -> set[str]:
        latest = read_latest(str(filled))
        assert latest is not None
        return set(latest.paths("image_embeddings"))

    first = parts()
    summary = store.embed(seed=1)
    assert summary["encoded_images"] == len(GOOD) + 1 and summary["encoded_titles"] == 0
    assert not first & parts()


def test_killed_run_keeps_what_it_committed(data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A run dies after its chunks and before its publication.

    The next one encodes nothing again. A part without marker is not read.
    """
    store = Store(tmp_path / "store", data, capfd)
    store.embed()
    os.remove(store.root / "latest.json")
    orphan = next((store.root / "titles").rglob("part-*[0-9a-f].parquet"))
    os.remove(orphan.with_suffix(".json"))
    summary = store.embed()
    assert summary["encoded_images"] == 0
    assert summary["encoded_titles"] == 5


def test_plan_tells_what_a_run_would_encode_and_leaves_nothing(
    data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    store = Store(tmp_path / "store", data, capfd)
    first = store.embed("--plan")
    contents = len({(data / uri).read_bytes() for uri in [*GOOD, *BAD] if uri != "huge.jpg"})
    titles = len({normalise_title(title) for title in [*TITLES, "apples"]} - {""})
    assert (first["distinct_images"], first["images_to_encode"]) == (contents, contents)
    assert (first["distinct_titles"], first["titles_to_encode"]) == (titles, titles)
    assert first["encode_seconds"] > 0
    assert first["estimated_from"] == "images: a batch encoded just now; titles: a batch encoded just now"
    assert read_latest(str(store.root)) is None and not list(store.root.glob("runs/*")), "a plan leaves no run"
    assert not (store.root / "images").exists() and not (store.root / "titles").exists()
    store.embed()
    again = store.embed("--plan")
    assert (again["images_to_encode"], again["titles_to_encode"], again["encode_seconds"]) == (0, 0, 0)
    assert again["rows_in"] == first["rows_in"] and again["distinct_images"] == contents
    changed = data_with_title(data, tmp_path / "changed", "new title")
    later = Store(store.root, changed, capfd).embed("--plan", "--image_root", str(data))
    assert (later["images_to_encode"], later["titles_to_encode"]) == (0, 1)
    assert later["estimated_from"] == "titles: earlier runs"
    parts = [part for place in store.root.glob("titles/*") for part in store_module.list_parts(str(place))]
    pace = sum(part.seconds for part in parts) / sum(part.rows + len(part.failures) for part in parts)
    assert later["encode_seconds"] == pytest.approx(pace, rel=0.01), "one title, on one worker"


def test_small_parts_of_earlier_runs_are_merged(
    data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "SMALL_PARTS", 2)
    root = tmp_path / "store"
    for night in range(4):
        changed = data_with_title(data, tmp_path / f"night{night}", f"title of night {night}")
        summary = Store(root, changed, capfd).embed("--image_root", str(data))
        assert summary["encoded_titles"] == (1 if night else summary["titles_in_store"]), (
            "merged rows are not encoded ones"
        )
    store = Store(root, changed, capfd)
    manifest = read_latest(str(root))
    assert manifest is not None
    # The parts of the first three nights are one, beside that of the last.
    assert len(manifest.paths("title_embeddings")) == 2
    rows = store.table("title_embeddings")
    assert len(rows) == manifest.rows("title_embeddings") == summary["titles_in_store"]
    assert {row["title_key"] for row in store.table("items").values()} - {None} <= set(rows)
    # Readers of the previous run still find its parts. Parts that the third night wrote and merged
    # at once never had a reader.
    assert len(list(root.glob("titles/*/part-*.keys.parquet"))) == 4
    assert len(list(root.glob("titles/*/part-*.parquet"))) == 8
    # A night that encodes nothing merges nothing.
    monkeypatch.setattr(store_module, "SMALL_PARTS", 1)
    assert store.embed("--image_root", str(data))["encoded_titles"] == 0
    manifest = read_latest(str(root))
    assert manifest is not None and len(manifest.paths("title_embeddings")) == 2


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler(), reason="no C++ compiler")
def test_compiled_kernels_are_recorded_and_near_the_eager_ones(
    data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    found = {}
    for mode in ("off", "on"):
        store = Store(tmp_path / mode, data, capfd)
        summary = store.embed("--compile", mode)
        manifest = read_latest(str(store.root))
        assert manifest is not None
        (path,) = manifest.paths("image_embeddings")
        kernels = pq.ParquetFile(path).schema_arrow.field("embedding").metadata[KERNELS_KEY].decode()
        assert kernels.startswith("compiled" if mode == "on" else "eager") and kernels in summary["kernels"]
        found[mode] = {
            key: np.frombuffer(row["embedding"], np.float16).astype(np.float64)
            for key, row in store.table("image_embeddings").items()
        }
    assert set(found["on"]) == set(found["off"])
    for key, one in found["on"].items():
        other = found["off"][key]
        assert one @ other >= 0.9999 * np.linalg.norm(one) * np.linalg.norm(other)


def test_embed_stops_with_the_flag_when_weights_cannot_be_had(
    data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    places = ["--data", str(data), "--store", str(tmp_path), "--text_encoder", minilm()]
    assert cli.main(["embed", *places, "--image_weights", str(tmp_path / "no.safetensors")]) == 2
    assert "--image_weights" in capfd.readouterr().err
    assert not (tmp_path / "latest.json").exists()


def test_a_photo_that_comes_back_makes_another_request(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A photo that could not be read comes back.

    Readers of the store take equal requests for equal rows. A photo that could not be read for a
    night must not stay away for good.
    """
    data = tmp_path / "data"
    write_catalog(data, [{"item_id": f"i{n}", "title": "apples", "image_uri": f"{n}.jpg"} for n in range(2)])
    photos = [data / f"{n}.jpg" for n in range(2)]
    for seed, photo in enumerate(photos):
        photo.write_bytes(jpeg(picture(seed)))
    store = Store(tmp_path / "store", data, capfd)
    store.embed()
    whole, status = photos[0].read_bytes(), photos[0].stat()
    # The photo is known by size and time, and is opened when another encoder needs it: it is another one by then.
    photos[0].write_bytes(bytes(len(whole)))
    os.utime(photos[0], ns=(status.st_atime_ns, status.st_mtime_ns))
    assert store.embed(seed=1)["defects"] == 1
    without = read_latest(str(store.root))
    photos[0].write_bytes(whole)
    os.utime(photos[0], ns=(status.st_atime_ns, status.st_mtime_ns))
    assert store.embed(seed=1)["defects"] == 0
    with_it = read_latest(str(store.root))
    assert without is not None and with_it is not None and without.request != with_it.request


def test_merged_parts_stay_while_runs_that_may_be_published_again_name_them(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "READERS_HAVE", datetime.timedelta(0))
    monkeypatch.setattr(store_module, "SMALL_PARTS", 2)
    data = tmp_path / "data"
    store = Store(tmp_path / "store", data, capfd)
    for night in range(6):
        write_catalog(data, [{"item_id": f"i{n}", "title": f"title {n}"} for n in range(night + 1)])
        store.embed()
    for manifest in published_manifests(str(store.root), KEEP):
        check_whole(str(store.root), manifest)
