"""The differences between the models that are compared.

Each variant is one change, of the corpus, of the configuration or of the sampled pairs.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from benchmarks.quality.worlds import World
from camenn_model.config import ITEM_HASH, LossConfig
from camenn_model.content.agreement import Agreement
from camenn_model.data.examples import ExampleReader, Rows, pack_history
from camenn_model.data.feature_space import NUMERIC_GROUPS, FeatureSpace
from camenn_model.data.field_encoders import MISSING, Numeric
from camenn_model.data.item_table import Ints, ItemTable
from camenn_model.training.corpus import Corpus, TrainOptions
from camenn_model.training.trainer import Trainer
from schemas.training import ITEM_QUALITY
from simulator.config import TEXT_FACTORS, VISUAL_FACTORS

IMAGE_QUALITY, TEXT_QUALITY = ("blur", "luminance", "megapixels"), ("title_tokens", "unknown_share")
assert {*IMAGE_QUALITY, *TEXT_QUALITY} == {column.name for column in ITEM_QUALITY}


def hide(table: ItemTable, space: FeatureSpace, *, images: bool = False, titles: bool = False) -> ItemTable:
    """Return the items without photos or titles.

    Their quality measures are removed as well.
    """
    hidden = copy.copy(table)
    if images:
        hidden.image_row = np.full_like(table.image_row, -1)
    if titles:
        hidden.title_row = np.full_like(table.title_row, -1)
    hidden.encode(space)
    names = [*NUMERIC_GROUPS["item_numeric"], *NUMERIC_GROUPS["item_quality"]]
    for hides, quality in ((images, IMAGE_QUALITY), (titles, TEXT_QUALITY)):
        if hides:
            columns = [names.index(name) for name in quality]
            hidden.values[:, columns], hidden.buckets[:, columns] = 0, 0
    return hidden


def hide_ids(table: ItemTable, space: FeatureSpace) -> ItemTable:
    """Return the items without their hashed ids."""
    hidden = copy.copy(table)
    place = [field.name for field in space.fields if field.group == "item"].index(ITEM_HASH)
    hidden.cats, hidden.history_cats = table.cats.copy(), table.history_cats.copy()
    hidden.cats[:, place], hidden.history_cats[:, 0] = MISSING, MISSING
    return hidden


def without_agreement(corpus: Corpus) -> Corpus:
    """Return the corpus without knowledge of agreement.

    The agreement of photos and titles is unknown in it.
    """
    agreement = replace(Agreement.none(), penalty=corpus.space.agreement.penalty)
    space = replace(corpus.space, agreement=agreement)
    return replace(corpus, space=space, table=copy.copy(corpus.table).encode(space))


def shuffle_images(table: ItemTable, space: FeatureSpace, seed: int) -> ItemTable:
    """Return the items with each other's photos."""
    shuffled = copy.copy(table)
    has = np.flatnonzero(table.image_row >= 0)
    shuffled.image_row = table.image_row.copy()
    shuffled.image_row[has] = table.image_row[np.random.default_rng([seed, 11]).permutation(has)]
    return shuffled.encode(space)


def with_shuffled_images(corpus: Corpus, seed: int) -> Corpus:
    """Return the corpus with items' photos shuffled.

    Its items have each other's photos.
    """
    return replace(corpus, table=shuffle_images(corpus.table, corpus.space, seed))


class _Arrays:
    """Vectors instead of mapped embeddings.

    There is one vector for each row.
    """

    def __init__(self, values: NDArray[np.float32]) -> None:
        self.values = values.astype(np.float16)[:, None, :]
        self.shape = self.values.shape[1:]

    def __len__(self) -> int:
        return len(self.values)

    def gather(self, rows: Ints) -> NDArray[np.float16]:
        """Return float16 [n, 1, width] of rows.

        There are zeros for a row of -1.
        """
        return np.where((rows >= 0)[:, None, None], self.values[rows], np.float16(0))


