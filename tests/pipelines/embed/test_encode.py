"""The steps between wanted contents and parts of the store, one by one and without encoders; the whole stage is in
test_stage.py.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.embed import encode
from pipelines.embed.encode import (
    ChooseKernels,
    CommitChunk,
    CountPending,
    CutChunks,
    PackedChunk,
    ReadKeys,
    SkipCommitted,
    pending,
)
from pipelines.embed.handlers import EncodedImages, ImageChunk, TitleChunk
from pipelines.io.files import ipc_bytes
from pipelines.runs.accounting import Count
from pipelines.runs.store import IMAGES, TITLES, Part, find_part
from schemas.embeddings import image_embeddings

SHAPE = (1, 4)
CONTRACT = image_embeddings(*SHAPE)
DEAD, GONE = ("dead", "corrupt_image", "no photo"), ("gone", "missing_image", "not there")


def bucket(wanted: list[str] | None, stored: list[str] | None) -> dict[str, pa.Table]:
    """A bucket after the shuffle: wanted titles with their keys, and the keys of the stored ones."""
    kinds = {}
    if wanted is not None:
        kinds["wanted"] = pa.table(
            {"title_key": pa.array(wanted, pa.string()), "title": [f"title {key}" for key in wanted]}
        )
    if stored is not None:
        kinds["stored"] = pa.table({"title_key": pa.array(stored, pa.string())})
    return kinds


KEYS = st.lists(st.sampled_from("abcdefgh"), max_size=20)


@given(st.none() | KEYS, st.none() | KEYS)
def test_pending_are_those_that_are_wanted_and_not_stored(wanted: list[str] | None, stored: list[str] | None) -> None:
    """Each once, in order: the names of chunks depend on it."""
    found = pending(bucket(wanted, stored), "title_key")
    due = sorted(set(wanted or []) - set(stored or []))
    assert (found["title_key"].to_pylist() if found.num_rows else []) == due
    assert (found["title"].to_pylist() if found.num_rows else []) == [f"title {key}" for key in due]
    counts = list(CountPending(TITLES).process((0, bucket(wanted, stored))))
    everything = len(set(wanted or []))
    assert counts == [
        Count(TITLES, "in", everything),
        Count(TITLES, "stored", everything - len(due)),
        Count(TITLES, "due", len(due)),
    ]


def cut(run: str, wanted: list[str]) -> list[PackedChunk]:
    step = CutChunks(TITLES, run, None)
    step.setup()
    return list(step.process((0, bucket(wanted, ["b"]))))


def test_chunks_hold_every_pending_content_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "CHUNK", 3)
    wanted = [*"hgfedcba", "c", "h"]
    found = cut("r1", wanted)
    chunks = [chunk.unpack() for chunk in found]
    assert all(isinstance(chunk, TitleChunk) for chunk in chunks)
    assert [chunk.keys for chunk in chunks] == [["a", "c", "d"], ["e", "f", "g"], ["h"]]
    assert [chunk.contents for chunk in found] == [3, 3, 1]
    assert isinstance(chunks[2], TitleChunk) and chunks[2].titles == ["title h"]


def test_a_chunk_is_known_again_within_its_run_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A later run makes the same chunk of photos that were gone once more: it must not count as done."""
    monkeypatch.setattr(encode, "CHUNK", 3)
    names = [chunk.chunk_id for chunk in cut("r1", [*"hgfedcba"])]
    assert names == [chunk.chunk_id for chunk in cut("r1", [*"abcdefgh", "a"])]
    assert len(set(names + [chunk.chunk_id for chunk in cut("r2", [*"abcdefgh"])])) == 6


def encoded(chunk_id: str, keys: list[str]) -> EncodedImages:
    rows = len(keys)
    return EncodedImages(
        chunk_id,
        keys,
        embeddings=np.ones((rows, *SHAPE), dtype=np.float16),
        blur=np.zeros(rows, dtype=np.float32),
        luminance=np.full(rows, 0.5, dtype=np.float32),
        width=np.full(rows, 80, dtype=np.int32),
        height=np.full(rows, 80, dtype=np.int32),
        kernels="eager",
        seconds=1.5,
        defects=[DEAD],
        unread=[GONE],
    )


def commit(directory: Path, chunks: list[EncodedImages]) -> list[tuple[str, Any]]:
    """The outputs of a bundle of encoded chunks: (tag, value)."""
    step = CommitChunk(IMAGES, str(directory), CONTRACT, SHAPE, None)
    step.setup()
    step.start_bundle()
    reported = [(output.tag, output.value) for chunk in chunks for output in step.process(chunk)]
    reported += [(output.tag, output.value.value) for output in step.finish_bundle()]
    step.teardown()
    return reported


def test_photos_that_were_gone_are_told_and_not_remembered(tmp_path: Path) -> None:
    """A photo that cannot be decoded is never read again; one that was not there may come back."""
    reported = commit(tmp_path, [encoded("c1", ["k1", "k2"]), encoded("c2", []), encoded("c3", ["k3"])])
    files = [value for tag, value in reported if tag == "files"]
    assert [record.rows for record in files] == [2, 0, 1]
    assert [row["key"] for tag, value in reported if tag == "unread" for row in value.to_pylist()] == ["gone"] * 3
    part = find_part(str(tmp_path), "c1")
    assert part is not None and part.path == files[0].path
    assert (part.failures, part.unread) == ((DEAD,), (GONE,))
    for name, stored in (("c1", ["dead", "k1", "k2"]), ("c2", ["dead"])):
        part = find_part(str(tmp_path), name)
        assert part is not None
        assert sorted(known(part)) == stored


def known(part: Part) -> list[str]:
    """Keys that no later run requests."""
    (table,) = ReadKeys("image_key").process(part)
    return list(table["image_key"].to_pylist())


def test_a_chunk_that_was_committed_is_reported_and_not_encoded_again(tmp_path: Path) -> None:
    reported = commit(tmp_path, [encoded("c1", ["k1", "k2"])])
    rows = pa.table({"image_key": ["k1"], "path": ["a.jpg"], "bytes": pa.array([None], pa.binary())})
    step = SkipCommitted(str(tmp_path), CONTRACT)
    again = list(step.process(PackedChunk("c1", 2, ipc_bytes(rows, "zstd"))))
    assert all(isinstance(output, beam.pvalue.TaggedOutput) for output in again)
    assert sorted(output.tag for output in again) == ["files", "unread"]
    assert [output.value for output in again if output.tag == "files"] == [v for tag, v in reported if tag == "files"]
    (fresh,) = step.process(PackedChunk("c9", 1, ipc_bytes(rows, "zstd")))
    assert fresh == ImageChunk("c9", ["k1"], ["a.jpg"], [None], False)


@pytest.mark.parametrize(("due", "compiled"), [([4, 3, 2], False), ([4, 3, 3], True), ([10], True), ([], False)])
def test_kernels_are_compiled_where_the_whole_run_pays(due: list[int], compiled: bool) -> None:
    spec: Any = SimpleNamespace(pays_to_compile=lambda photos: photos >= 10)
    (chunk,) = ChooseKernels(spec).process(PackedChunk("c1", 4, b""), due)
    assert chunk == PackedChunk("c1", 4, b"", compiled)
