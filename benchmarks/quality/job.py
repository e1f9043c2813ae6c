"""One model on one log, in its own process.

    python -m benchmarks.quality.job JOB

JOB is a JSON job. The command writes RESULT.json.
"""

import json
import os
import re
import shutil
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from benchmarks.quality import representation
from benchmarks.quality.judge import Prior, judge
from benchmarks.quality.variants import VARIANTS, make_trainer
from benchmarks.quality.worlds import World, read_keys, read_truth
from benchmarks.support.command import progress_log
from camenn_model.data.alignment_sampler import AlignmentSampler
from camenn_model.data.batching import collate, concat_rows
from camenn_model.data.examples import Rows
from camenn_model.data.item_table import ItemTable
from camenn_model.data.shard_set import ShardSet
from camenn_model.evaluation.predictions import CALIBRATED_ON, Predictions, calibrate, predict
from camenn_model.evaluation.representation import align_pairs
from camenn_model.model.camenn import CameNN
from camenn_model.model.experts import GateOutput
from camenn_model.training.corpus import Corpus, TrainOptions, open_corpus
from camenn_model.training.optimizer import OptimizerConfig
from camenn_model.training.train import popularity
from pipelines.io.files import write_json
from schemas.errors import InputError

log = progress_log("quality")

TUNED = ("lightgbm", "lightgbm_content", "mmoe")
BASELINES = (*TUNED, "lightgbm_plain")
POPULARITY = "popularity"
FROZEN = "frozen"
"""No model of clicks: maps between the frozen encoders' features, for representation"""
GATE_SAMPLE = 2_048
OF = "-latest_"
"""Between the name of a log and its part that is learned from"""
NEW = (("part", 1), ("tuned_on", 1.0))
"""Fields of a job, with the values that `asked` leaves out"""
VERSION = 2
"""Raised by one whenever a change alters all figures: of the city, of shards, of the baselines or
of the figures' computation. Results of an earlier version are not reused."""
MODEL_VERSION = 7
"""The same for a change that alters CameNN's figures alone: of the model or its training."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One model on one log.

    `model` is a variant, a baseline, `popularity` or `frozen`. `results` is the directory of
    RESULT.json, or '' for the world's own.

    A baseline is tuned on seed 0. Other seeds use the settings found there.
    """

    world: World
    results: str = ""
    model: str
    seed: int
    epochs: int = 1
    trials: int = 30
    learning_rate: float = 1e-3
    threads: int = 1
    part: int = 1
    """The latest 1/part of the training examples is learned from"""
    tuned_on: float = 1.0
    """Latest share of the training examples that a baseline's trials are fitted on"""

    @property
    def log(self) -> str:
        """Return the name of the log, or of its part, that the model learns from."""
        return self.world.name if self.part == 1 else f"{self.world.name}{OF}{self.part}th"

    @property
    def name(self) -> str:
        """Return the name of the job's files."""
        return f"{self.log}-{self.model}-{self.seed}"

    def result(self) -> Path:
        """Return the path of the result, which is written last."""
        return self._result_of(self.name)

    def _result_of(self, name: str) -> Path:
        return (Path(self.results) if self.results else Path(self.world.work) / "results") / f"{name}.json"

    @property
    def scratch(self) -> Path:
        """Return the directory of a killed job's work.

        It holds the job's partial work.
        """
        return Path(self.world.work) / "jobs" / self.name

    def open_scratch(self) -> Path:
        """Return `scratch`, emptied unless it is this very job's."""
        asked = self.scratch / "asked.json"
        if not asked.exists() or json.loads(asked.read_text()) != self.asked():
            shutil.rmtree(self.scratch, ignore_errors=True)
            self.scratch.mkdir(parents=True)
            write_json(str(asked), self.asked())
        return self.scratch

    @property
    def tuned_by(self) -> str | None:
        """Return the name of the job that tunes this baseline.

        It is None where this very job tunes, or nothing is tuned. A part of a log is learned with
        the whole log's settings.
        """
        if self.model not in BASELINES or (self.seed == 0 and self.part == 1):
            return None
        return f"{re.sub(r'[0-9]+$', '0', self.world.name)}-{self.model}-0"

    def settings(self) -> dict[str, Any] | None:
        """Return the tuned settings of a baseline of another seed.

        They are None where this very job tunes.

        Raises:
            InputError: seed 0 has not been tuned.
        """
        if self.tuned_by is None:
            return None
        path = self._result_of(self.tuned_by)
        found = json.loads(path.read_text()) if path.exists() else {"asked": {"version": None}}
        if found["asked"]["version"] != VERSION:
            raise InputError(f"{self.name}: {path} is not there, or of another version. Let seed 0 be tuned first.")
        settings: dict[str, Any] = found["settings"]
        return settings

    def asked(self) -> dict[str, Any]:
        """Return everything that the result depends on."""
        given = {name: value for name, value in asdict(self).items() if name not in ("threads", "results")}
        # Results from before these were there are of their defaults.
        given = {name: value for name, value in given.items() if (name, value) not in NEW}
        encoders = {name: Path(getattr(self.world, name)).name for name in ("image_weights", "text_encoder")}
        of_world = {name: getattr(self.world, name) for name in ("name", "preset", "city", "flags")}
        return given | encoders | {"world": of_world, "version": MODEL_VERSION if self.model in VARIANTS else VERSION}

    def done(self) -> bool:
        """Return whether the result of this very job exists."""
        return self.result().exists() and json.loads(self.result().read_text())["asked"] == self.asked()

    @classmethod
    def from_json(cls, text: str) -> "Job":
        """Read the job that `json.dumps(asdict(job))` wrote."""
        raw = json.loads(text)
        return cls(**(raw | {"world": World(**raw["world"])}))


