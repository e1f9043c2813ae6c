"""The model's fields, sizes and loss weights.

They are plain data, read and written as JSON. Nothing here imports torch, so a pipeline can read a
model's config without loading a model.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["categorical", "numeric"]
Attention = Literal["prefix", "full"]
Weighting = Literal["fixed", "uncertainty"]
Tokens = Literal["pooled", "all"]

BATCH_SIZES = (128, 256, 512, 1_024)
"""Examples of a step, of which training chooses by the size of the log"""
NO_CONTENTS = (1, 1)
"""Tokens and width of the photos, or titles, of a log without any"""
ITEM_HASH = "item_hash"
"""Name of the field in group ``item`` that holds the hashed item id (id dropout applies; shared with the history)."""
CATEGORY = "category"
"""Name of the field in group ``item`` that ``Wide`` crosses with every field of the audience."""
SUBCATEGORY = "subcategory"
"""Name of the field in group ``item`` that history items carry as well, in the same vocabulary."""
USER_HASH = "user_hash"
"""Name of the field in group ``audience`` that holds the hashed user id (id dropout applies)."""
STORE = "store"
"""Name of the field in group ``audience`` that holds the store. Clicks are compared with other
items of the same store."""

GROUP_KINDS: dict[str, Kind] = {
    "item": "categorical",
    "item_numeric": "numeric",
    "item_quality": "numeric",
    "audience": "categorical",
    "audience_counts": "numeric",
    "item_counts": "numeric",
    "pair_counts": "numeric",
}
"""Field groups and the kind of field each one takes.

