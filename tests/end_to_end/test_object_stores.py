"""`camenn embed` with data, photos and store on gs:// and s3://: the same embeddings as on a local disk."""

import json
import re
import urllib.parse
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.support.counting_proxy import CountingProxy
from pipelines import cli
from pipelines.io import files, objects
from pipelines.io.object_client import SOCKETS
from pipelines.runs.manifest import read_latest
from pipelines.runs.store import IMAGES, SMALL_PARTS, TITLES, commit_part, generation, list_parts
from schemas.embeddings import embedding_shape, image_embeddings, title_embeddings
from tests.support.object_stores import LocalStores
from tests.support.tiny_encoders import write_text_model, write_timm_model

A_LISTING, BESIDE = 0.01, 50
"""Requests of an embed that finds nothing new"""
OF_PLACE = ["image_mtime", "image_version"]
"""Columns of the items that differ from place to place"""


class City:
    """A tiny city, its store on a local disk, and encoders with random weights."""

    def __init__(self, root: Path) -> None:
        self.data, self.root = root / "data", root
        assert cli.main(["simulate", "--out", str(self.data), "--preset", "tiny"]) == 0
        encoders = {"image_weights": write_timm_model(root / "resnet", "resnet18")}
        encoders["text_encoder"] = write_text_model(root / "xlm", "xlm-roberta")
        self.flags = [word for name, path in encoders.items() for word in (f"--{name}", str(path))]

    def embed(self, capfd: pytest.CaptureFixture[str], data: str, store: str) -> dict[str, Any]:
        places = ["--data", data, "--image_root", data, "--store", store]
        small = ["--grid", "2", "--max_tokens", "16", "--precision", "fp32", "--direct_num_workers=1", "--json"]
        assert cli.main(["embed", *places, *self.flags, *small]) == 0, capfd.readouterr().err
        return json.loads(capfd.readouterr().out.strip().splitlines()[-1])

    def copy(self, place: str) -> None:
        """Put the city's files below a place in an object store."""
        for path in sorted(path for path in self.data.rglob("*") if path.is_file()):
            objects.put(f"{place}/{path.relative_to(self.data)}", path.read_bytes())


def requests_of(proxy: CountingProxy) -> list[str]:
    """What was asked of a store: method and name of each request, `?alt=media` and the like left out."""
    return [f"{request.method} {urllib.parse.unquote(request.path).partition('?')[0]}" for request in proxy.requests]


def add_parts(store: str, kind: str, parts: int) -> None:
    """Commit small parts of contents that no listing has."""
    (fingerprint,) = {
        found.path.removeprefix(f"{store}/{kind}/").partition("/")[0] for found in files.match(f"{store}/{kind}", "**")
    }
    directory = generation(store, kind, fingerprint)
    path = list_parts(directory)[0].path
    with files.open_read(path) as handle:
        row = pq.ParquetFile(handle).read().slice(0, 1)
    shape = embedding_shape(row.schema)
    contract = image_embeddings(*shape) if kind == IMAGES else title_embeddings(*shape)
    for number in range(parts):
        key = pa.array([f"{number:032x}"])
        table = row.set_column(0, row.schema.field(0), key).cast(contract.schema)
        commit_part(directory, contract, shape, f"{number:032x}", table, kernels="another")


def read_store(store: str) -> dict[str, list[Any]]:
    """All that a store's published run holds, bytes of embeddings included, apart from times."""
    manifest = read_latest(store)
    assert manifest is not None
    found = {}
    for name in ("image_embeddings", "title_embeddings", "items"):
        rows: list[dict[str, Any]] = []
        for path in manifest.paths(name):
            with files.open_read(path) as handle:
                rows += pq.read_table(handle).drop_columns(OF_PLACE if name == "items" else []).to_pylist()
        found[name] = sorted(rows, key=lambda row: next(iter(row.values())))
    return found


@pytest.fixture(scope="module")
def city(tmp_path_factory: pytest.TempPathFactory) -> City:
    return City(tmp_path_factory.mktemp("city"))


@pytest.mark.slow
@pytest.mark.objects
@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_embed_on_an_object_store(
    city: City, stores: LocalStores, scheme: str, capfd: pytest.CaptureFixture[str]
) -> None:
    local = str(city.root / "store")
    if not files.exists(local):
        city.embed(capfd, str(city.data), local)
    place, proxy = f"{scheme}://camenn/night", stores.proxies[scheme]
    city.copy(f"{place}/data")

    proxy.clear()
    sockets = proxy.sockets
    first = city.embed(capfd, f"{place}/data", f"{place}/store")
    assert first["encoded_images"] > 0 and first["encoded_titles"] > 0
    assert read_store(f"{place}/store") == read_store(local)

    proxy.clear()
    again = city.embed(capfd, f"{place}/data", f"{place}/store")
    assert again["encoded_images"] == again["encoded_titles"] == 0
    # The photos are listed, not looked at one by one, and parts are not opened.
    listings = len(read_store(local)["items"])
    assert len(proxy.requests) <= A_LISTING * listings + BESIDE, requests_of(proxy)
    assert proxy.bytes_out < 200_000
    large = re.compile(r"\.jpg$|/(images|titles)/\w+/part-\w+\.parquet$")
    assert not any(map(large.search, requests_of(proxy)))
    assert read_store(f"{place}/store") == read_store(local)

    # A store of many nights: as many small parts as are left unmerged.
    for kind in (IMAGES, TITLES):
        add_parts(f"{place}/store", kind, SMALL_PARTS - 1)
    proxy.clear()
    later = city.embed(capfd, f"{place}/data", f"{place}/store")
    assert later["encoded_images"] == later["encoded_titles"] == 0
    assert later["images_in_store"] == again["images_in_store"] + SMALL_PARTS - 1
    assert len(proxy.requests) <= A_LISTING * 20_000 + BESIDE, requests_of(proxy)

    # A photo whose bytes are others is encoded, though its size is the same, and the others are not read.
    named = pq.read_table(city.data / "catalog.parquet")["image_uri"].drop_null().unique().to_pylist()
    photos = sorted((city.data / name for name in named), key=lambda path: path.stat().st_size)
    other = photos[0].read_bytes().ljust(photos[-1].stat().st_size, b"\0")
    objects.put(f"{place}/data/images/{photos[-1].name}", other)
    proxy.clear()
    changed = city.embed(capfd, f"{place}/data", f"{place}/store")
    assert (changed["encoded_images"], changed["encoded_titles"]) == (1, 0)
    assert {request.split()[1].rpartition("/")[2] for request in requests_of(proxy) if ".jpg" in request} == {
        photos[-1].name
    }
    assert proxy.sockets <= sockets + SOCKETS