def _prior(files: list[tuple[str, int]], table: ItemTable) -> Prior:
    names = ["item_clicks", "pair_clicks", "pair_orders"]
    known = pa.concat_tables([pq.ParquetFile(path).read(columns=[*names, "item_id"]) for path, _ in files])
    places = pc.index_in(known["item_id"], value_set=table.ids).to_numpy()
    of_listing, of_pair, orders_of_pair = (known[name].to_numpy().astype(np.float64) for name in names)
    return Prior(of_listing, of_pair, orders_of_pair, has_photo=table.image_row[places] >= 0)


def held_out(world: World, corpus: Corpus) -> tuple[NDArray[np.int64], NDArray[np.int64], representation.Held]:
    """Return the training listings and the held-out ones.

    Returns (training listings with photo and title, their classes, the held-out ones). A class is
    the truth's, or the product where there is none.
    """
    table = corpus.table
    rows = np.flatnonzero(table.with_content())
    train, held = rows[~table.held_out[rows]], rows[table.held_out[rows]]
    if world.truth is None:
        _, classes = np.unique(table.product, return_inverse=True)
        return train, classes[train], representation.Held(held, classes[held], None, None)
    listings = (
        pq.read_table(world.truth / "listings.parquet").to_pandas().set_index("item_id").loc[table.ids.to_pylist()]
    )
    classes = listings["class_id"].to_numpy()
    corrupted = ((listings["image_corruption"] != "clean") | (listings["text_corruption"] != "clean")).to_numpy()
    mismatched = listings["mismatched"].to_numpy(dtype=bool)
    return train, classes[train], representation.Held(held, classes[held], mismatched[held], corrupted[held])


def _dense(gate: GateOutput, experts: int) -> NDArray[np.float64]:
    """Return the weight of each expert, [n, experts].

    All experts have a weight, chosen or not.
    """
    return torch.zeros(len(gate.chosen), experts).scatter(1, gate.chosen, gate.weights).double().numpy()


