"""`camenn embed` with data, photos and store on gs:// and s3://: the same embeddings as on a local disk."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipelines import cli
from pipelines.io import files, objects
from pipelines.runs.manifest import read_latest
from tests.support.object_stores import LocalStores, running_stores
from tests.support.tiny_encoders import write_text_model, write_timm_model


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


def read_store(store: str) -> dict[str, list[Any]]:
    """All that a store's published run holds, bytes of embeddings included, apart from times."""
    manifest = read_latest(store)
    assert manifest is not None
    found = {}
    for name in ("image_embeddings", "title_embeddings", "items"):
        rows: list[dict[str, Any]] = []
        for path in manifest.paths(name):
            with files.open_read(path) as handle:
                rows += pq.read_table(handle).drop_columns(["image_mtime"] if name == "items" else []).to_pylist()
        found[name] = sorted(rows, key=lambda row: next(iter(row.values())))
    return found


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalStores]:
    with running_stores(tmp_path_factory.mktemp("stores")) as running:
        yield running


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
    first = city.embed(capfd, f"{place}/data", f"{place}/store")
    assert first["encoded_images"] > 0 and first["encoded_titles"] > 0
    assert read_store(f"{place}/store") == read_store(local)

    proxy.clear()
    again = city.embed(capfd, f"{place}/data", f"{place}/store")
    assert again["encoded_images"] == again["encoded_titles"] == 0
    # A look at each listing's photo, and what says that nothing is new. A photo is not downloaded.
    listings = len(read_store(local)["items"])
    assert len(proxy.requests) <= listings + 90
    assert not any(request.bytes_out for request in proxy.requests if request.path.endswith(".jpg") and scheme == "s3")
    assert proxy.bytes_out < 1_000_000
    assert proxy.sockets <= 12
    assert read_store(f"{place}/store") == read_store(local)
