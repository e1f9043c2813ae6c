"""Photos that are gone: a run that lost them is gated, one that never had any is refused, and neither loses what
was encoded.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from benchmarks.support.stub_encoders import stub_handler, stub_specs
from pipelines import cli
from pipelines.embed import stage as embed_stage
from pipelines.embed.coverage import PhotoIds, check_photos
from pipelines.embed.options import EmbedOptions
from pipelines.io.files import write_parquet
from pipelines.runner.exit_codes import run_main
from pipelines.runs.manifest import read_latest
from pipelines.runs.publication import publications
from schemas.embeddings import EMBEDDED_ITEMS
from schemas.errors import InputError
from tests.pipelines.embed.test_stage import write_catalog

LISTINGS = 24


class Store:
    """A catalog whose photos lie in a share of their own, and the store that is filled from it by stub encoders."""

    def __init__(self, root: Path, capfd: pytest.CaptureFixture[str]) -> None:
        self.data, self.share, self.root, self.capfd = root / "data", root / "share", root / "store", capfd
        self.summary: dict[str, Any] = {}
        self.share.mkdir()
        for number in range(LISTINGS):
            (self.share / f"{number}.jpg").write_bytes(bytes([number]))
        self.list(lambda number: f"{number}.jpg")

    def list(self, uri: Callable[[int], str | None]) -> None:
        """Write the catalog."""
        rows = [{"item_id": f"i{n:02d}", "title": "apples", "image_uri": uri(n)} for n in range(LISTINGS)]
        write_catalog(self.data, rows)

    def embed(self, *, root: Path | None = None, allow_absolute: bool = False, plan: bool = False) -> tuple[int, str]:
        """Run the stage: (exit code, its message); `summary` is its closing table."""
        options = self.options(root, allow_absolute)

        def main(_: list[str] | None) -> int:
            flags = ["--direct_num_workers=1"]
            self.summary = (
                embed_stage.plan(options, flags) if plan else embed_stage.run(options, flags, make_handler=stub_handler)
            )
            return 0

        return run_main(main), self.capfd.readouterr().err

    def options(self, root: Path | None = None, allow_absolute: bool = False) -> EmbedOptions:
        """Options of a run with stub encoders."""
        image, text = stub_specs((1, 4), (3, 2))
        return EmbedOptions(
            data=str(self.data),
            store=str(self.root),
            image_root=str(root or self.share),
            allow_absolute=allow_absolute,
            image=image,
            text=text,
            max_reject_rate=0.0,
        )

    def run(self) -> str:
        latest = read_latest(str(self.root))
        assert latest is not None
        return latest.run


@pytest.fixture
def store(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Store:
    return Store(tmp_path, capfd)


def test_a_share_that_is_not_mounted_holds_the_run_back(store: Store) -> None:
    assert store.embed()[0] == 0 and store.summary["photos_named"] == store.summary["encoded_images"] == LISTINGS
    first = store.run()
    shutil.move(store.share, store.data / "aside")
    store.share.mkdir()
    code, said = store.embed()
    assert code == 3 and store.run() == first
    assert f"0 of {LISTINGS} listings that had a photo in the run published last have one now" in said
    assert f"--image_root {store.share}" in said and "'0.jpg' is not a file" in said and "item_id 'i00'" in said
    held = said.split("camenn publish ")[1].split()[0]
    # A night later it is still missing, and does not count as usual.
    assert store.embed()[0] == 3 and store.run() == first
    # When it is back, nothing is encoded again; and a gated run is published on request.
    store.share.rmdir()
    shutil.move(store.data / "aside", store.share)
    assert store.embed()[0] == 0
    assert [store.summary[name] for name in ("encoded_images", "encoded_titles", "defects")] == [0, 0, 0]
    assert cli.main(["publish", held, "--force", "--reason", "photos are given up"]) == 0
    assert publications(str(store.root))[-1]["reason"] == "photos are given up" and store.run() in held
    # From then on they are not required; those that return are used.
    shutil.rmtree(store.share)
    store.share.mkdir()
    for _ in range(2):
        assert store.embed()[0] == 0 and store.summary["defects"] == LISTINGS


def test_some_photos_fewer_are_an_ordinary_night(store: Store) -> None:
    assert store.embed()[0] == 0
    for number in range(2):
        (store.share / f"{number}.jpg").unlink()
    assert store.embed()[0] == 0 and store.summary["defects"] == 2
    # Those two had none any more; of the others three are more than a tenth, and the listing of one
    # of the three names none now.
    for number in (2, 3):
        (store.share / f"{number}.jpg").unlink()
    store.list(lambda number: f"{number}.jpg" if number != 4 else None)
    code, said = store.embed()
    assert code == 3 and "19 of 22 listings that had a photo" in said


def test_a_photo_that_cannot_be_decoded_is_none(tmp_path: Path) -> None:
    """Keys without embedding and listings of the defects table count as listings without photo, as do those that name
    none.
    """
    keys = ["k0", "k1", "k1", None, None, "k2"]
    empty = {name: pa.nulls(6, EMBEDDED_ITEMS.schema.field(name).type) for name in EMBEDDED_ITEMS.names}
    items = empty | {"item_id": [f"i{n}" for n in range(6)], "image_key": keys}
    items["image_defect"] = [None, None, None, "missing_image", None, None]
    write_parquet(str(tmp_path / "items.parquet"), pa.table(items))
    found = PhotoIds.of_items([str(tmp_path / "items.parquet")], ["k1"], ["i5"])
    assert (len(found.listings), len(found.with_photo), found.named) == (6, 1, 5)
    assert len(PhotoIds.of_items([str(tmp_path / "items.parquet")], []).with_photo) == 4


@pytest.mark.parametrize(
    ("usable", "named", "refused"),
    [(0, 4, False), (0, 5, True), (1, 19, False), (0, 20, True), (1, 20, False), (4, 100, True), (5, 100, False)],
)
def test_as_good_as_none_is_none(store: Store, usable: int, named: int, refused: bool) -> None:
    options = store.options()
    ids = np.arange(100, dtype=np.uint64)
    now = PhotoIds(ids, ids[:usable], named)
    if refused:
        with pytest.raises(InputError, match=f"{usable} of {named} listings that name a photo"):
            check_photos(options, None, now, [])
    else:
        assert check_photos(options, None, now, []) == []


def test_a_first_run_without_any_photo_is_refused(store: Store) -> None:
    store.share.rename(store.data / "aside")
    store.share.mkdir()
    code, said = store.embed()
    assert code == 2 and read_latest(str(store.root)) is None
    assert f"--image_root {store.share}: 0 of {LISTINGS} listings that name a photo have one that can be used" in said
    assert "'0.jpg' is not a file" in said
    # A third of them missing is normal for a catalog: the table of defects lists them.
    for number in range(16):
        shutil.copy(store.data / "aside" / f"{number}.jpg", store.share)
    assert store.embed()[0] == 0
    assert (store.summary["defects"], store.summary["photos_named"]) == (8, LISTINGS)
    # And a catalog that names none needs none.
    store.list(lambda _: None)
    shutil.rmtree(store.root)
    assert store.embed()[0] == 0 and store.summary["photos_named"] == 0


@pytest.mark.parametrize("plan", [False, True])
def test_an_image_root_that_is_no_directory_is_refused(store: Store, plan: bool) -> None:
    gone = store.share.parent / "no" / "such"
    code, said = store.embed(plan=plan, root=gone)
    assert code == 2 and f"--image_root {gone}: no such directory" in said
    assert "catalog.parquet: column 'image_uri'" in said and "'0.jpg' is the first" in said
    assert not list(store.root.glob("runs/*"))
    # A file is none either.
    assert store.embed(plan=plan, root=store.share / "0.jpg")[0] == 2


def test_a_catalog_without_relative_addresses_needs_no_image_root(store: Store) -> None:
    store.list(lambda number: None if number > 4 else str(store.share / f"{number}.jpg"))
    assert store.embed(allow_absolute=True, root=store.share.parent / "no" / "such")[0] == 0
    assert (store.summary["defects"], store.summary["encoded_images"]) == (0, 5)
