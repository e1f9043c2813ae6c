import io
import json
import pickle
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from apache_beam.ml.inference.base import RunInference
from apache_beam.testing.test_pipeline import TestPipeline
from apache_beam.testing.util import assert_that
from PIL import Image

from camenn_model.encoders.protocol import ImageEncoder
from camenn_model.encoders.spec import ImageSpec, TextSpec
from camenn_model.hashing import content_key
from pipelines.embed.handlers import (
    EncodedImages,
    EncodedTitles,
    ImageChunk,
    ImageChunkHandler,
    OnDemand,
    TitleChunk,
    TitleChunkHandler,
)
from pipelines.inputs.photos import decode_image, grid_patches
from schemas.catalog import CATALOG
from tests.support.encoder_sources import minilm

SPEC = replace(
    ImageSpec.resolve("random:7", grid=2, patch_size=75, device="cpu", precision="auto"),
    batch_size=16,
)


@pytest.fixture(scope="module")
def handler() -> ImageChunkHandler:
    return ImageChunkHandler(SPEC, torch_threads=1)


@pytest.fixture(scope="module")
def encoder(handler: ImageChunkHandler) -> OnDemand[ImageEncoder]:
    return handler.load_model()


def photo(seed: int, side: int = 160) -> bytes:
    cells = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(cells).resize((side, side // 2), Image.Resampling.BICUBIC).save(buffer, "JPEG")
    return buffer.getvalue()


def chunk_of(directory: Path, contents: list[bytes]) -> ImageChunk:
    """A chunk of photos in files."""
    paths: list[str | None] = []
    for row, data in enumerate(contents):
        paths.append(str(directory / f"{row}.jpg"))
        (directory / f"{row}.jpg").write_bytes(data)
    return ImageChunk("chunk", [content_key(data) for data in contents], paths, [None] * len(contents))


def test_image_chunk_handler_encodes_every_good_photo(
    handler: ImageChunkHandler, encoder: OnDemand[ImageEncoder], tmp_path: Path
) -> None:
    contents = [photo(seed) for seed in range(11)]
    bad = {2: b"", 5: b"<html>not found</html>", 9: photo(9)[:-200]}
    for row, data in bad.items():
        contents[row] = data
    chunk = chunk_of(tmp_path, contents)
    (encoded,) = handler.run_inference([chunk], encoder)
    good = [row for row in range(11) if row not in bad]
    assert encoded.chunk_id == "chunk"
    assert encoded.keys == [chunk.keys[row] for row in good]
    assert encoded.embeddings.shape == (8, 4, 1536) and encoded.embeddings.dtype == np.float16
    assert [(key, reason) for key, reason, _ in encoded.defects] == [
        (chunk.keys[2], "empty_image"),
        (chunk.keys[5], "not_an_image"),
        (chunk.keys[9], "truncated_image"),
    ]
    assert encoded.unread == []
    assert encoded.width.tolist() == [160] * 8 and encoded.height.tolist() == [80] * 8
    assert (encoded.blur > 0).all() and encoded.blur.dtype == encoded.luminance.dtype == np.float32
    for row, embedding in zip(good, encoded.embeddings, strict=True):
        expected = encoder.get().encode(grid_patches(decode_image(contents[row], 150).pixels, 2, 75))
        assert (embedding == expected).all()


def test_image_chunk_handler_takes_inline_photos(
    handler: ImageChunkHandler, encoder: OnDemand[ImageEncoder], tmp_path: Path
) -> None:
    data = photo(3)
    inline = ImageChunk("inline", [content_key(data)], [None], [data])
    (from_bytes,) = handler.run_inference([inline], encoder)
    (from_file,) = handler.run_inference([chunk_of(tmp_path, [data])], encoder)
    assert (from_bytes.embeddings == from_file.embeddings).all()


def test_image_chunk_handler_remembers_nothing_of_photos_that_changed(
    handler: ImageChunkHandler, encoder: OnDemand[ImageEncoder], tmp_path: Path
) -> None:
    chunk = chunk_of(tmp_path, [photo(0), photo(1), photo(2)])
    (tmp_path / "0.jpg").write_bytes(photo(5))
    (tmp_path / "1.jpg").unlink()
    (encoded,) = handler.run_inference([chunk], encoder)
    assert encoded.keys == chunk.keys[2:] and encoded.defects == []
    assert [(key, reason) for key, reason, _ in encoded.unread] == [
        (chunk.keys[0], "changed_image"),
        (chunk.keys[1], "missing_image"),
    ]


def test_image_chunk_handler_of_no_good_photo_gives_no_rows(
    handler: ImageChunkHandler, encoder: OnDemand[ImageEncoder]
) -> None:
    (encoded,) = handler.run_inference([ImageChunk("none", ["k"], [None], [b"no"])], encoder)
    assert encoded.keys == [] and encoded.embeddings.shape == (0, 4, 1536) and len(encoded.defects) == 1
    assert encoded.blur.shape == encoded.width.shape == (0,)


def test_chunk_handlers_batch_one_chunk_and_measure_it_cheaply(handler: ImageChunkHandler) -> None:
    titles = TitleChunkHandler(TextSpec.resolve(minilm(), max_tokens=16, device="cpu"))
    for each in (handler, titles):
        assert each.batch_elements_kwargs() == {"min_batch_size": 1, "max_batch_size": 1}
        assert not each.share_model_across_processes()
        assert len(pickle.dumps(each)) < 5_000
    assert handler.get_num_bytes([ImageChunk("c", ["ab", "cd"], ["xyz", None], [None, b"12345"])]) == 12
    assert titles.get_num_bytes([TitleChunk("c", ["ab"], ["milk"])]) == 6


def test_image_chunk_handler_runs_in_a_pipeline(handler: ImageChunkHandler, tmp_path: Path) -> None:
    chunks = []
    for number in range(2):
        directory = tmp_path / str(number)
        directory.mkdir()
        chunks.append(
            replace(chunk_of(directory, [photo(2 * number), photo(2 * number + 1), b"x"]), chunk_id=str(number))
        )

    def check(results: list[EncodedImages]) -> None:
        assert sorted(result.chunk_id for result in results) == ["0", "1"]
        assert all(result.embeddings.shape == (2, 4, 1536) and len(result.defects) == 1 for result in results)

    pipeline = TestPipeline(runner="FnApiRunner")
    assert_that(pipeline | beam.Create(chunks) | RunInference(handler), check)
    result = pipeline.run()
    result.wait_until_finish()
    counters = {
        counter.key.metric.name: counter.committed
        for counter in result.metrics().query()["counters"]
        if counter.key.metric.namespace == "embed-images"
    }
    assert counters["photos-encoded"] == 4 and counters["photos-defective"] == 2
    assert counters["num_inferences"] == 2


def test_title_chunk_handler_runs_in_a_pipeline() -> None:
    spec = TextSpec.resolve(minilm(), max_tokens=16, device="cpu")

    def check(results: list[EncodedTitles]) -> None:
        (result,) = results
        assert result.chunk_id == "c" and result.keys == ["1", "2"]
        assert result.states.shape == (2, 16, 384) and result.lengths.tolist() == [4, 4]
        assert (result.states[0] != result.states[1]).any() and result.unknown_share.shape == (2,)

    with TestPipeline(runner="FnApiRunner") as pipeline:
        chunks = pipeline | beam.Create([TitleChunk("c", ["1", "2"], ["red apple", "whole milk"])])
        assert_that(chunks | RunInference(TitleChunkHandler(spec, torch_threads=1)), check)


def test_an_encoder_is_loaded_once_and_by_the_first_chunk() -> None:
    loads: list[int] = []

    def load() -> object:
        time.sleep(0.05)
        loads.append(1)
        return object()

    encoder = OnDemand(load)
    assert not loads
    with ThreadPoolExecutor(4) as pool:
        found = set(pool.map(lambda _: id(encoder.get()), range(8)))
    assert len(loads) == len(found) == 1


def test_a_night_without_new_contents_loads_no_encoder(tmp_path: Path) -> None:
    """In a process of its own: neither timm nor transformers is imported, let alone weights read into a model."""
    (tmp_path / "images").mkdir()
    rows = []
    for number in range(3):
        (tmp_path / "images" / f"{number}.jpg").write_bytes(photo(number))
        rows.append({"item_id": f"i{number}", "title": f"apples {number}", "image_uri": f"images/{number}.jpg"})
    schema = pa.schema(
        [
            CATALOG.schema.field(name)
            for name in CATALOG.schema.names
            if name not in ("image_bytes", "product_key", "store_id")
        ]
    )
    pq.write_table(
        pa.Table.from_pylist([{name: row.get(name) for name in schema.names} for row in rows], schema),
        tmp_path / "catalog.parquet",
    )
    flags = [
        "--data",
        str(tmp_path),
        "--store",
        str(tmp_path / "store"),
        "--image_weights",
        "random:0",
        "--text_encoder",
        minilm(),
    ]
    program = (
        "import sys, json; from pipelines.cli import main; "
        "code = main(['embed', *sys.argv[1:], '--grid', '2', '--max_tokens', '16']);"
        "print(json.dumps({'code': code, 'loaded': [n for n in "
        "('timm', 'camenn_model.encoders.inception_v4', 'camenn_model.encoders.bert') if n in sys.modules]}))"
    )
    found = []
    for _ in range(2):
        out = subprocess.run([sys.executable, "-c", program, *flags], capture_output=True, text=True, check=True)
        found.append(json.loads(out.stdout.splitlines()[-1]))
    assert found[0] == {
        "code": 0,
        "loaded": ["timm", "camenn_model.encoders.inception_v4", "camenn_model.encoders.bert"],
    }
    assert found[1] == {"code": 0, "loaded": []}
