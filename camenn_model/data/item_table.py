"""All items, ready to be gathered.

Codes are in memory, embeddings mapped. The table serves training, validation and scoring.

Shapes: N items of the table, I items of a batch, T text tokens, P patches, G history items.
"""

from collections.abc import Sequence
from typing import cast

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from camenn_model.batch import HistoryItems, ItemBatch
from camenn_model.config import ITEM_HASH, SUBCATEGORY, ModelConfig
from camenn_model.content.agreement import FOLDS, Agreement, Judgement
from camenn_model.content.price_against_similar import Likeness, alike_prices
from camenn_model.data.contents import Contents, Means
from camenn_model.data.feature_space import CatalogFeatures, FeatureSpace
from camenn_model.data.field_encoders import to_float
from camenn_model.data.range_contents import RangeContents, Read
from camenn_model.hashing import stable_hash

HELD_OUT_SHARE = 0.1
"""Share of products whose listings never enter an alignment loss: the representation is measured on them."""

MOST_FITTED = 8_192
"""Listings that `Likeness` and `Agreement` are fitted on"""

Ints = NDArray[np.int64]


class ItemTable:
    """The `items` table with its contents.

    `encode` adds its columns encoded by a feature space.

    Args:
        items: table under the contract `ITEMS`.
        images, titles: embeddings, mapped or read by ranges. Their keys are the items' image_key and title_key.
        keep: keep the mean features of all photos and titles in memory, and the columns after they
            are encoded. Scoring needs few of them.
        config: of the model that will read them, which gives the shape of contents where there are
            none. Contents that it learned nothing of are not read. None for a model that does not
            exist yet.
    """

    cats: Ints
    values: NDArray[np.float32]
    buckets: Ints
    history_cats: Ints
    subcategory: Ints

    def __init__(
        self,
        items: pa.Table,
        images: Contents,
        titles: Contents,
        keep: bool = True,
        config: ModelConfig | None = None,
    ) -> None:
        self.items, self.keep = items, keep
        self.pooled = config is not None and config.pooled
        if config is not None:
            images = images if config.reads_images else Contents.none("image_key")
            titles = titles if config.reads_titles else Contents.none("title_key")
            images.expect((config.patches, config.image_width))
            titles.expect((config.text_tokens, config.text_width))
        self.ids: pa.Array = items["item_id"].combine_chunks()
        self.images, self.titles = images, titles
        self.image_row = images.rows_of(items["image_key"])
        self.title_row = titles.rows_of(items["title_key"])
        self.tokens = np.nan_to_num(to_float(items["title_tokens"])).astype(np.int64)
        used = np.ones(len(titles), dtype=np.int64)
        used[self.title_row[self.title_row >= 0]] = self.tokens[self.title_row >= 0]
        means = Means(images), Means(titles, used)
        # Means that are not kept are computed by rows, with an array's interface.
        self.pooled_images, self.pooled_titles = (
            each.kept() if keep else cast("NDArray[np.float16]", each) for each in means
        )
        # Listings of one product, or with the same photo or title, must not serve as each other's mismatch.
        product = stable_hash(items["product_key"])
        null = items["product_key"].is_null().to_numpy()
        self.product = np.where(null, stable_hash(items["item_id"]), product)
        self.held_out = (self.product >> np.uint64(7)) % np.uint64(1000) < np.uint64(1000 * HELD_OUT_SHARE)
        self.fold = ((self.product >> np.uint64(23)) % np.uint64(FOLDS)).astype(np.int64)

    @classmethod
    def of_files(
        cls, items: pa.Table, images: Sequence[str], titles: Sequence[str], config: ModelConfig
    ) -> "ItemTable":
        """Open the contents files for scoring.

        Scoring reads each content once or twice, so nothing of the files stays in memory.
        """
        return cls(
            items,
            Contents(list(images), "image_key", wanted=items["image_key"], keep=False),
            Contents(list(titles), "title_key", wanted=items["title_key"], keep=False),
            keep=False,
            config=config,
        )

    @classmethod
    def of_ranges(
        cls,
        items: pa.Table,
        images: Sequence[tuple[str, int]],
        titles: Sequence[tuple[str, int]],
        *,
        read: Read,
        config: ModelConfig,
    ) -> "ItemTable":
        """Open contents files that lie elsewhere, for scoring.

        They are (path, bytes). Only the rows of batches are read, by `read`.
        """
        return cls(
            items,
            RangeContents(images, "image_key", read, wanted=items["image_key"]),
            RangeContents(titles, "title_key", read, wanted=items["title_key"]),
            keep=False,
            config=config,
        )

    def encode(self, space: FeatureSpace, catalog_features: CatalogFeatures | None = None) -> "ItemTable":
        """Encode the columns and return the table itself.

        `catalog_features`: those of this space, where they are computed already.
        """
        catalog_features = (
            self.compute_catalog_features(space.likeness, space.agreement)
            if catalog_features is None
            else catalog_features
        )
        self.cats, self.values, self.buckets = space.encode_items(self.items, catalog_features)
        names = [field.name for field in space.fields if field.group == "item"]
        self.history_cats = self.cats[:, [names.index(ITEM_HASH), names.index(SUBCATEGORY)]]
        self.subcategory = self.cats[:, names.index(SUBCATEGORY)]
        if not self.keep:
            del self.items
        return self

    def compute_catalog_features(self, likeness: Likeness, agreement: Agreement) -> CatalogFeatures:
        """Compute each listing's features from all listings.

        They come from photos and titles.
        """
        return CatalogFeatures(self.alike_prices(likeness), self.judge(agreement).agreement)

    def fit_agreement(self) -> Agreement:
        """Fit an agreement on some training listings.

        They have both photo and title.
        """
        rows = self._fitted()
        images, titles = self.pooled_images[self.image_row[rows]], self.pooled_titles[self.title_row[rows]]
        return Agreement.fit(images, titles, self.product[rows], self.fold[rows])

    def judge(self, agreement: Agreement) -> Judgement:
        """Judge the agreement of each listing's photo and title.

        It measures how well the two belong together, [N] each.
        """
        return agreement.judge(self.pooled_images, self.pooled_titles, self.image_row, self.title_row, self.fold)

    def fit_likeness(self) -> Likeness:
        """Fit a likeness on the same listings."""
        rows = self._fitted()
        return Likeness.fit(self.pooled_images[self.image_row[rows]], self.pooled_titles[self.title_row[rows]])

    def _fitted(self) -> Ints:
        """Return rows of training listings with photo and title.

        They are ordered by their hashes. Where there are many, those with the smallest hashes are
        taken.
        """
        rows = np.flatnonzero(self.with_content() & ~self.held_out)
        return rows[np.argsort(stable_hash(self.ids)[rows])[:MOST_FITTED]]

    def alike_prices(self, likeness: Likeness) -> NDArray[np.float32]:
        """Compare each price with those of the most similar listings.

        The result is float32 [N]; NaN = unknown.
        """
        vectors = likeness.vectors(self.pooled_images, self.pooled_titles, self.image_row, self.title_row)
        group = self.items[SUBCATEGORY].combine_chunks().dictionary_encode(null_encoding="encode").indices.to_numpy()
        return alike_prices(vectors, to_float(self.items["price"]), group.astype(np.int64), stable_hash(self.ids))

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, rows: Ints, *, content_only: bool = False) -> ItemBatch:
        """Gather an ItemBatch of table rows, int64 [I].

        With `content_only`, fields are left empty (the alignment tasks never read them). Otherwise,
        and where the model pools them, title and photo are one token each: their means.
        """
        image_row, title_row = self.image_row[rows], self.title_row[rows]
        tokens = np.where(title_row >= 0, self.tokens[rows], 0)
        if self.pooled and not content_only:
            text = _rows_or_zero(self.pooled_titles, title_row)[:, None]
            patches = _rows_or_zero(self.pooled_images, image_row)[:, None]
        else:
            text, patches = self.titles.gather(title_row), self.images.gather(image_row)
        cats, values, buckets = (
            array[rows, :0] if content_only else array[rows] for array in (self.cats, self.values, self.buckets)
        )
        return ItemBatch(
            text=torch.from_numpy(text),
            text_mask=torch.from_numpy(np.arange(text.shape[1])[None, :] < tokens[:, None]),
            has_text=torch.from_numpy(title_row >= 0),
            patches=torch.from_numpy(patches),
            has_image=torch.from_numpy(image_row >= 0),
            cats=torch.from_numpy(cats),
            values=torch.from_numpy(values),
            buckets=torch.from_numpy(buckets),
        )

    def history(self, rows: Ints) -> HistoryItems:
        """Gather HistoryItems of table rows, int64 [G]."""
        image_row, title_row = self.image_row[rows], self.title_row[rows]
        image = _rows_or_zero(self.pooled_images, image_row)
        text = _rows_or_zero(self.pooled_titles, title_row)
        return HistoryItems(
            image=torch.from_numpy(image),
            text=torch.from_numpy(text),
            has_image=torch.from_numpy(image_row >= 0),
            has_text=torch.from_numpy(title_row >= 0),
            cats=torch.from_numpy(self.history_cats[rows]),
        )

    def with_content(self) -> NDArray[np.bool_]:
        """Mark items with a photo and a title, bool [N]."""
        return (self.image_row >= 0) & (self.title_row >= 0)


def _rows_or_zero(table: NDArray[np.float16], rows: Ints) -> NDArray[np.float16]:
    out = np.zeros((len(rows), table.shape[1]), dtype=np.float16)
    some = rows >= 0
    out[some] = table[rows[some]]
    return out
