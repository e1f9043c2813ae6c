"""Training over a small shard set: it resumes to the same bits, learns what can be learned, and writes a package that opens."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from camenn_model.checkpoint import read_package
from camenn_model.dataset import AlignmentSampler, collate, stream_batches
from camenn_model.shards import ShardSet
from camenn_model.train import Trainer, TrainOptions, open_corpus, rate_at, train
from pipelines import build_shards
from pipelines.options import run_main
from tests.pipelines.small_city import catalog_table, random_city, write_data, write_store


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A shard set of some 900 clicks with random embeddings of 1 patch × 4 and 3 tokens × 2."""
    root = tmp_path_factory.mktemp("training")
    clicks, orders = random_city(7, 900, 500)
    write_store(root / "store", catalog_table())
    write_data(root / "data", clicks, orders)
    flags = [
        "--data",
        str(root / "data"),
        "--store",
        str(root / "store"),
        "--out",
        str(root / "shards"),
        "--max_reject_rate",
        "1",
        "--attribution_hours",
        "6",
    ]
    assert run_main(build_shards.main, flags) == 0
    return str(root / "shards")


def options(shards: str, out: Path, **changes: object) -> TrainOptions:
    return TrainOptions(shards=shards, out=str(out), batch_size=32, **changes)  # type: ignore[arg-type]


def no_progress(*_: object) -> None:
    pass


class Killed(Exception):
    """Stands for SIGKILL: nothing after it is run."""


def test_trainer_resumes_to_the_same_bits(shards: str, tmp_path: Path) -> None:
    whole = Trainer(open_corpus(options(shards, tmp_path / "whole")), options(shards, tmp_path / "whole"), no_progress)
    whole.run()

    interrupted = options(shards, tmp_path / "cut", checkpoint_seconds=0.0)
    steps = 0

    def kill(*_: object) -> None:
        nonlocal steps
        steps += 1
        if steps == 6:
            raise Killed

    with pytest.raises(Killed):
        Trainer(open_corpus(interrupted), interrupted, kill).run()
    resumed = Trainer(open_corpus(interrupted), interrupted, no_progress)
    resumed.run()
    assert resumed.state.step == whole.state.step > 6
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name
    assert [row["cvr"] for row in resumed.state.curves] == [row["cvr"] for row in whole.state.curves]


def test_train_begins_anew_with_other_options(shards: str, tmp_path: Path) -> None:
    first = options(shards, tmp_path, checkpoint_seconds=0.0)

    def kill(_: str, done: int, *__: object) -> None:
        if done > 64:
            raise Killed

    with pytest.raises(Killed):
        Trainer(open_corpus(first), first, kill).run()
    other = options(shards, tmp_path, seed=1)
    trainer = Trainer(open_corpus(other), other, no_progress)
    trainer._restore()
    assert trainer.state.step == 0


def test_train_writes_a_package_that_opens(shards: str, tmp_path: Path) -> None:
    metrics = train(options(shards, tmp_path / "out"), tmp_path, no_progress)
    package = read_package(tmp_path)
    assert package.metrics == json.loads(json.dumps(metrics))
    assert not package.model().training
    assert {path.suffix for path in tmp_path.iterdir() if path.is_file()} == {".safetensors", ".json", ".csv"}
    assert len(package.version) == 16
    assert set(metrics["test"]) == set(metrics["baselines"]["popularity"])


def test_stream_batches_gives_every_example_once_and_keeps_sessions_whole(shards: str, tmp_path: Path) -> None:
    corpus = open_corpus(options(shards, tmp_path))
    files = corpus.files("train")
    for rng in (None, np.random.default_rng(3)):
        batches = list(stream_batches(corpus.reader, files, 32, rng))
        assert sum(len(batch) for batch in batches) == corpus.rows("train")
        assert max(len(batch) for batch in batches) <= 32
    again = list(stream_batches(corpus.reader, files, 32, np.random.default_rng(3)))
    assert all(
        np.array_equal(a.item, b.item) and np.array_equal(a.label, b.label) for a, b in zip(batches, again, strict=True)
    )


def test_collate_holds_each_item_and_session_once(shards: str, tmp_path: Path) -> None:
    from camenn_model.batch import check_batch

    corpus = open_corpus(options(shards, tmp_path))
    rows = next(stream_batches(corpus.reader, corpus.files("train"), 32, None))
    batch = collate(rows, corpus.table)
    check_batch(batch, corpus.config)
    assert len(batch.items) == len(np.unique(rows.item))
    assert len(batch.audience) == len(np.unique(rows.session))
    # Row by row, the batch says what the example said.
    for place in range(len(rows)):
        assert batch.items.cats[batch.pairs.item[place]].tolist() == corpus.table.cats[rows.item[place]].tolist()
        assert batch.audience.cats[batch.pairs.audience[place]].tolist() == rows.audience_cats[place].tolist()


def test_alignment_sampler_never_takes_held_out_or_same_product(shards: str, tmp_path: Path) -> None:
    table = open_corpus(options(shards, tmp_path)).table
    sampler = AlignmentSampler(table)
    assert not table.held_out[sampler.rows].any()
    for seed in range(20):
        rng = np.random.default_rng(seed)
        anchors = np.arange(len(sampler))
        found = sampler.others(anchors, rng)
        a, b = sampler.rows[anchors[found >= 0]], sampler.rows[found[found >= 0]]
        assert (table.product[a] != table.product[b]).all()
        assert (table.image_row[a] != table.image_row[b]).all()
    for fold in (0, 1):
        assert (table.fold[AlignmentSampler(table, fold).rows] != fold).all()


def test_rate_rises_and_falls() -> None:
    assert rate_at(0.05, 0.1) == pytest.approx(0.5)
    assert rate_at(0.1, 0.1) == pytest.approx(1.0)
    assert rate_at(1.0, 0.1) == 0.0


def test_contents_gather_equals_the_stored_rows(shards: str) -> None:
    images = ShardSet(shards).images
    rows = np.array([len(images) - 1, 0, -1, 1])
    gathered = images.gather(rows)
    assert not gathered[2].any()
    flat = np.concatenate(list(images.views))
    assert np.array_equal(gathered[[0, 1, 3]], flat[[len(images) - 1, 0, 1]])
