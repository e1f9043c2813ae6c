"""The options of a training run, and its corpus.

The corpus is the encoded shard set that the run reads.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from camenn_model.config import DEFAULT_PROFILE, Attention, LossConfig, ModelConfig
from camenn_model.content.agreement import Agreement
from camenn_model.data.batching import list_units
from camenn_model.data.contents import Contents
from camenn_model.data.examples import ExampleReader, NumberRows, Rows, Unit, count_rows, read_examples
from camenn_model.data.feature_space import FeatureSpace
from camenn_model.data.item_table import ItemTable
from camenn_model.data.shard_set import BLOCK_ROWS, ShardSet
from camenn_model.training.optimizer import OptimizerConfig, choose_batch_size
from schemas.errors import InputError

Progress = Callable[[str, int, int, str], None]
"""(phase, examples done, examples in all, note): called after every step."""

FIT_ROWS = 1_000_000
"""Training examples that vocabularies and quantiles are fitted on: the latest whole blocks."""
LATEST_ROWS = 500_000
"""Training examples that the preference space and the linear part are fitted on: the latest whole blocks."""
COUNTED_ROWS = 2_000_000
"""Training examples that the count network is fitted on: the latest whole blocks."""


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """One training run, resolved."""

    shards: str
    out: str
    profile: str = DEFAULT_PROFILE
    attention: Attention = "prefix"
    epochs: int = 1
    batch_size: int = 0
    """Examples a step, over all processes. 0 = by the size of the log (`Corpus.batch_size`)"""
    micro_batches: int = 1
    """Pieces that a step's batch is cut into. The number of processes divides it."""
    by_store: bool = False
    """True where a batch draws from few stores, and so holds fewer distinct listings"""
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(learning_rate=1e-3, ema_decay=0.99))
    evaluations: int = 4
    patience: int = 4
    seed: int = 0
    device: str = "cpu"
    precision: str = "fp32"
    loss: LossConfig = field(default_factory=LossConfig)
    alignment: bool = True
    alignment_passes: int = 8
    """Epochs over the listings in the steps of alignment alone, before the clicks.

    The steps with clicks use each listing at most as often again. 0 = never.
    """
    choice_passes: int = 4
    """Epochs over the clicks in the steps that learn preferences from clicks.

    They come before orders are predicted. 0 = no such steps.
    """
    checkpoint_seconds: float = 60.0
    workers: int = 1
    """Threads that gather batches"""

    def request(self) -> dict[str, Any]:
        """Return the options that the result depends on.

        It does not depend on the interval of checkpoints, nor on the number of gathering threads.
        """
        return {name: value for name, value in asdict(self).items() if name not in ("workers", "checkpoint_seconds")}


@dataclass
class Corpus:
    """The encoded shard set that training reads."""

    shards: ShardSet
    space: FeatureSpace
    table: ItemTable
    reader: ExampleReader
    config: ModelConfig

    def files(self, split: str) -> list[tuple[str, int]]:
        """List (path, rows) of a split."""
        return self.shards.examples(split)

    def blocks(self, split: str) -> list[Unit]:
        """List a split's large pieces, in order of time."""
        return list_units(self.files(split), BLOCK_ROWS)

    def rows(self, split: str) -> int:
        """Count the examples of a split."""
        return sum(rows for _, rows in self.files(split))

    def batch_size(self, options: TrainOptions) -> int:
        """Return the examples of a step."""
        return options.batch_size or choose_batch_size(self.rows("train"))

    def latest(self, split: str) -> Iterator[Rows]:
        """Yield whole blocks of a split, the latest first.

        They hold up to `LATEST_ROWS` examples.
        """
        return map(self.reader.read_unit, _latest_blocks(self.blocks(split), LATEST_ROWS))

    def latest_numbers(self, split: str) -> Iterator[NumberRows]:
        """Yield the numbers of whole blocks of a split.

        They are the latest, up to `COUNTED_ROWS` examples.
        """
        return map(self.reader.read_numbers, _latest_blocks(self.blocks(split), COUNTED_ROWS))


def open_corpus(options: TrainOptions, shards: ShardSet | None = None) -> Corpus:
    """Open a shard set for training.

    It also fits the feature space on the set's training part, and sizes the model. `shards`: the
    set, where it is not on this machine.

    Raises:
        InputError: a part is empty, labels are of one class only, or no listing has a photo or a
            title. A log without one of them is learned without it, and nothing is aligned.
    """
    shards = shards or ShardSet(options.shards)
    for split in ("train", "early_stop", "calibration", "test"):
        if not shards.examples(split):
            raise InputError(
                f"--shards {options.shards}: part '{split}' is empty: the log is too short to be split by time "
                "with a gap of the attribution window. "
                "Give a longer log, or a smaller --test_share or --attribution_hours to `camenn shards`."
            )
    blocks = list_units(shards.examples("train"), BLOCK_ROWS)
    examples = pa.concat_tables([read_examples(block) for block in _latest_blocks(blocks, FIT_ROWS)])
    base_rate = float(np.mean(examples["label"].to_numpy()))
    for split in ("early_stop", "calibration", "test"):
        labels = np.concatenate(
            [pq.ParquetFile(path).read(columns=["label"])["label"].to_numpy() for path, _ in shards.examples(split)]
        )
        _check_classes(options.shards, split, float(labels.mean()))
    _check_classes(options.shards, "train", base_rate)
    if not len(shards.images) and not len(shards.titles):
        raise InputError(
            f"--shards {options.shards}: no listing has a photo or a title that could be encoded: "
            "CameNN needs one of them. See the store's `defects`."
        )
    # Files may hold contents of listings that are gone: a model that saw none must not read any later.
    images = shards.images if len(shards.images) else Contents.none("image_key")
    titles = shards.titles if len(shards.titles) else Contents.none("title_key")
    table = ItemTable(shards.items, images, titles)
    likeness = table.fit_likeness()
    agreement = table.fit_agreement() if options.alignment else Agreement.none()
    catalog_features = table.compute_catalog_features(likeness, agreement)
    space = FeatureSpace.fit(shards.items, shards.users, examples, likeness, agreement, catalog_features)
    table.encode(space, catalog_features)
    patches, image_width = images.shape
    tokens, text_width = titles.shape
    config = ModelConfig.profile(
        options.profile,
        fields=space.fields,
        text_width=text_width,
        image_width=image_width,
        base_rate=base_rate,
        history_length=int(shards.manifest["options"]["history"]),
        text_tokens=tokens,
        patch_grid=math.isqrt(patches),
        attention=options.attention,
    )
    reader = ExampleReader(space, table, shards.users, config.history_length, config.position_size)
    return Corpus(shards, space, table, reader, config)


def _latest_blocks(blocks: list[Unit], most: int) -> Iterator[Unit]:
    """Yield the last blocks, the last one first.

    It stops when they hold `most` rows or there are no more.
    """
    count = 0
    for block in reversed(blocks):
        yield block
        count += count_rows([block])
        if count >= most:
            return


def _check_classes(root: str, split: str, rate: float) -> None:
    if rate in (0.0, 1.0):
        found = "no click was followed by an order" if rate == 0.0 else "every click was followed by an order"
        raise InputError(
            f"--shards {root}: part '{split}' has one class only ({found}): there is nothing to learn. "
            "Check that orders carry the same user_id and item_id as clicks, and that --attribution_hours fits."
        )