``item``: static fields of the listing, one token each. ``item_numeric``, ``item_quality``: one
token for each group, the sum over its fields. ``audience``: user, store, hour, weekday, one token
each. ``audience_counts``: one summed token. ``item_counts``, ``pair_counts``: as-of counts on the
pair's side, one summed token each.
"""


@dataclass(frozen=True, kw_only=True)
class FieldSpec:
    """One input column.

    ``size``: for a categorical field the vocabulary's size with index 0 = unknown or missing. For a
    numeric field the number of quantile buckets with bucket 0 = missing (real values use 1 ..
    size-1).
    """

    name: str
    group: str
    kind: Kind
    size: int

    def __post_init__(self) -> None:
        if self.group not in GROUP_KINDS:
            raise ValueError(f"field {self.name!r}: unknown group {self.group!r}; one of {sorted(GROUP_KINDS)}")
        if self.kind != GROUP_KINDS[self.group]:
            raise ValueError(
                f"field {self.name!r}: group {self.group!r} takes {GROUP_KINDS[self.group]} fields, not {self.kind}"
            )
        if self.size < 2:
            raise ValueError(f"field {self.name!r}: size {self.size}; index 0 and one more are the least")


@dataclass(frozen=True, kw_only=True)
class _ProfileSizes:
    """One row of the table of profiles in ``docs/explanation/model.md``."""

    width: int
    heads: int
    ffn: int
    shared_layers: int
    experts: int
    top_k: int
    text_tokens: int
    patch_grid: int
    cvr_tokens: Tokens
    cvr_layers: bool = True


_SMALL = _ProfileSizes(
    width=64,
    heads=4,
    ffn=256,
    shared_layers=1,
    experts=4,
    top_k=2,
    text_tokens=16,
    patch_grid=4,
    cvr_tokens="pooled",
)
PROFILES: dict[str, _ProfileSizes] = {
    "fast": dataclasses.replace(_SMALL, cvr_layers=False),
    "small": _SMALL,
    "base": _ProfileSizes(
        width=256,
        heads=8,
        ffn=1024,
        shared_layers=2,
        experts=8,
        top_k=2,
        text_tokens=32,
        patch_grid=8,
        cvr_tokens="pooled",
    ),
}


DEFAULT_PROFILE = "fast"
"""The one that predicts as well as any at the least CPU time (docs/decisions/0045)"""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Every size and rate that CameNN is built from.

    ``dataclasses.replace`` changes single ones.

    ``fields`` fixes the column order of every tensor in ``batch.py``: the fields of a group, in
    their order here. ``text_width`` and ``image_width`` are the frozen encoders' widths,
    ``patch_grid`` the side of the patch grid, ``position_size`` the rows of the display position's
    table (0 = unknown), ``base_rate`` the share of training clicks with an order (the CVR head
    starts at its logit). Rates of dropout are probabilities of dropping.

    ``cvr_tokens``: with ``pooled`` a listing's title, photo and fields, the audience's fields and
    the pair have one token each in the CVR task. With ``all`` each title token, each patch, each
    field and each group of the pair's counts has one. The alignment tasks always see all.

    ``dropout`` and ``attention_dropout`` are those of the phases before orders are learned, which see
    photos, titles and clicks several times; orders are learned with ``order_dropout``.

    ``history_length``: entries of a history, which target attention reads. The layers read the
    latest ``history_tokens`` of them.

    ``cvr_layers``: whether orders are predicted with the shared layers, the experts and the tower.
    Without them ``[CVR]`` (both sides, the pair's counts and target attention) is all that is added
    to the direct parts. The alignment tasks always use them.
    """

    profile_name: str
    fields: tuple[FieldSpec, ...]
    width: int
    heads: int
    ffn: int
    shared_layers: int
    experts: int
    top_k: int
    text_tokens: int
    text_width: int
    patch_grid: int
    image_width: int
    history_length: int
    position_size: int
    base_rate: float
    attention: Attention = "prefix"
    cvr_tokens: Tokens = "all"
    history_tokens: int = 64
    cvr_layers: bool = True
    dropout: float = 0.1
    attention_dropout: float = 0.1
    order_dropout: float = 0.0
    id_dropout: float = 0.1
    modality_dropout: float = 0.1
    position_dropout: float = 0.5

    def __post_init__(self) -> None:
        names = [field.name for field in self.fields]
        if len(set(names)) != len(names):
            raise ValueError(f"fields: names must be unique, got {sorted(names)}")
        for group, name in (("item", ITEM_HASH), ("item", SUBCATEGORY), ("audience", USER_HASH)):
            if name not in {field.name for field in self.group(group)}:
                raise ValueError(f"fields: group {group!r} must hold a field {name!r}")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if not 1 <= self.top_k <= self.experts:
            raise ValueError(f"top_k {self.top_k} must lie in 1 .. experts ({self.experts})")
        if self.shared_layers < 1:
            raise ValueError(f"shared_layers {self.shared_layers}: at least 1")
        if self.attention not in ("prefix", "full"):
            raise ValueError(f"attention {self.attention!r}: 'prefix' or 'full'")
        if self.cvr_tokens not in ("pooled", "all"):
            raise ValueError(f"cvr_tokens {self.cvr_tokens!r}: 'pooled' or 'all'")
        if not 0.0 < self.base_rate < 1.0:
            raise ValueError(f"base_rate {self.base_rate} must lie strictly between 0 and 1")
        for name in (
            "dropout",
            "attention_dropout",
            "order_dropout",
            "id_dropout",
            "modality_dropout",
            "position_dropout",
        ):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} {getattr(self, name)} must lie in [0, 1)")

    @classmethod
    def profile(
        cls,
        name: str,
        *,
        fields: tuple[FieldSpec, ...],
        text_width: int,
        image_width: int,
        base_rate: float,
        history_length: int = 100,
        position_size: int = 32,
        text_tokens: int | None = None,
        patch_grid: int | None = None,
        attention: Attention = "prefix",
    ) -> ModelConfig:
        """Make a config from a profile.

        ``text_tokens`` and ``patch_grid`` override the profile's.
        """
        if name not in PROFILES:
            raise ValueError(f"profile {name!r}: one of {sorted(PROFILES)}")
        sizes = dataclasses.asdict(PROFILES[name])
        if text_tokens is not None:
            sizes["text_tokens"] = text_tokens
        if patch_grid is not None:
            sizes["patch_grid"] = patch_grid
        return cls(
            profile_name=name,
            fields=fields,
            text_width=text_width,
            image_width=image_width,
            base_rate=base_rate,
            history_length=history_length,
            position_size=position_size,
            attention=attention,
            **sizes,
        )

    @property
    def pooled(self) -> bool:
        """Return whether the CVR task pools its tokens."""
        return self.cvr_tokens == "pooled"

    @property
    def reads_images(self) -> bool:
        """Return whether the log that it learned from had photos."""
        return (self.patches, self.image_width) != NO_CONTENTS

    @property
    def reads_titles(self) -> bool:
        """Return whether the log that it learned from had titles."""
        return (self.text_tokens, self.text_width) != NO_CONTENTS

    @property
    def patches(self) -> int:
        """Return P, the patches of one photo."""
        return self.patch_grid**2

    @property
    def item_hash_size(self) -> int:
        """Return the rows of the item id's hashed table."""
        return self._size(ITEM_HASH)

    @property
    def user_hash_size(self) -> int:
        """Return the rows of the user id's hashed table."""
        return self._size(USER_HASH)

    @property
    def item_categorical(self) -> tuple[FieldSpec, ...]:
        """Return the columns of ``ItemBatch.cats``."""
        return self.group("item")

    @property
    def item_numeric(self) -> tuple[FieldSpec, ...]:
        """Return the columns of ``ItemBatch.values`` and ``.buckets``.

        Group ``item_numeric`` comes first, then ``item_quality``.
        """
        return self.group("item_numeric") + self.group("item_quality")

    @property
    def audience_categorical(self) -> tuple[FieldSpec, ...]:
        """Return the columns of ``AudienceBatch.cats``."""
        return self.group("audience")

    @property
    def audience_numeric(self) -> tuple[FieldSpec, ...]:
        """Return the columns of ``AudienceBatch.values`` and ``.buckets``."""
        return self.group("audience_counts")

    @property
    def pair_numeric(self) -> tuple[FieldSpec, ...]:
        """Return the columns of ``PairBatch.values`` and ``.buckets``.

        Group ``item_counts`` comes first, then ``pair_counts``.
        """
        return self.group("item_counts") + self.group("pair_counts")

    def group(self, name: str) -> tuple[FieldSpec, ...]:
        """Return the fields of one group, in order."""
        return tuple(field for field in self.fields if field.group == name)

    def to_json(self) -> str:
        """Return the config as JSON text."""
        return json.dumps(dataclasses.asdict(self), indent=2, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> ModelConfig:
        """Read the config that ``to_json`` wrote.

        Raises:
            TypeError: an unknown or absent key, which it names.
        """
        raw: dict[str, Any] = json.loads(text)
        raw["fields"] = tuple(FieldSpec(**field) for field in raw["fields"])
        return cls(**raw)

    def _size(self, name: str) -> int:
        return next(field.size for field in self.fields if field.name == name)


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of the parts of the loss.

    See ``docs/explanation/model.md``, Loss and optimiser.

    ``alignment``: w of the mean of the ITA and TIA losses, which ``ita`` and ``tia`` multiply.
    ``contrastive``: w_c. They are used by ``fixed`` weighting only. ``uncertainty`` learns them.
    ``choice`` (of the clicked item; 0 = clicks train no preferences), ``balance`` and ``z`` are
    added unscaled under either.
    """

    weighting: Weighting = "fixed"
    alignment: float = 0.5
    ita: float = 1.0
    tia: float = 1.0
    contrastive: float = 0.1
    choice: float = 0.1
    balance: float = 0.01
    z: float = 0.001
    label_smoothing: float = 0.1

    def __post_init__(self) -> None:
        if self.weighting not in ("fixed", "uncertainty"):
            raise ValueError(f"weighting {self.weighting!r}: 'fixed' or 'uncertainty'")
        for name in ("alignment", "ita", "tia", "contrastive", "choice", "balance", "z"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} {getattr(self, name)} must not be negative")
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ValueError(f"label_smoothing {self.label_smoothing} must lie in [0, 1)")

    def to_json(self) -> str:
        """Return the config as JSON text."""
        return json.dumps(dataclasses.asdict(self), indent=2, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> LossConfig:
        """Read the config that ``to_json`` wrote."""
        return cls(**json.loads(text))
