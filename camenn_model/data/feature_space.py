"""Feature space: encoders of raw columns for the model.

It consists of vocabularies, hashed ids, quantile buckets and normalisers.

It is fitted once on the training part, and written as `features.json`, `likeness.safetensors` and
`agreement.safetensors`. The same object serves training, scoring and every service.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from camenn_model.config import CATEGORY, ITEM_HASH, SUBCATEGORY, USER_HASH, FieldSpec
from camenn_model.content.agreement import Agreement
from camenn_model.content.price_against_similar import Likeness
from camenn_model.data.field_encoders import MISSING, HashedIds, Numeric, Vocabulary, to_float
from schemas.errors import InputError
from schemas.training import AUDIENCE_COUNTS, ITEM_COUNTS, ITEM_NUMBERS, ITEM_QUALITY, PAIR_COUNTS

PRICE_ALIKE = "price_alike"
"""A listing's price against those of the most similar listings. It is no column of the items, as
similarity is part of the model (`price_against_similar.py`)
"""
AGREEMENT = "agreement"
"""Log-odds that photo and title belong together (`agreement.py`): no column of the items either"""
FILE = "features.json"
VERSION = 3
"""Raised by one whenever the same columns would be encoded differently: a model must read the
encoding that it was trained on."""
NUMERIC_GROUPS = {
    "item_numeric": (*(column.name for column in ITEM_NUMBERS), PRICE_ALIKE),
    "item_quality": (*(column.name for column in ITEM_QUALITY), AGREEMENT),
    "audience_counts": tuple(column.name for column in AUDIENCE_COUNTS),
    "item_counts": tuple(column.name for column in ITEM_COUNTS),
    "pair_counts": tuple(column.name for column in PAIR_COUNTS),
}


class CatalogFeatures(NamedTuple):
    """Features of each listing computed from all listings.

    They are float32 [N] each; NaN = unknown.
    """

    price_alike: NDArray[np.float32]
    agreement: NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class FeatureSpace:
    """Every field's encoding, in the order of the model's config."""

    vocabularies: dict[str, Vocabulary]
    ids: dict[str, HashedIds]
    numbers: dict[str, Numeric]
    user_fields: tuple[str, ...]
    trained_until: int
    """The latest session's start in the training part, microseconds UTC"""
    likeness: Likeness
    agreement: Agreement

    @property
    def fields(self) -> tuple[FieldSpec, ...]:
        """Return the model's fields."""
        item = [
            FieldSpec(name=name, group="item", kind="categorical", size=self.vocabularies[name].size)
            for name in (CATEGORY, SUBCATEGORY, "brand")
        ]
        item.append(FieldSpec(name=ITEM_HASH, group="item", kind="categorical", size=self.ids[ITEM_HASH].size))
        audience = [FieldSpec(name=USER_HASH, group="audience", kind="categorical", size=self.ids[USER_HASH].size)]
        for name in ("store", "hour", "weekday", *self.user_fields):
            audience.append(
                FieldSpec(name=name, group="audience", kind="categorical", size=self.vocabularies[name].size)
            )
        numbers = [
            FieldSpec(name=name, group=group, kind="numeric", size=self.numbers[name].size)
            for group, names in NUMERIC_GROUPS.items()
            for name in names
        ]
        return (*item, *audience, *numbers)

    @classmethod
    def fit(
        cls,
        items: pa.Table,
        users: pa.Table,
        examples: pa.Table,
        likeness: Likeness,
        agreement: Agreement,
        catalog_features: CatalogFeatures,
    ) -> "FeatureSpace":
        """Fit on items, users and training examples.

        Items come with their catalog features. The examples are the training part's, of which a
        sample of whole files is enough.
        """
        user_fields = tuple(f"user_{name}" for name in users.column_names if name != "user_id")
        vocabularies = {name: Vocabulary.fit(items[name]) for name in (CATEGORY, SUBCATEGORY, "brand")}
        vocabularies["store"] = Vocabulary.fit(examples["store_id"])
        vocabularies["hour"] = Vocabulary(tuple(str(hour) for hour in range(24)))
        vocabularies["weekday"] = Vocabulary(tuple(str(day) for day in range(7)))
        for name in user_fields:
            vocabularies[name] = Vocabulary.fit(users[name.removeprefix("user_")])
        numbers = {
            name: Numeric.fit(
                getattr(catalog_features, name) if name in CatalogFeatures._fields else to_float(items[name])
            )
            for group in ("item_numeric", "item_quality")
            for name in NUMERIC_GROUPS[group]
        }
        for group in ("audience_counts", "item_counts", "pair_counts"):
            numbers |= {name: Numeric.fit(to_float(examples[name])) for name in NUMERIC_GROUPS[group]}
        ids = {ITEM_HASH: HashedIds.fit(examples["item_id"]), USER_HASH: HashedIds.fit(examples["user_id"])}
        return cls(
            vocabularies=vocabularies,
            ids=ids,
            numbers=numbers,
            user_fields=user_fields,
            trained_until=int(pc.max(examples["session_start"]).cast(pa.int64()).as_py()),
            likeness=likeness,
            agreement=agreement,
        )

    def encode_items(
        self, items: pa.Table, catalog_features: CatalogFeatures
    ) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.int64]]:
        """Encode an `items` table.

        Returns (cats [N, n], values [N, m], buckets [N, m]).

        Ids that are rare in training mostly belong to listings that were always offered and hardly
        clicked. This does not hold for a listing offered since training: it gets the code of a
        dropped-out id.
        """
        cats = [self.vocabularies[name].encode(items[name]) for name in (CATEGORY, SUBCATEGORY, "brand")]
        new = pc.fill_null(pc.greater(items["listed_at"].cast(pa.int64()), self.trained_until), False)
        cats.append(np.where(np.asarray(new), MISSING, self.ids[ITEM_HASH].encode(items["item_id"])))
        values, buckets = self.encode_numbers(
            ("item_numeric", "item_quality"),
            {name: to_float(items[name]) for name in items.column_names if name in self.numbers}
            | catalog_features._asdict(),
        )
        return np.stack(cats, axis=1), values, buckets

    def encode_audience(
        self,
        user_id: pa.Array | pa.ChunkedArray,
        store_id: pa.Array | pa.ChunkedArray,
        hour: NDArray[Any],
        weekday: NDArray[Any],
        fields: pa.Table,
    ) -> NDArray[np.int64]:
        """Encode the categorical columns of audience rows.

        Returns cats [S, n]. `fields` holds the users' columns under their own names, one row per
        audience row.
        """
        cats = [
            self.ids[USER_HASH].encode(user_id),
            self.vocabularies["store"].encode(store_id),
            hour.astype(np.int64) + 1,
            weekday.astype(np.int64) + 1,
        ]
        # Vocabularies are ordered as strings, which would misorder hours and weekdays. Their codes
        # are the number + 1 instead.
        for name in self.user_fields:
            column = name.removeprefix("user_")
            cats.append(
                self.vocabularies[name].encode(fields[column])
                if column in fields.column_names
                else np.zeros(len(hour), dtype=np.int64)
            )
        return np.stack(cats, axis=1)

    def encode_numbers(
        self, groups: tuple[str, ...], columns: dict[str, NDArray[np.float32]]
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Encode the groups' columns, in the model's order.

        Returns (values [..., m] float32, buckets [..., m] int64).
        """
        encoded = [self.numbers[name].encode(columns[name]) for group in groups for name in NUMERIC_GROUPS[group]]
        return np.stack([value for value, _ in encoded], axis=-1), np.stack([bucket for _, bucket in encoded], axis=-1)

    def write(self, directory: Path) -> None:
        """Write the whole space.

        Its files are `features.json`, `likeness.safetensors` and `agreement.safetensors`.
        """
        text = json.dumps(
            {
                "version": VERSION,
                "vocabularies": {name: vocabulary.values for name, vocabulary in self.vocabularies.items()},
                "ids": {name: {"frequent": ids.frequent, "table": ids.table} for name, ids in self.ids.items()},
                "numbers": {name: vars(number) for name, number in self.numbers.items()},
                "user_fields": self.user_fields,
                "trained_until": self.trained_until,
            }
        )
        (directory / FILE).write_text(text)
        self.likeness.write(directory)
        self.agreement.write(directory)

    @classmethod
    def read(cls, directory: Path) -> "FeatureSpace":
        """Read the space that `write` wrote.

        Raises:
            InputError: another version of camenn wrote it.
        """
        likeness, agreement = Likeness.read(directory), Agreement.read(directory)
        raw = json.loads((directory / FILE).read_text())
        if raw.get("version") != VERSION:
            raise InputError(
                f"{directory / FILE}: another version of camenn trained this model, and encoded "
                "its features in another way. Run `camenn train` again."
            )
        return cls(
            vocabularies={name: Vocabulary(tuple(values)) for name, values in raw["vocabularies"].items()},
            ids={name: HashedIds(tuple(value["frequent"]), value["table"]) for name, value in raw["ids"].items()},
            numbers={
                name: Numeric(**(number | {"boundaries": tuple(number["boundaries"])}))
                for name, number in raw["numbers"].items()
            },
            user_fields=tuple(raw["user_fields"]),
            trained_until=raw["trained_until"],
            likeness=likeness,
            agreement=agreement,
        )