def displayed_attributes(corpus: Corpus, world: World) -> Corpus:
    """Return the corpus with the truth of displayed content.

    The truth of the displayed content replaces the embeddings of photos and titles, and their
    agreement.

    A photo has: whether it is correct and clear, its visual factors if so, and the vector z of the
    class that it shows. A title has the same with its attributes.
    """
    assert world.truth is not None
    listings = pq.read_table(world.truth / "listings.parquet").to_pandas().set_index("item_id")
    listings = listings.loc[corpus.table.ids.to_pylist()]
    photos = pq.read_table(world.truth / "photos.parquet").to_pandas().set_index("image_uri")
    shown = (
        pq.read_table(world.data / "catalog.parquet", columns=["item_id", "image_uri"]).to_pandas().set_index("item_id")
    )
    shown = photos.loc[shown.loc[listings.index, "image_uri"]]
    classes = pq.read_table(world.truth / "classes.parquet")
    z = np.stack(classes["z"].to_numpy(zero_copy_only=False))[np.argsort(classes["class_id"].to_numpy())]
    clear = (listings["image_corruption"].to_numpy() == "clean")[:, None]
    visual = shown[[f"{name}_v" for name in VISUAL_FACTORS]].to_numpy() * clear
    images = np.concatenate([clear, visual, z[shown["class_id"].to_numpy()]], axis=1)
    said = (listings["text_corruption"].to_numpy() == "clean")[:, None]
    noun = listings["text_class_id"].to_numpy(dtype=np.float64)
    titles = np.concatenate(
        [
            said,
            listings[list(TEXT_FACTORS)].to_numpy() * said,
            np.where(np.isnan(noun)[:, None], 0, z[np.nan_to_num(noun).astype(int)]),
        ],
        axis=1,
    )
    table = copy.copy(corpus.table)
    # They stand in for Contents.
    table.images, table.titles = _Arrays(images), _Arrays(titles)  # type: ignore[assignment]
    table.image_row = table.title_row = np.arange(len(table))
    table.tokens = np.ones(len(table), dtype=np.int64)
    table.pooled_images, table.pooled_titles = images.astype(np.float16), titles.astype(np.float16)
    likeness, agreement = table.fit_likeness(), table.fit_agreement()
    catalog_features = table.compute_catalog_features(likeness, agreement)
    numbers = corpus.space.numbers | {name: Numeric.fit(values) for name, values in catalog_features._asdict().items()}
    space = replace(corpus.space, likeness=likeness, agreement=agreement, numbers=numbers)
    table.encode(space, catalog_features)
    config = replace(
        corpus.config,
        fields=space.fields,
        image_width=images.shape[1],
        text_width=titles.shape[1],
        patch_grid=1,
        text_tokens=1,
    )
    return replace(corpus, space=space, table=table, config=config)


class _ChangedReader(ExampleReader):
    """A reader that changes the rows that it has read."""

    def __init__(self, reader: ExampleReader, change: Callable[[Rows], Rows]) -> None:
        vars(self).update(vars(reader))
        self.change = change

    def encode(self, examples: pa.Table) -> Rows:
        """Encode a table and change the rows.

        The table is under the contract `EXAMPLES`.
        """
        return self.change(super().encode(examples))


def _forget(rows: Rows) -> Rows:
    nothing = pack_history(
        np.zeros(0, np.int64), np.zeros(0, np.int8), np.zeros(0, np.float32), np.zeros(len(rows.history), np.int64), 1
    )
    return replace(rows, history=nothing)


def _without_user(rows: Rows) -> Rows:
    # The user's hashed id is the first field of the audience (FeatureSpace.encode_audience).
    cats = rows.audience_cats.copy()
    cats[:, 0] = MISSING
    return replace(rows, audience_cats=cats)


def _permute(rows: Rows) -> Rows:
    return replace(rows, label=np.random.default_rng(len(rows)).permutation(rows.label))


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One model.

    Fields that are not named are as in `full`.
    """

    about: str
    options: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    hides: tuple[str, ...] = ()
    """Change of images, titles"""
    hides_ids: bool = False
    hides_agreement: bool = False
    reader: Callable[[Rows], Rows] | None = None
    """Change of the examples, in training and in the test part"""
    train_reader: Callable[[Rows], Rows] | None = None
    """The same, in training and early stop only"""
    displayed: bool = False
    gate_mask: bool = False
    silences: tuple[str, ...] = ()
    """Linear maps of the model that stay 0"""
    shuffled_alignment: bool = False
    """True where alignment is trained on other listings' photos"""
    shuffled_images: bool = False
    """True where the test part has other listings' photos"""


def _loss(**values: Any) -> dict[str, Any]:
    return {"loss": LossConfig(**values)}


LAYERS = {"cvr_layers": True}
"""What all variants of the mixture have"""

