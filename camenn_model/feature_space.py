"""From raw columns to what the model reads: vocabularies, hashed ids, quantile buckets and normalised values.

Fitted once on the training part; written as `features.json`, `likeness.safetensors` and `agreement.safetensors`; the same object serves training, scoring and every service.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from camenn_model.agreement import Agreement
from camenn_model.config import CATEGORY, ITEM_HASH, SUBCATEGORY, USER_HASH, FieldSpec
from camenn_model.hashing import stable_hash
from camenn_model.likeness import Likeness
from schemas.contract import InputError
from schemas.training import AUDIENCE_COUNTS, ITEM_COUNTS, ITEM_NUMBERS, ITEM_QUALITY, PAIR_COUNTS

PRICE_ALIKE = "price_alike"
"""What a listing costs against those that look and read most like it: no column of the items, as a model tells what is alike (`likeness.py`)"""
AGREEMENT = "agreement"
"""Log-odds that photo and title belong together (`agreement.py`): no column of the items either"""
FILE = "features.json"
VERSION = 3
"""Raised when the same columns would be encoded otherwise: a model reads what it was trained on."""
NUMERIC_GROUPS = {
    "item_numeric": (*(column.name for column in ITEM_NUMBERS), PRICE_ALIKE),
    "item_quality": (*(column.name for column in ITEM_QUALITY), AGREEMENT),
    "audience_counts": tuple(column.name for column in AUDIENCE_COUNTS),
    "item_counts": tuple(column.name for column in ITEM_COUNTS),
    "pair_counts": tuple(column.name for column in PAIR_COUNTS),
}
MISSING, RARE = 0, 1
QUANTILE_BUCKETS = 16
MAX_VOCABULARY = 4_096
MIN_ID_CLICKS = 5
"""Clicks in training under which an id shares the bucket of rare ones: less cannot be told from noise."""
ID_TABLE = 65_536


@dataclass(frozen=True)
class Vocabulary:
    """Values of a categorical column; 0 = null or unknown, else 1 + place in `values`."""

    values: tuple[str, ...]

    @property
    def size(self) -> int:
        """Rows of the embedding table."""
        return max(2, 1 + len(self.values))

    @classmethod
    def fit(cls, column: pa.ChunkedArray | pa.Array) -> "Vocabulary":
        """The most frequent values, at most 4,096, ordered by name; of values as frequent, the first by name."""
        counts = column.to_pandas().value_counts().sort_index().sort_values(ascending=False, kind="stable")
        return cls(tuple(sorted(str(value) for value in counts.index[:MAX_VOCABULARY])))

    def encode(self, column: pa.ChunkedArray | pa.Array) -> NDArray[np.int64]:
        """Codes, int64 [n]."""
        found = pc.index_in(column.cast(pa.string()), value_set=pa.array(self.values, pa.string()))
        codes = pc.add(pc.fill_null(found, -1), 1)
        codes = codes.to_numpy(zero_copy_only=False) if isinstance(codes, pa.Array) else codes.to_numpy()
        # index_in finds a null value only if the vocabulary holds one, and it never does.
        return codes.astype(np.int64)


@dataclass(frozen=True)
class HashedIds:
    """Frequent ids, by their hashes, in a bounded table; 0 = dropped out, 1 = rare."""

    frequent: tuple[int, ...]
    table: int

    @property
    def size(self) -> int:
        """Rows of the embedding table."""
        return self.table + 2

    @classmethod
    def fit(cls, column: pa.ChunkedArray | pa.Array) -> "HashedIds":
        """Ids with at least `MIN_ID_CLICKS` rows in the training part; the table has two slots for each, at most 65,536."""
        hashes, counts = np.unique(stable_hash(column), return_counts=True)
        frequent = hashes[counts >= MIN_ID_CLICKS]
        return cls(tuple(int(value) for value in frequent), int(min(ID_TABLE, max(2, 2 * len(frequent)))))

    def encode(self, column: pa.ChunkedArray | pa.Array) -> NDArray[np.int64]:
        """Codes, int64 [n]; a null id is 0."""
        hashes = stable_hash(column)
        frequent = np.isin(hashes, np.asarray(self.frequent, dtype=np.uint64))
        codes = np.where(frequent, 2 + (hashes % np.uint64(self.table)).astype(np.int64), RARE)
        return np.where(np.asarray(pc.is_null(column)), MISSING, codes)


@dataclass(frozen=True)
class Numeric:
    """Bucket boundaries, normaliser and range of a numeric column; NaN is bucket 0. A common value has a bucket of its own, quantiles part the others.

    A value beyond the range that training has seen counts as its end: what a slope would say out there nobody has observed, and some columns leave the range as
    the log goes on, as a listing's age does.
    """

    boundaries: tuple[float, ...]
    log: bool
    mean: float
    std: float
    lowest: float
    highest: float

    @property
    def size(self) -> int:
        """Number of buckets, the one for missing values included."""
        return len(self.boundaries) + 2

    @classmethod
    def fit(cls, values: NDArray[np.float32]) -> "Numeric":
        """At most 16 common values, and 16 quantiles of the others; log1p where values are non-negative and spread over more than a factor."""
        finite = values[np.isfinite(values)].astype(np.float64)
        if not len(finite):
            return cls((), False, 0.0, 1.0, 0.0, 0.0)
        distinct, counts = np.unique(finite, return_counts=True)
        # Most counts are 0 most of the time: a value that alone fills buckets gets one of its own, and the others share the rest.
        common = distinct[counts > len(finite) / QUANTILE_BUCKETS]
        rest = finite[~np.isin(finite, common)]
        quantiles = (
            np.quantile(rest, np.linspace(0, 1, QUANTILE_BUCKETS + 1)[1:], method="lower") if len(rest) else rest
        )
        below = distinct[np.maximum(np.searchsorted(distinct, common) - 1, 0)]
        boundaries = tuple(float(b) for b in np.unique(np.concatenate([quantiles, common, below]))[:-1])
        lowest, highest = float(distinct[0]), float(distinct[-1])
        log = lowest >= 0 and highest > 5
        shown = np.log1p(finite) if log else finite
        return cls(boundaries, log, float(shown.mean()), float(max(shown.std(), 1e-6)), lowest, highest)

    def encode(self, values: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """(normalised values float32 [n], clipped to ±5, 0 where missing; buckets int64 [n])."""
        missing = ~np.isfinite(values)
        safe = np.clip(np.where(missing, self.lowest, values).astype(np.float64), self.lowest, self.highest)
        shown = np.log1p(safe) if self.log else safe
        normalised = np.clip((shown - self.mean) / self.std, -5, 5)
        buckets = np.searchsorted(np.asarray(self.boundaries), safe, side="left") + 1
        return np.where(missing, 0, normalised).astype(np.float32), np.where(missing, MISSING, buckets).astype(np.int64)


class Told(NamedTuple):
    """What is told of each listing by all of them, float32 [N] each; NaN = unknown."""

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
        """The model's fields."""
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
        cls, items: pa.Table, users: pa.Table, examples: pa.Table, likeness: Likeness, agreement: Agreement, told: Told
    ) -> "FeatureSpace":
        """Fit on the items and what is told of them, the users and the training part's examples (a sample of whole files is enough)."""
        user_fields = tuple(f"user_{name}" for name in users.column_names if name != "user_id")
        vocabularies = {name: Vocabulary.fit(items[name]) for name in (CATEGORY, SUBCATEGORY, "brand")}
        vocabularies["store"] = Vocabulary.fit(examples["store_id"])
        vocabularies["hour"] = Vocabulary(tuple(str(hour) for hour in range(24)))
        vocabularies["weekday"] = Vocabulary(tuple(str(day) for day in range(7)))
        for name in user_fields:
            vocabularies[name] = Vocabulary.fit(users[name.removeprefix("user_")])
        numbers = {
            name: Numeric.fit(getattr(told, name) if name in Told._fields else to_float(items[name]))
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
        self, items: pa.Table, told: Told
    ) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.int64]]:
        """(cats [N, n], values [N, m], buckets [N, m]) of an `items` table.

        Ids that are rare in training were mostly offered all along and hardly wanted. One that is offered since has no part in that: it looks like an id
        that was dropped out.
        """
        cats = [self.vocabularies[name].encode(items[name]) for name in (CATEGORY, SUBCATEGORY, "brand")]
        new = pc.fill_null(pc.greater(items["listed_at"].cast(pa.int64()), self.trained_until), False)
        cats.append(np.where(np.asarray(new), MISSING, self.ids[ITEM_HASH].encode(items["item_id"])))
        values, buckets = self.encode_numbers(
            ("item_numeric", "item_quality"),
            {name: to_float(items[name]) for name in items.column_names if name in self.numbers} | told._asdict(),
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
        """cats [S, n]; `fields` holds the users' columns under their own names, one row per audience row."""
        cats = [
            self.ids[USER_HASH].encode(user_id),
            self.vocabularies["store"].encode(store_id),
            hour.astype(np.int64) + 1,
            weekday.astype(np.int64) + 1,
        ]
        # Hours and weekdays are ordered by name in their vocabularies, as strings are; their codes are the number + 1 instead.
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
        """(values [..., m] float32, buckets [..., m] int64) of the groups' columns, in the model's order."""
        encoded = [self.numbers[name].encode(columns[name]) for group in groups for name in NUMERIC_GROUPS[group]]
        return np.stack([value for value, _ in encoded], axis=-1), np.stack([bucket for _, bucket in encoded], axis=-1)

    def write(self, directory: Path) -> None:
        """The whole space as `features.json`, `likeness.safetensors` and `agreement.safetensors`."""
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
        """The space that `write` wrote.

        Raises:
            InputError: another version of camenn wrote it.
        """
        likeness, agreement = Likeness.read(directory), Agreement.read(directory)
        raw = json.loads((directory / FILE).read_text())
        if raw.get("version") != VERSION:
            raise InputError(
                f"{directory / FILE}: another version of camenn trained this model, and encoded its features in another way. Run `camenn train` again."
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


def to_float(column: pa.ChunkedArray | pa.Array) -> NDArray[np.float32]:
    """float32 [n], null as NaN."""
    return pd.to_numeric(column.to_pandas()).to_numpy(dtype=np.float32, na_value=np.nan)
