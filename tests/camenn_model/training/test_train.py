"""Training over a small shard set.

It resumes with bitwise equal results, is equal with any number of processes, and writes a package
that opens.
"""

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from camenn_model.batch import AlignmentBatch
from camenn_model.config import LossConfig
from camenn_model.content.agreement import FOLDS
from camenn_model.data.alignment_sampler import AlignmentSampler
from camenn_model.data.batching import collate, concat_rows, list_units, split_batch, stream_batches
from camenn_model.data.prefetch import map_ahead
from camenn_model.data.shard_set import ShardSet
from camenn_model.evaluation.predictions import Predictions
from camenn_model.model.bilinear import ENOUGH_COEFFICIENT, LEAST_COEFFICIENT
from camenn_model.model.count_network import Counts
from camenn_model.model.layers import FAST
from camenn_model.model.tokens import AgeTable
from camenn_model.model.wide import Catalog, Wide, WideRows
from camenn_model.package import read_package
from camenn_model.tensors import load_tensors, save_tensors
from camenn_model.training.corpus import Corpus, TrainOptions, open_corpus
from camenn_model.training.fit_counts import CountRows, predict_logits
from camenn_model.training.fit_wide import Fit
from camenn_model.training.optimizer import OptimizerConfig, rate_at
from camenn_model.training.train import train, write_curves
from camenn_model.training.trainer import Trainer
from pipelines.runner.exit_codes import GatesFailed, run_main
from pipelines.shards import command as shards_command
from pipelines.train import processes
from schemas.errors import InputError
from tests.support.listeners import beyond_loopback, listeners, process_tree
from tests.support.small_city import catalog_table, random_city, write_data, write_store


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
    assert run_main(shards_command.main, flags) == 0
    return str(root / "shards")


def options(shards: str, out: Path, **changes: Any) -> TrainOptions:
    return TrainOptions(shards=shards, out=str(out), batch_size=32, **changes)


def no_progress(*_: object) -> None:
    pass


class Killed(Exception):
    """Stands for SIGKILL: nothing after it is run."""


def same_to_the_bit(one: Trainer, other: Trainer) -> None:
    """Averages and moments, where the best weights may be from before the kill."""
    for name, tensor in one.ema.state_dict().items():
        assert torch.equal(tensor, other.ema.state_dict()[name]), name
    moments = [trainer.optimizer.state_dict()["state"] for trainer in (one, other)]
    assert moments[0].keys() == moments[1].keys()
    for number, values in moments[0].items():
        for name, tensor in values.items():
            assert torch.equal(tensor, moments[1][number][name]), (number, name)


def test_trainer_resumes_to_the_same_bits(shards: str, tmp_path: Path) -> None:
    whole = Trainer(open_corpus(options(shards, tmp_path / "whole")), options(shards, tmp_path / "whole"), no_progress)
    whole.run()

    interrupted = options(shards, tmp_path / "cut", checkpoint_seconds=0.0)
    steps = 0

    def kill(what: str, *_: object) -> None:
        nonlocal steps
        steps += what == "train"
        if steps == 6:
            raise Killed

    with pytest.raises(Killed):
        Trainer(open_corpus(interrupted), interrupted, kill).run()
    assert load_tensors(tmp_path / "cut" / "checkpoints" / "main.safetensors")[1]["state"]["step"] > 0
    resumed = Trainer(open_corpus(interrupted), interrupted, no_progress)
    resumed.run()
    assert resumed.state.step == whole.state.step > 6
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name
    assert [row["cvr"] for row in resumed.state.curves] == [row["cvr"] for row in whole.state.curves]
    same_to_the_bit(whole, resumed)


def recorded_losses(
    monkeypatch: pytest.MonkeyPatch, trainers: list[Trainer], loss: Callable[[int], float]
) -> list[int]:
    """Let an evaluation find a loss that depends on the step of the last trainer alone; returns the steps of
    evaluations, as they come.
    """
    steps: list[int] = []

    def predict(*_: object) -> Predictions:
        steps.append(trainers[-1].state.step)
        # Of one label 1, the log loss of a logit z is log(1 + exp(-z)).
        logits = np.array([-math.log(math.expm1(loss(steps[-1])))])
        return Predictions(logits, np.ones(1), np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64))

    monkeypatch.setattr("camenn_model.training.trainer.predict", predict)
    return steps