VARIANTS: dict[str, Variant] = {
    "full": Variant(about="CameNN"),
    "no_alignment": Variant(
        about="CVR alone: neither ITA nor TIA nor the contrastive loss, nor how well photo and title agree",
        options={"alignment": False},
    ),
    "no_content": Variant(
        about="no photos, no titles, nothing measured of them", options={"alignment": False}, hides=("images", "titles")
    ),
    "displayed": Variant(
        about="the truth of what is displayed, in the place of embeddings", options={"alignment": False}, displayed=True
    ),
    "no_ita": Variant(about="without image-to-text alignment", options=_loss(ita=0.0)),
    "no_tia": Variant(about="without text-to-image alignment", options=_loss(tia=0.0)),
    "no_contrastive": Variant(about="without the contrastive loss", options=_loss(contrastive=0.0)),
    "no_agreement": Variant(about="orders do not use the agreement of photo and title", hides_agreement=True),
    "no_choice": Variant(about="clicks train no preferences", options=_loss(choice=0.0)),
    "no_images": Variant(about="titles only", options={"alignment": False}, hides=("images",)),
    "no_text": Variant(about="photos only", options={"alignment": False}, hides=("titles",)),
    "dense_gate": Variant(about="with layers, every expert for every pair", config=LAYERS | {"top_k": 4}),
    "one_expert": Variant(about="with layers, one expert, no choice", config=LAYERS | {"experts": 1, "top_k": 1}),
    "no_ids": Variant(about="without hashed ids of listings and users", hides_ids=True, reader=_without_user),
    "no_history": Variant(about="without the user's history", reader=_forget),
    "direct_parts": Variant(
        about="the direct parts alone: linear part, counts, preferences",
        silences=("affinity.deep", "counts.found"),
    ),
    "layers": Variant(about="orders are also predicted with layers, experts and tower (`small`)", config=LAYERS),
    "no_target_attention": Variant(
        about="with layers, which read the latest entries; nothing reads the long history",
        config=LAYERS,
        silences=("target_attention.out", "counts.found"),
    ),
    "full_attention": Variant(
        about="with layers, all tokens attend to all", config=LAYERS, options={"attention": "full"}
    ),
    "gate_without_content": Variant(
        about="with layers, the CVR gate sees fields and history, not photo and title", config=LAYERS, gate_mask=True
    ),
    "permuted_labels": Variant(about="control: training labels permuted", train_reader=_permute),
    "shuffled_patches": Variant(about="control: at test, photos belong to other listings", shuffled_images=True),
    "shuffled_alignment": Variant(
        about="control: alignment is taught photos that belong to other listings",
        hides_agreement=True,
        shuffled_alignment=True,
    ),
}


def _silence(trainer: Trainer, names: tuple[str, ...]) -> None:
    """Keep linear maps at 0."""
    for name in names:
        part = trainer.model.get_submodule(name)
        for weight in part.parameters():
            torch.nn.init.zeros_(weight)
            weight.requires_grad_(False)


def _mask_gate(trainer: Trainer) -> None:
    """Hide `[TXT]` and the mean patch from the CVR gate.

    The columns of its weights for `[TXT]` and the mean of patches stay 0, their initial value.
    """
    width = trainer.model.config.width
    for layers in (trainer.model.cvr_gate.weights, trainer.model.cvr_gate.noise):
        of_items = layers[0]
        assert isinstance(of_items, torch.nn.Linear)
        weight = of_items.weight
        if weight.shape[1] != 3 * width or weight.abs().max() > 0:
            raise RuntimeError("the item side of the CVR gate is not [fields, TXT, patches] with weights of 0")
        shown = torch.zeros_like(weight)
        shown[:, :width] = 1
        weight.register_hook(lambda gradient, shown=shown: gradient * shown)


def make_trainer(corpus: Corpus, variant: Variant, options: TrainOptions, world: World) -> tuple[Trainer, Corpus]:
    """Return (a variant's trainer, the corpus of its test part).

    Frozen features are standardised before anything is hidden: a model requires some at
    construction.
    """
    if variant.displayed:
        corpus = displayed_attributes(corpus, world)
    elif not options.alignment or variant.hides_agreement:
        corpus = without_agreement(corpus)
    corpus = replace(corpus, config=replace(corpus.config, attention=options.attention, **variant.config))
    # Alignment learns from the assignment of photos to listings. In the control the photos are
    # shuffled for it, and for the initial projections. Orders and all measurements use each
    # listing's own photo.
    aligned = with_shuffled_images(corpus, options.seed) if variant.shuffled_alignment else corpus
    trainer = Trainer(aligned, options, lambda *_: None)
    if variant.hides:
        corpus = replace(corpus, table=hide(corpus.table, corpus.space, **dict.fromkeys(variant.hides, True)))
    if variant.hides_ids:
        corpus = replace(corpus, table=hide_ids(corpus.table, corpus.space))
    if variant.reader is not None:
        corpus = replace(corpus, reader=_ChangedReader(corpus.reader, variant.reader))
    trainer.corpus = corpus
    if variant.train_reader is not None:
        trainer.corpus = replace(corpus, reader=_ChangedReader(corpus.reader, variant.train_reader))
    if variant.gate_mask:
        _mask_gate(trainer)
    if variant.silences:
        _silence(trainer, variant.silences)
    test = with_shuffled_images(corpus, options.seed) if variant.shuffled_images else corpus
    return trainer, test
