"""Workers that read single rows of contents: when they do, and that batches are the same."""

import uuid
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from camenn_model.data.item_table import ItemTable
from camenn_model.integrity import DamagedError
from pipelines.io import cache, files, objects
from pipelines.io.tables import FileRecord
from pipelines.score.pairs import TILE_ITEMS, Chunk, ranges_pay
from pipelines.score.tiles import WorkerInput, open_items
from schemas.embeddings import SHAPE_KEY
from schemas.training import ITEMS
from tests.support.object_stores import LocalStores
from tests.support.random_batches import tiny_config

MB = 10**6
NO_HISTORY = np.full((600, 4), -1, dtype=np.int32)


def chunks_of(*sizes: int) -> list[Chunk]:
    """Chunks of a hundred audience rows, by the listings that they meet."""
    return [
        Chunk(audience=(100 * number, 100 * number + 100), items=np.arange(size)) for number, size in enumerate(sizes)
    ]


@pytest.mark.parametrize(
    ("chunks", "heard", "pays"),
    [
        # 100,000 photos of 50 kB and as many titles of 25 kB: 7.5 GB. Two rows and two requests are 0.6 MB.
        (chunks_of(512), 0, True),
        (chunks_of(5_000), 0, True),
        (chunks_of(7_000), 0, False),
        # What is met by several chunks is read by each of them.
        (chunks_of(3_000, 3_500), 0, False),
        # Histories are read for each tile.
        (chunks_of(TILE_ITEMS), 4_000, True),
        (chunks_of(3 * TILE_ITEMS), 4_000, False),
        (chunks_of(), 0, True),
    ],
)
def test_ranges_are_read_where_few_rows_are_needed(chunks: list[Chunk], heard: int, pays: bool) -> None:
    history = NO_HISTORY if not heard else np.arange(heard, dtype=np.int32).reshape(100, -1)
    assert ranges_pay(chunks, history, [(100_000, 5_000 * MB), (100_000, 2_500 * MB)]) is pays


def test_small_contents_are_copied() -> None:
    """A request takes longer than the whole file. Without any contents, nothing is read either way."""
    assert not ranges_pay(chunks_of(3), NO_HISTORY, [(1_000, 200_000), (0, 0)])
    assert not ranges_pay(chunks_of(3), NO_HISTORY, [(0, 0), (0, 0)])


# --- on object stores

PHOTO, TITLE = (4, 40_000), (5, 12)
"""A photo is 320 kB: gaps between two are not read"""


def write_contents(root: str, kind: str, name: str, numbers: list[int], shape: tuple[int, int]) -> FileRecord:
    """A contents file as `copy_contents` writes it."""
    path, rng = f"{root}/contents/{kind}/F/part-{name}.arrow", np.random.default_rng(numbers)
    values = rng.normal(size=(len(numbers), *shape)).astype(np.float16)
    kept = pa.binary(2 * shape[0] * shape[1])
    metadata = {SHAPE_KEY: f"{shape[0]},{shape[1]}".encode()}
    schema = pa.schema([pa.field(f"{kind[:-1]}_key", pa.string()), pa.field("embedding", kept, metadata=metadata)])
    embeddings = pa.FixedSizeBinaryArray.from_buffers(kept, len(numbers), [None, pa.py_buffer(values)])
    keys = pa.array([f"{number:032x}" for number in numbers])
    with files.atomic_write(path) as sink, pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(pa.record_batch([keys, embeddings], schema=schema))
    return FileRecord.of(f"contents_{kind}", path, len(numbers), sink.written)


def encoded(table: ItemTable) -> ItemTable:
    """The table with columns that a feature space would have made."""
    table.cats = np.arange(3 * len(table)).reshape(-1, 3)
    table.values, table.buckets = np.ones((len(table), 2), dtype=np.float32), np.zeros((len(table), 2), dtype=np.int64)
    table.history_cats = table.cats[:, :2]
    return table


LISTINGS = 60


def listings() -> pa.Table:
    """Listings of which every seventh has neither photo nor title, and the last ten have no photo that is there."""
    keys = pa.array([f"{number:032x}" if number % 7 else None for number in range(LISTINGS)])
    known = {
        "item_id": pa.array([f"item{number}" for number in range(LISTINGS)]),
        "image_key": keys,
        "title_key": keys,
        "title_tokens": pa.array(
            [number % 5 + 1 for number in range(LISTINGS)], ITEMS.schema.field("title_tokens").type
        ),
    }
    return pa.table({field.name: known.get(field.name, pa.nulls(LISTINGS, field.type)) for field in ITEMS.schema})


@pytest.mark.slow
@pytest.mark.objects
@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_batches_are_those_of_copies(
    scheme: str, stores: LocalStores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CAMENN_CACHE", str(tmp_path))
    cache._forget_unused.cache_clear()
    root, proxy = f"{scheme}://camenn/{uuid.uuid4().hex}/scores", stores.proxies[scheme]
    images = (
        write_contents(root, "images", "a", [*range(30)], PHOTO),
        write_contents(root, "images", "b", [*range(30, 50)], PHOTO),
    )
    titles = (write_contents(root, "titles", "a", [*range(LISTINGS)], TITLE),)
    by_ranges = WorkerInput(
        out=root,
        directory="",
        model="",
        images=images,
        titles=titles,
        by_ranges=True,
        top_k=0,
        precision="fp32",
        progress=None,
    )
    proxy.clear()
    ranges = encoded(open_items(by_ranges, listings(), tiny_config()))
    assert proxy.bytes_out < 40_000 and list(tmp_path.iterdir()) == []
    proxy.clear()
    copies = encoded(open_items(replace(by_ranges, by_ranges=False), listings(), tiny_config()))
    assert proxy.bytes_out >= sum(record.bytes for record in (*images, *titles))
    proxy.clear()
    rows, heard = np.array([41, 3, 0, 59, 28, 3, 35]), np.array([9, 44, 49])
    found = ranges.batch(rows), ranges.history(heard)
    # Photos of rows 41 and 3, then of 9 and 44. The titles lie close together: a range each time.
    needed = 4 * 2 * PHOTO[0] * PHOTO[1]
    assert needed <= proxy.bytes_out < needed + 20_000
    assert len(proxy.requests) == 4 + 2
    for tensors, expected in zip(found, (copies.batch(rows), copies.history(heard)), strict=True):
        for name, tensor in vars(tensors).items():
            assert torch.equal(tensor, getattr(expected, name)), name
    assert found[0].has_image.tolist() == [True, True, False, False, False, True, False]

    objects.put(titles[0].path, b"other bytes")
    monkeypatch.setattr("pipelines.runs.manifest._listed", {})
    with pytest.raises(DamagedError, match=r"part-a\.arrow: has 11 bytes"):
        open_items(by_ranges, listings(), tiny_config())