def quick_trainer(
    trainers: list[Trainer], shards: str, out: Path, progress: Any = no_progress, **changes: Any
) -> Trainer:
    """A trainer that begins with clicks at once, also put at the end of `trainers`."""
    chosen = options(shards, out, **({"alignment_passes": 0, "choice_passes": 0} | changes))
    trainers.append(Trainer(open_corpus(chosen), chosen, progress))
    return trainers[-1]


def test_a_run_that_is_resumed_late_keeps_its_best_and_evaluates_when_due(
    shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is killed long after its best evaluation, and between two that are due."""
    trainers: list[Trainer] = []
    # The first evaluation is the best one.
    steps = recorded_losses(monkeypatch, trainers, lambda step: 0.3 + step / 1_000)
    whole = quick_trainer(trainers, shards, tmp_path / "whole")
    whole.run()
    due = list(steps)
    assert len(due) >= 4 and whole.state.best_step == due[0]

    def kill(what: str, *_: object) -> None:
        if what == "train" and trainers[-1].state.step == due[1] + 2:
            raise Killed

    assert due[1] + 2 < due[2]
    with pytest.raises(Killed):
        quick_trainer(trainers, shards, tmp_path / "cut", kill, checkpoint_seconds=0.0).run()
    steps.clear()
    resumed = quick_trainer(trainers, shards, tmp_path / "cut", checkpoint_seconds=0.0)
    resumed.run()
    assert steps == due[2:]
    assert resumed.state.best_step == due[0] and resumed.state.step == whole.state.step
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name
    same_to_the_bit(whole, resumed)
    reported = [[row["early_stop_log_loss"] for row in trainer.state.curves] for trainer in (whole, resumed)]
    assert np.array_equal(reported[0], reported[1], equal_nan=True)


def test_each_epoch_sees_every_example_once(shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainers: list[Trainer] = []
    recorded_losses(monkeypatch, trainers, lambda step: 1 / (1 + step))
    trainer = quick_trainer(trainers, shards, tmp_path, epochs=2)
    rows = trainer.corpus.rows("train")
    seen: list[list[int]] = [[], []]

    def step(share: Any) -> None:
        seen[trainer.state.epoch] += [start for piece in share.pieces for start in piece.rows.start.tolist()]
        Trainer.step(trainer, share)

    monkeypatch.setattr(trainer, "step", step)
    trainer.run()
    assert trainer.state.epoch == 2 and trainer.state.examples == 2 * rows
    assert sorted(seen[0]) == sorted(seen[1]) and len(seen[0]) == rows
    assert seen[0] != seen[1], "in another order"


def test_each_step_and_piece_draws_its_own_dropout(
    shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the same ones again in a run of the same seed, which is what resuming needs."""
    trainers: list[Trainer] = []
    drawn: list[list[tuple[float, ...]]] = []
    for _ in range(2):
        trainer = quick_trainer(trainers, shards, tmp_path, micro_batches=2)
        drawn.append([])
        # Read whenever a piece is computed, the generator's next numbers identify the dropout that
        # the piece would draw.
        trainer.objective.register_forward_pre_hook(
            lambda *_: drawn[-1].append(tuple(torch.rand(4, generator=torch.default_generator.clone_state()).tolist()))
        )
        for share in itertools.islice(trainer.stream(), 3):
            trainer.step(share)
    assert len(drawn[0]) == len(set(drawn[0])) == 6
    assert drawn[0] == drawn[1]


def test_patience_counts_evaluations_in_a_row(shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One worse, then a better one, then two worse: two in a row end it, not three in total."""
    trainers: list[Trainer] = []
    losses = iter([0.9, 0.8, 0.85, 0.7, 0.75, 0.7, 0.1, 0.1])
    steps = recorded_losses(monkeypatch, trainers, lambda step: next(losses))
    trainer = quick_trainer(trainers, shards, tmp_path, patience=2, evaluations=8)
    trainer.run()
    assert len(steps) == 6 and trainer.state.best_step == steps[3]
    assert trainer.state.best_loss == pytest.approx(0.7)


def test_train_begins_anew_with_other_options(shards: str, tmp_path: Path) -> None:
    first = options(shards, tmp_path, checkpoint_seconds=0.0)

    def kill(what: str, done: int, *_: object) -> None:
        if what == "train" and done > 64:
            raise Killed

    with pytest.raises(Killed):
        Trainer(open_corpus(first), first, kill).run()
    again = Trainer(open_corpus(first), first, no_progress)
    assert again._restore() and again.state.step > 0
    other = options(shards, tmp_path, seed=1)
    trainer = Trainer(open_corpus(other), other, no_progress)
    trainer._restore()
    assert trainer.state.step == 0


def test_train_begins_anew_where_another_version_was_killed(shards: str, tmp_path: Path) -> None:
    asked = options(shards, tmp_path, checkpoint_seconds=0.0)
    trainer = Trainer(open_corpus(asked), asked, no_progress)
    trainer._begin()
    trainer._save()
    assert Trainer(open_corpus(asked), asked, no_progress)._restore()
    tensors, header = load_tensors(trainer.checkpoints.path)
    del tensors["loss.choices_count"]
    save_tensors(trainer.checkpoints.path, tensors, header)
    assert not Trainer(open_corpus(asked), asked, no_progress)._restore()


def test_orders_begin_with_what_each_part_is_worth(
    shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = options(shards, tmp_path)
    said: list[torch.Tensor] = []

    def fitted(wide: Wide, base: float, catalog: Catalog, train: WideRows, *_: object) -> Fit:
        said.append(train.part_logits)
        return Fit(penalty=1.0, loss=0.5, coefficients=(0.1, 0.3, -0.2, 0.5))

    def counted(counts: Counts, *_: object) -> float:
        # On so few rows no epoch may be better than predicting 0.
        torch.nn.init.normal_(counts.out.weight)
        return 0.5

    monkeypatch.setattr("camenn_model.training.pretraining.fit_wide", fitted)
    monkeypatch.setattr("camenn_model.training.pretraining.fit_counts", counted)
    trainer = Trainer(open_corpus(asked), asked, no_progress)
    trainer._begin()
    (before,) = said
    affinity = trainer.model.affinity
    after = trainer.pretraining().wide_rows("train")
    share = 0.1 / ENOUGH_COEFFICIENT
    assert float(trainer.loss.choices_count) == pytest.approx(share)
    assert torch.allclose(
        FAST * affinity.worth[:: trainer.model.config.width], torch.tensor([LEAST_COEFFICIENT, 0.3, -0.2])
    )
    assert before.shape == (len(after.label), 4)
    assert torch.allclose(after.part_logits[:, 0], share * before[:, 0], atol=1e-6)
    assert torch.allclose(after.part_logits[:, 1:], before[:, 1:3], atol=1e-6)
    counts = predict_logits(trainer.model.counts, CountRows.of(after))
    assert torch.allclose(counts, 0.5 * before[:, 3], atol=1e-6) and float(counts.std()) > 0


def test_train_writes_a_package_that_opens(shards: str, tmp_path: Path) -> None:
    metrics = train(options(shards, tmp_path / "out"), tmp_path, no_progress)
    package = read_package(tmp_path)
    assert package.metrics == json.loads(json.dumps(metrics))
    assert not package.model().training
    assert {path.suffix for path in tmp_path.iterdir() if path.is_file()} == {".safetensors", ".json", ".csv"}
    assert len(package.version) == 16
    assert set(metrics["test"]) == set(metrics["baselines"]["popularity"])
    tensors, header = load_tensors(tmp_path / "model.safetensors")
    del tensors["affinity.deep.weight"]
    save_tensors(tmp_path / "model.safetensors", tensors, header)
    with pytest.raises(InputError, match="another version of camenn trained.*affinity.deep.weight.*camenn train"):
        package.model()
    features = tmp_path / "features.json"
    features.write_text(json.dumps({**json.loads(features.read_text()), "version": 1}))
    with pytest.raises(InputError, match=r"features\.json: another version of camenn.*camenn train"):
        read_package(tmp_path)


def in_file_order(corpus: Corpus) -> Any:
    return corpus.reader.read(corpus.files("train")[0][0])


def test_stream_batches_gives_every_example_once_and_keeps_sessions_whole(shards: str, tmp_path: Path) -> None:
    corpus = open_corpus(options(shards, tmp_path))
    units = list_units(corpus.files("train"))
    assert len(units) > 1
    expected = np.sort(np.concatenate([corpus.reader.read_unit(unit).start for unit in units]))
    for by_store in (False, True):
        batches = list(stream_batches(corpus.reader, units, 32, np.random.default_rng(3), by_store=by_store))
        assert np.array_equal(np.sort(np.concatenate([batch.start for batch in batches])), expected)
        assert max(len(batch) for batch in batches) <= 32
        # A session is (user, start, store); it is in more than one batch only where it is longer than a batch.
        seen: dict[tuple[int, int, int], int] = {}
        for number, batch in enumerate(batches):
            for key in set(zip(batch.user.tolist(), batch.start.tolist(), batch.store.tolist(), strict=True)):
                assert seen.setdefault(key, number) == number
        again = list(stream_batches(corpus.reader, units, 32, np.random.default_rng(3), by_store=by_store))
        assert all(
            np.array_equal(a.item, b.item) and np.array_equal(a.label, b.label)
            for a, b in zip(batches, again, strict=True)
        )
        other = list(stream_batches(corpus.reader, units, 32, np.random.default_rng(4), by_store=by_store))
        assert not np.array_equal(batches[0].start, other[0].start)


def test_batches_by_store_hold_fewer_stores(shards: str, tmp_path: Path) -> None:
    corpus = open_corpus(options(shards, tmp_path))
    units = list_units(corpus.files("train"))
    stores = [
        [
            len(np.unique(batch.store))
            for batch in stream_batches(corpus.reader, units, 32, np.random.default_rng(3), by_store=by_store)
        ]
        for by_store in (False, True)
    ]
    assert np.mean(stores[1]) < np.mean(stores[0])


def test_workers_change_nothing(shards: str, tmp_path: Path) -> None:
    trained = []
    for workers in (1, 3):
        chosen = options(shards, tmp_path / str(workers), workers=workers)
        trainer = Trainer(open_corpus(chosen), chosen, no_progress)
        trainer.run()
        trained.append(trainer.model.state_dict())
    assert all(torch.equal(tensor, trained[1][name]) for name, tensor in trained[0].items())


@given(st.lists(st.integers(0, 5), max_size=60), st.integers(1, 7))
def test_map_ahead_keeps_the_order(values: list[int], workers: int) -> None:
    def work(value: int) -> int:
        time.sleep(value / 5_000)
        return value * value

    assert list(map_ahead(work, iter(values), workers)) == [value * value for value in values]


def test_map_ahead_passes_errors_on() -> None:
    def work(value: int) -> int:
        if value == 3:
            raise ValueError("three")
        return value

    found = []
    with pytest.raises(ValueError, match="three"):
        for value in map_ahead(work, iter(range(10)), 2):
            found.append(value)
    assert found == [0, 1, 2]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 200), st.integers(1, 9))
def test_split_batch_gives_every_row_once_in_order(shards: str, count: int, parts: int) -> None:
    corpus = open_corpus_once(shards)
    rows = in_file_order(corpus)
    rows = rows.take(np.arange(min(count, len(rows))))
    pieces = split_batch(rows, parts)
    assert len(pieces) == parts
    assert np.array_equal(np.concatenate([piece.item for piece in pieces]), rows.item)
    assert max(len(piece) for piece in pieces) <= 1.5 * len(rows) / parts + 1


_CORPORA: dict[str, Corpus] = {}


def open_corpus_once(shards: str) -> Corpus:
    if shards not in _CORPORA:
        _CORPORA[shards] = open_corpus(options(shards, Path(shards)))
    return _CORPORA[shards]


def without_dropout(corpus: Corpus) -> Corpus:
    names = ("dropout", "attention_dropout", "id_dropout", "modality_dropout", "position_dropout")
    none: dict[str, Any] = dict.fromkeys(names, 0.0)
    return replace(corpus, config=replace(corpus.config, **none))


def test_micro_batches_sum_to_the_gradient_of_the_whole_batch(
    shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The balance loss and a click's alternatives look at a micro-batch as a whole, and the
    # alignment tasks draw again for each. Without them, and without dropout and gate noise, the
    # pieces sum.
    monkeypatch.setattr("camenn_model.model.experts.torch.randn_like", torch.zeros_like)
    gradients = []
    for pieces in (1, 3):
        loss = LossConfig(balance=0.0, choice=0.0)
        chosen = options(shards, tmp_path, micro_batches=pieces, alignment=False, loss=loss, seed=5)
        trainer = Trainer(without_dropout(open_corpus(chosen)), chosen, no_progress)
        trainer.step(next(iter(trainer.stream())))
        gradients.append({name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 20
    for name, whole in gradients[0].items():
        # With one patch a photo its position carries no information: the gradient is only rounding.
        if name not in ("item_tokens.row", "item_tokens.column"):
            torch.testing.assert_close(
                gradients[1][name], whole, rtol=1e-3, atol=1e-3 * float(whole.abs().max()), msg=name
            )


@pytest.mark.parametrize(("passes", "pieces", "epochs"), [(8, 1, 1), (2, 1, 2), (2, 4, 2), (1, 2, 1), (0, 1, 1)])
def test_with_clicks_each_listing_is_aligned_a_few_times_at_most(
    shards: str, tmp_path: Path, passes: int, pieces: int, epochs: int
) -> None:
    chosen = options(shards, tmp_path, alignment_passes=passes, micro_batches=pieces, epochs=epochs)
    trainer = Trainer(open_corpus(chosen), chosen, no_progress)
    assert trainer.sampler is not None
    drawn = []

    class Counted(AlignmentSampler):
        def draw(self, pairs: int, listings: int, rng: np.random.Generator) -> AlignmentBatch | None:
            drawn.append(min(listings, len(self)))
            return super().draw(pairs, listings, rng)

    trainer.sampler = Counted(trainer.corpus.table)
    aligned = []
    for epoch in range(epochs):
        trainer.state.epoch = epoch
        for share in trainer.stream():
            aligned.append(all(piece.alignment is not None for piece in share.pieces))
            assert aligned[-1] == any(piece.alignment is not None for piece in share.pieces)
            trainer.state.step += 1
    # No more than requested and the step that reached it; at least half of it where there are enough steps.
    most, of_step = passes * len(trainer.sampler), pieces * len(trainer.sampler)
    assert min(most, of_step * len(aligned)) / 2 <= sum(drawn) <= most + of_step * (passes > 0)
    assert any(aligned) == (passes > 0)


def test_losses_of_alignment_are_unknown_where_it_takes_no_part(shards: str, tmp_path: Path) -> None:
    chosen = options(shards, tmp_path, alignment_passes=1)
    trainer = Trainer(open_corpus(chosen), chosen, no_progress)
    trainer.align_every = 2
    for share in itertools.islice(trainer.stream(), 4):
        trainer.step(share)
    for name in ("ita", "tia", "contrastive"):
        assert [math.isnan(row[name]) for row in trainer.state.curves] == [False, True, False, True], name
    assert all(math.isfinite(row["total"]) and math.isfinite(row["cvr"]) for row in trainer.state.curves)
    write_curves(tmp_path / "curves.csv", trainer.state.curves)
    assert (tmp_path / "curves.csv").read_text().splitlines()[2].split(",")[4:7] == ["", "", ""]


def run_train(processes: int, *flags: str) -> dict[str, Any]:
    """`camenn train` with some processes; its metrics."""
    command = [sys.executable, "-m", "pipelines.train.command", "--processes", str(processes)]
    command += ["--batch_size", "32", "--threads", "1", *flags]
    started = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    with listeners(started.pid) as found:
        _, errors = started.communicate(timeout=600)
    assert started.returncode == 0, errors[-3000:]
    assert not beyond_loopback(found)
    out = Path(flags[flags.index("--out") + 1])
    run = json.loads((out / "latest.json").read_text())["run"]
    return dict(json.loads((out / "runs" / run / "metrics.json").read_text()))


@pytest.mark.slow
def test_two_processes_end_where_one_does(shards: str, tmp_path: Path) -> None:
    one = run_train(1, "--shards", shards, "--out", str(tmp_path / "one"), "--micro_batches", "2", "--epochs", "2")
    two = run_train(2, "--shards", shards, "--out", str(tmp_path / "two"), "--epochs", "2")
    assert one["train"]["steps"] == two["train"]["steps"] > 10
    assert two["early_stop_log_loss"] == pytest.approx(one["early_stop_log_loss"], abs=1e-4)
    assert two["test"]["log_loss"] == pytest.approx(one["test"]["log_loss"], abs=1e-4)


ENDS = """
import os, sys, time
rank = os.environ["RANK"]
assert os.environ["WORLD_SIZE"] == "2" and os.environ["GLOO_SOCKET_IFNAME"].startswith("lo")
if rank == "1":
    sys.exit(int(sys.argv[1]))
time.sleep(0 if sys.argv[1] == "0" else 600)
"""


@pytest.mark.parametrize(("code", "error"), [(2, InputError), (3, GatesFailed), (1, RuntimeError), (0, None)])
def test_processes_end_together_as_the_first_that_fails(
    monkeypatch: pytest.MonkeyPatch, code: int, error: type[Exception] | None
) -> None:
    monkeypatch.setattr(processes, "COMMAND", (sys.executable, "-c", ENDS))
    before = process_tree(os.getpid())
    with nullcontext() if error is None else pytest.raises(error, match="above"):
        processes.train_in_processes(2, [str(code)])
    assert process_tree(os.getpid()) <= before
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_processes_that_cannot_share_a_step_are_refused(shards: str, tmp_path: Path) -> None:
    from camenn_model.training.distributed import Processes

    chosen = options(shards, tmp_path, micro_batches=3)
    with pytest.raises(InputError, match="--micro_batches 3: 2 processes"):
        Trainer(open_corpus(chosen), chosen, no_progress, Processes(0, 2))


def test_ages_end_at_the_oldest_that_training_learns_from(shards: str, tmp_path: Path) -> None:
    trainer = quick_trainer([], shards, tmp_path)
    trainer.pretraining().run()
    hours: dict[tuple[str, str], list[float]] = {}
    for path, _ in trainer.corpus.files("train"):
        rows = pq.read_table(path, columns=["user_id", "session_id", "history_hours"]).to_pylist()
        hours |= {(row["user_id"], row["session_id"]): row["history_hours"] for row in rows}
    buckets = [min(31, int(3.4 * np.float32(math.log1p(age)))) for ages in hours.values() for age in ages]
    counts = np.bincount(buckets, minlength=32)
    oldest = np.flatnonzero(counts > 0.001 * counts.sum()).max()
    tables = [module for module in trainer.model.modules() if isinstance(module, AgeTable)]
    assert len(tables) == 3 and 0 < oldest < 31
    assert all(int(table.oldest) == oldest for table in tables)


@pytest.mark.slow
def test_a_killed_training_ends_with_the_same_weights(shards: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.support.saving_train", shards]
    subprocess.run([*command, str(tmp_path / "whole")], check=True, timeout=300)
    cut = tmp_path / "cut"
    checkpoint = cut / "checkpoints" / "main.safetensors"
    for steps in (4, 11):
        process = subprocess.Popen([*command, str(cut)])
        while not checkpoint.exists() or load_tensors(checkpoint)[1]["state"]["step"] < steps:
            assert process.poll() is None, "it ended before it was killed"
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    subprocess.run([*command, str(cut)], check=True, timeout=300)
    for name in ("model.safetensors", "calibration.json", "curves.csv"):
        assert (cut / "package" / name).read_bytes() == (tmp_path / "whole" / "package" / name).read_bytes(), name


@pytest.mark.parametrize("where", ["weights", "gradient"])
def test_training_that_is_not_finite_stops_and_writes_the_batch(shards: str, tmp_path: Path, where: str) -> None:
    chosen = options(shards, tmp_path, alignment_passes=0, choice_passes=0)
    trainer = Trainer(open_corpus(chosen), chosen, no_progress)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    name, parameter = next((name, p) for name, p in trainer.model.named_parameters() if name == "pair_tokens.task")
    if where == "weights":
        with torch.no_grad():
            parameter.fill_(torch.nan)
    else:
        parameter.register_hook(lambda gradient: gradient * torch.inf)
    with pytest.raises(InputError, match="not finite at step 0.*--learning_rate"):
        trainer.run()
    (path,) = tmp_path.glob("nan-step-0-*.json")
    written = json.loads(path.read_text())
    assert len(written["item_id"]) == len(written["label"]) == len(written["session_start"]) > 0
    assert set(written["item_id"]) <= set(trainer.corpus.table.ids.to_pylist())
    # No step was taken. The oldest age, the count network, the linear part, its coefficient of the
    # preferences, and the preference space come before the first.
    after = trainer.model.state_dict()
    found = ("wide.", "counts.", "item_tokens.tastes.", "affinity.audience.out.")
    fitted = {name, "affinity.worth", *(key for key in before if key.startswith(found) or key.endswith(".oldest"))}
    assert all(torch.equal(after[key], value) for key, value in before.items() if key not in fitted)


def test_collate_holds_each_item_and_session_once(shards: str, tmp_path: Path) -> None:
    from camenn_model.batch import check_batch

    corpus = open_corpus(options(shards, tmp_path))
    units = list_units(corpus.files("train"))
    rows = next(stream_batches(corpus.reader, units, 32, np.random.default_rng(0)))
    batch = collate(rows, corpus.table)
    check_batch(batch, corpus.config)
    assert len(batch.items) == len(np.unique(rows.item))
    assert len(batch.audience) == len(np.unique(rows.session))
    # Row by row, the batch equals the example.
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
    # Products are judged as a whole.
    folds = {product: set(table.fold[table.product == product]) for product in table.product}
    assert all(len(found) == 1 and found <= set(range(FOLDS)) for found in folds.values())


def test_alignment_draws_as_many_pairs_and_listings_as_asked(shards: str, tmp_path: Path) -> None:
    table = open_corpus(options(shards, tmp_path)).table
    sampler = AlignmentSampler(table)
    batch = sampler.draw(4, 9, np.random.default_rng(0))
    assert batch is not None
    assert len(batch.ita.label) == len(batch.tia.label) == 4
    assert len(batch.index) == len(batch.group) == min(9, len(sampler))
    # The pairs' anchors are among the listings of the contrastive loss.
    assert set(batch.ita.image_of.tolist()) | set(batch.tia.text_of.tolist()) <= set(batch.index.tolist())
    everything = sampler.draw(10**6, 2, np.random.default_rng(0))
    assert everything is not None and len(everything.index) == len(everything.ita.label) == len(sampler)


def test_photos_titles_and_tastes_are_learnt_before_the_first_order(shards: str, tmp_path: Path) -> None:
    chosen = options(shards, tmp_path, choice_passes=100)
    trainer = Trainer(open_corpus(chosen), chosen, no_progress)
    untouched = {
        name: p.clone() for name, p in trainer.model.named_parameters() if name.startswith(("cvr_tower", "pair_tokens"))
    }
    rows = concat_rows([trainer.corpus.reader.read(path) for path, _ in trainer.corpus.files("train")])
    batch = collate(rows, trainer.corpus.table)

    def choice_loss() -> float:
        trainer.model.eval()
        with torch.no_grad():
            return float(torch.nn.functional.softplus(-trainer.model.choose(batch)).mean())

    phases = []
    trainer.progress = lambda phase, done, total, note: phases.append((phase, done, total))
    before = choice_loss()
    trainer._begin()
    assert choice_loss() < 0.95 * before
    assert list(dict.fromkeys(phase for phase, _, _ in phases)) == ["align", "preferences", "counts", "wide"]
    assert all(
        max(d for p, d, _ in phases if p == name) == phases_total(phases, name)
        for name in ("align", "preferences", "counts", "wide")
    )
    # The network has not been trained on orders yet: weights that only orders change are as before.
    # The linear part was fitted, and stays fixed.
    assert all(torch.equal(dict(trainer.model.named_parameters())[name], p) for name, p in untouched.items())
    assert trainer.state.step == 0


def phases_total(phases: list[tuple[str, int, int]], name: str) -> int:
    (total,) = {total for phase, _, total in phases if phase == name}
    return total


def test_a_loss_that_is_not_finite_stops_alignment(shards: str, tmp_path: Path) -> None:
    chosen = options(shards, tmp_path)
    trainer = Trainer(open_corpus(chosen), chosen, no_progress)
    with torch.no_grad():
        trainer.model.contrastive.log_scale.fill_(torch.nan)
    with pytest.raises(InputError, match="not finite .alignment, step 0.*--learning_rate"):
        trainer.run()


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


@pytest.mark.parametrize(("rows", "size"), [(0, 128), (102_399, 128), (102_400, 256), (409_600, 1_024), (9**9, 1_024)])
def test_steps_are_as_large_as_the_log_bears(
    shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int, size: int
) -> None:
    corpus = open_corpus(options(shards, tmp_path))
    monkeypatch.setattr(corpus, "rows", lambda split: rows)
    assert corpus.batch_size(TrainOptions(shards=shards, out="")) == size
    assert corpus.batch_size(options(shards, tmp_path)) == 32


def test_larger_steps_learn_faster_and_average_as_many_examples() -> None:
    given = OptimizerConfig(learning_rate=1e-3, ema_decay=0.99)
    assert given.of_batch(128) == given.of_batch(32) == given
    larger = given.of_batch(512)
    assert larger.learning_rate == pytest.approx(2e-3)
    assert larger.ema_decay == pytest.approx(0.99**4)