@torch.inference_mode()
def gate_use(model: CameNN, corpus: Corpus, seed: int) -> dict[str, dict[str, Any]]:
    """Return the use of experts by each task.

    `gates` has the mean weight of each expert in the gate of each task that uses experts, on some
    test examples and some alignment pairs. `gates_apart` is that function's result, if it is defined.
    """
    experts, table = model.config.experts, corpus.table
    rows = concat_rows([corpus.reader.read(path) for path, _ in corpus.files("test")])
    shuffled = np.random.default_rng([seed, 23]).permutation(len(rows))
    chosen = collate(rows.take(np.sort(shuffled[:GATE_SAMPLE])), table)
    weights = {"cvr": _dense(model(chosen).gate, experts)} if model.config.cvr_layers else {}
    sampler = AlignmentSampler(table)
    batch = sampler.draw(512, 512, np.random.default_rng([seed, 29])) if len(sampler) >= 2 else None
    if batch is not None:
        output = model.align(batch)
        weights |= {"ita": _dense(output.ita_gate, experts), "tia": _dense(output.tia_gate, experts)}
    found: dict[str, dict[str, Any]] = {"gates": {task: each.mean(axis=0).tolist() for task, each in weights.items()}}
    if not model.config.cvr_layers:
        return found
    apart = gates_apart(model, table, rows.take(shuffled), np.random.default_rng([seed, 31]))
    return found | ({"gates_apart": apart} if apart else {})


def gates_apart(model: CameNN, table: ItemTable, rows: Rows, rng: np.random.Generator) -> dict[str, float] | None:
    """Return the difference of tasks' weights on the same listings.

    Means over listings do not show this: the balance of experts equalizes those for each task.

    The figures are means over listings of the total variation between CVR's and ITA's, ITA's and
    TIA's, and CVR's of two users (a reference that is independent of the task). They are None where
    no listing is shown to two users. `rows` are examples in random order, of which a listing's
    first and last are taken.
    """
    rows = rows.take(np.flatnonzero(table.with_content()[rows.item]))
    _, first = np.unique(rows.item, return_index=True)
    _, last = np.unique(rows.item[::-1], return_index=True)
    last = len(rows) - 1 - last
    of_two = rng.permutation(np.flatnonzero(rows.user[first] != rows.user[last]))[:GATE_SAMPLE]
    if not len(of_two):
        return None
    one, other = rows.take(first[of_two]), rows.take(last[of_two])
    aligned = align_pairs(model, table, one.item, one.item)
    cvr, of_other, ita, tia = (
        _dense(gate, model.config.experts)
        for gate in (
            model(collate(one, table)).gate,
            model(collate(other, table)).gate,
            aligned.ita_gate,
            aligned.tia_gate,
        )
    )
    pairs = {"cvr_ita": (cvr, ita), "ita_tia": (ita, tia), "cvr_users": (cvr, of_other)}
    return {
        "listings": len(one),
        **{name: float(np.abs(a - b).sum(axis=1).mean() / 2) for name, (a, b) in pairs.items()},
    }


def run_camenn(job: Job, corpus: Corpus) -> tuple[dict[str, Predictions], dict[str, Any]]:
    """Train CameNN and return its predictions.

    Returns (predictions of the parts that it is calibrated on and of test, further figures).
    """
    variant = VARIANTS[job.model]
    options = TrainOptions(
        shards=job.world.shards,
        out=str(job.open_scratch()),
        epochs=job.epochs,
        seed=job.seed,
        optimizer=OptimizerConfig(learning_rate=job.learning_rate, ema_decay=0.99),
    )
    options = replace(options, **variant.options)
    trainer, test = make_trainer(corpus, variant, options, job.world)
    started, reported_at = time.monotonic(), 0.0

    def progress(phase: str, done: int, total: int, note: str) -> None:
        nonlocal reported_at
        if time.monotonic() - reported_at > 60:
            reported_at = time.monotonic()
            log(f"{job.name}: {phase} {done:,} of {total:,}, {note}")

    trainer.progress = progress
    trainer.run()
    found = {
        split: predict(trainer.model, corpus_of.reader, corpus_of.table, corpus_of.blocks(split))
        for split, corpus_of in (
            *((split, replace(test, table=trainer.corpus.table)) for split in CALIBRATED_ON),
            ("test", test),
        )
    }
    state = trainer.state
    more: dict[str, Any] = {
        "train": {
            "seconds": round(time.monotonic() - started, 1),
            "examples": state.examples,
            "best_step": state.best_step,
            "steps": state.step,
            "early_stop_log_loss": state.best_loss,
        },
        **gate_use(trainer.model, test, job.seed),
    }
    if not variant.displayed and not variant.hides:
        train, classes, held = held_out(job.world, corpus)
        if len(held.rows) >= 10:
            more["representation"] = representation.of_model(
                trainer.model, corpus.table, train, classes, held, job.seed
            )
            more["listing_quality"] = representation.of_listing_quality(
                corpus.table, trainer.corpus.space.agreement, held
            )
    return found, more


