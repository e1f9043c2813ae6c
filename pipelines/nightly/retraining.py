"""Decide whether tonight is a night to train.

Two criteria decide: the days that the logs have grown since the last training, and the published
model's drift.
"""

import datetime
from dataclasses import dataclass

from camenn_model.integrity import DamagedError
from pipelines.io import files
from pipelines.nightly.config import NightlyConfig
from pipelines.runs.copies import open_shards, package_directory
from pipelines.runs.manifest import Manifest, read_latest, read_run
from schemas.errors import InputError
from schemas.manifest import MANIFEST, RUNS

AS_OF = "shards_as_of"
"""Key of a training's summary: the time up to which its shards had read the logs"""
ONCE_A_DAY = 0.9
"""Least days of new log since the last training before drift starts another."""
SLACK = 0.1
"""Tolerance in days: a log that ends at a slightly earlier time of day than a week ago counts as a week later."""


@dataclass(frozen=True)
class Decision:
    """A decision whether to train.

    It gives the reason in words for the log.
    """

    due: bool
    words: str


def decide(config: NightlyConfig) -> Decision:
    """Decide whether to train tonight.

    The inputs are the published model, the trainings since, and tonight's shard set.
    """
    shards, model = read_latest(config.output("shards")), read_latest(config.output("model"))
    if shards is None:
        raise RuntimeError("shards must be built before training")
    if model is None:
        return Decision(True, "there is no model yet")
    from camenn_model.evaluation.challenge import judge_calibration, reads_embeddings_of
    from camenn_model.package import read_package

    try:
        directory = package_directory(files.join(config.output("model"), RUNS, model.run))
    except DamagedError as error:
        return Decision(True, f"the published model cannot be read ({error})")
    # A store that does not answer, or a full disk, is no reason to train.
    try:
        package = read_package(directory)
    except InputError as error:
        # For example after an upgrade that encodes features differently: without this no night
        # could score until a manual training.
        return Decision(True, f"the published model cannot be read ({error})")
    last = last_training(config.output("model"), model)
    if AS_OF not in last.summary:
        return Decision(True, "the published model does not record which days it was trained on")
    if last.inputs["shards"] == shards.request:
        return Decision(False, "the shards are those of the last training")
    shard_set = open_shards(config.output("shards"))
    if not reads_embeddings_of(package, shard_set):
        return Decision(True, "the store's embeddings are of other encoders than the model's")
    days = days_between(last.summary[AS_OF], shards.summary["as_of"])
    every = config.retrain.every_days
    age = f"the logs have grown by {days:.1f} days since the last training"
    if every and days >= every - SLACK:
        return Decision(True, f"{age} (every {every:g})")
    plan = f"{age} (every {every:g})" if every else f"{age} (no schedule)"
    if not config.retrain.on_drift:
        return Decision(False, plan)
    calibration = judge_calibration(package, shard_set)
    if calibration is None:
        return Decision(False, f"{plan}; calibration cannot be computed: the test part has no closed day")
    if calibration.orders_are_missing:
        return Decision(False, f"{calibration.words()}: a log that lacks its orders is not trained on")
    if calibration.off_by() > config.retrain.drift:
        words = f"{calibration.words()}, further from 1 than {config.retrain.drift:g} beyond chance"
        if days >= ONCE_A_DAY:
            return Decision(True, words)
        return Decision(False, f"{words}, but {age}: once a day is enough")
    return Decision(False, f"{plan}; {calibration.words()}")


def last_training(root: str, published: Manifest) -> Manifest:
    """Find the training that ended last.

    It was published or gated: one that lost against the published model is not repeated every
    night.
    """
    newest = published
    for found in files.match(files.join(root, "runs"), f"*/{MANIFEST}"):
        other = read_run(root, found.path.split("/")[-2])
        if other.summary.get(AS_OF, "") > newest.summary.get(AS_OF, ""):
            newest = other
    return newest


def days_between(before: str, after: str) -> float:
    """Compute the days from one log moment to another.

    Both are ISO text. The result is negative where the log was set back.
    """
    early, late = (datetime.datetime.fromisoformat(text) for text in (before, after))
    return (late - early).total_seconds() / 86_400