def run_baseline(job: Job, corpus: Corpus) -> tuple[dict[str, Predictions], dict[str, Any]]:
    """Train a baseline and return its predictions.

    Returns the same as `run_camenn`.
    """
    from benchmarks.quality.baselines import Inputs, tune

    config = corpus.config
    inputs = Inputs.read(corpus.shards, corpus.space, corpus.table, config.history_length, config.position_size)
    if job.model not in (*BASELINES, POPULARITY):
        raise InputError(f"no model '{job.model}'; one of {', '.join([*VARIANTS, *BASELINES, POPULARITY, FROZEN])}")
    if job.model == POPULARITY:
        raw = {split: popularity(corpus, split) for split in (*CALIBRATED_ON, "test")}
        more: dict[str, Any] = {}
    else:
        raw, more = tune(
            job.model,
            inputs,
            job.trials,
            job.seed,
            job.threads,
            job.open_scratch() / "trials.json",
            lambda text: log(f"{job.name}: {text}"),
            job.settings(),
            job.tuned_on,
        )
    found = {}
    for split, logits in raw.items():
        rows = inputs.rows[split]
        _, user = np.unique(rows.user, return_inverse=True)
        found[split] = Predictions(logits, inputs.labels(split), user.astype(np.int64), rows.session)
    return found, more


@dataclass(frozen=True)
class _LatestPart(ShardSet):
    """A shard set of which only the latest training files are seen."""

    part: int = 1

    def examples(self, split: str) -> list[tuple[str, int]]:
        """List (path, rows) of a split."""
        every = super().examples(split)
        if split != "train":
            return every
        rows = np.cumsum([count for _, count in every[::-1]])
        return every[len(every) - int(np.searchsorted(rows, rows[-1] / self.part)) - 1 :]


def latest_part(job: Job) -> ShardSet | None:
    """Return the job's part of its log, None for all."""
    return None if job.part == 1 else _LatestPart(job.world.shards, part=job.part)


def run(job: Job) -> dict[str, Any]:
    """Train, evaluate, and write and return the result."""
    started = time.monotonic()
    torch.set_num_threads(job.threads)
    corpus = open_corpus(TrainOptions(shards=job.world.shards, out=""), latest_part(job))
    result = {"asked": job.asked(), "model": job.model, "world": job.log, "seed": job.seed}
    path = job.result()
    path.parent.mkdir(parents=True, exist_ok=True)
    if job.model == FROZEN:
        train, classes, held = held_out(job.world, corpus)
        result["representation"] = representation.of_frozen(corpus.table, train, classes, held, job.seed)
    else:
        found, more = run_camenn(job, corpus) if job.model in VARIANTS else run_baseline(job, corpus)
        files = corpus.files("test")
        truth = read_truth(job.world, read_keys(files)) if job.world.truth is not None else None
        prior = _prior(files, corpus.table)
        result |= judge(found["test"], calibrate(found), corpus.config.base_rate, truth, prior) | more
    result["seconds"] = round(time.monotonic() - started, 1)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=1, allow_nan=False))
    os.replace(temporary, path)
    shutil.rmtree(job.scratch, ignore_errors=True)
    return result


def main(argv: list[str] | None = None) -> int:
    """Run the job of the first argument."""
    job = Job.from_json((sys.argv[1:] if argv is None else argv)[0])
    result = run(job)
    auc = f"AUC {result['test']['auc']:.4f}, " if "test" in result else ""
    log(f"{job.name}: {auc}{result['seconds']:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
