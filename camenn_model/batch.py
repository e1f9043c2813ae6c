"""The contract between the loader and the model.

It specifies a batch tensor by tensor.

Shapes: I unique items, S unique audience rows (a session, or a row of the audience table), G unique
items that occur in histories, B pairs, A alignment pairs, C items of the contrastive loss, T text
tokens, P patches, H history, d_txt and d_img the frozen encoders' widths. "float" is float16,
bfloat16 or float32: the model casts it. Column orders come from ``ModelConfig``: its properties
``item_categorical``, ``item_numeric``, ``audience_categorical``, ``audience_numeric`` and
``pair_numeric``.

Numeric fields come twice: ``buckets`` (int64, 0 = missing, else 1 .. size-1) and ``values``
(float32, normalised to about mean 0, variance 1; ignored where the bucket is 0).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from camenn_model.config import ModelConfig


class _Tensors:
    """A base of dataclasses of tensors.

    It moves every tensor of a dataclass, and of the dataclasses inside it, to a device.
    """

    def to(self, device: torch.device | str) -> Self:
        """Return a copy with all tensors on ``device``.

        Those in pinned memory are copied beside the device's work.
        """
        return self._map(lambda part: part.to(device, non_blocking=True))

    def pin_memory(self) -> Self:
        """Return a copy in pinned memory, for a CUDA device."""
        return self._map(lambda part: part.pin_memory())

    def _map(self, change: Callable[[Tensor], Tensor]) -> Self:
        fields = dataclasses.fields(self)  # type: ignore[arg-type]  # its subclasses are dataclasses
        parts = {field.name: getattr(self, field.name) for field in fields}
        changed = {
            name: part._map(change) if isinstance(part, _Tensors) else change(part) for name, part in parts.items()
        }
        return type(self)(**changed)


@dataclass(frozen=True, kw_only=True)
class ItemBatch(_Tensors):
    """I unique items.

    Tokens and patches of an absent modality may hold anything finite: they are masked. A listing
    without photo has ``has_image`` False, one without title ``has_text`` False and ``text_mask``
    all False.
    """

    text: Tensor  # [I, T, d_txt] float, last hidden states (T may be less than the config's, never more)
    text_mask: Tensor  # [I, T] bool, True = a real token
    has_text: Tensor  # [I] bool
    patches: Tensor  # [I, P, d_img] float, row-major over the grid
    has_image: Tensor  # [I] bool
    cats: Tensor  # [I, n_item_cat] int64
    values: Tensor  # [I, n_item_num] float32
    buckets: Tensor  # [I, n_item_num] int64

    def __len__(self) -> int:
        return self.cats.shape[0]


@dataclass(frozen=True, kw_only=True)
class HistoryItems(_Tensors):
    """G unique items that occur in a batch's histories.

    G may be 0.
    """

    image: Tensor  # [G, d_img] float, the frozen photo features, mean over patches
    text: Tensor  # [G, d_txt] float, the frozen title states, mean over real tokens
    has_image: Tensor  # [G] bool
    has_text: Tensor  # [G] bool
    cats: Tensor  # [G, 2] int64: item_hash, subcategory, in the vocabularies of the item fields

    def __len__(self) -> int:
        return self.cats.shape[0]


@dataclass(frozen=True, kw_only=True)
class AudienceBatch(_Tensors):
    """S unique audience rows with their histories.

    A history is most recent first. Padding may stand anywhere.
    """

    cats: Tensor  # [S, n_aud_cat] int64
    values: Tensor  # [S, n_aud_num] float32
    buckets: Tensor  # [S, n_aud_num] int64
    history: Tensor  # [S, H] int64, row of HistoryItems, -1 = padding (H may be less than the config's, never more)
    history_kind: Tensor  # [S, H] int64: 0 padding, 1 click without purchase, 2 purchase
    history_gap: Tensor  # [S, H] float32, log1p of the hours before the session's start

    def __len__(self) -> int:
        return self.cats.shape[0]


@dataclass(frozen=True, kw_only=True)
class PairBatch(_Tensors):
    """B examples, each a pair of item and audience row.

    A pair is an item shown to an audience row, with the outcome. ``position`` matters in training
    only: in eval mode the model takes every position as unknown.
    """

    item: Tensor  # [B] int64, row of ItemBatch
    audience: Tensor  # [B] int64, row of AudienceBatch
    values: Tensor  # [B, n_pair_num] float32
    buckets: Tensor  # [B, n_pair_num] int64
    position: Tensor  # [B] int64: 0 = unknown, k = display position k-1, clipped to the config's position_size - 1
    label: Tensor  # [B] float32: 1 = ordered

    def __len__(self) -> int:
        return self.item.shape[0]


@dataclass(frozen=True, kw_only=True)
class Batch(_Tensors):
    """One step of the CVR task."""

    items: ItemBatch
    audience: AudienceBatch
    history: HistoryItems
    pairs: PairBatch


@dataclass(frozen=True, kw_only=True)
class AlignmentPairs(_Tensors):
    """A pairs of a photo and a title.

    Both are rows of the same ItemBatch. Both modalities must be present.

    ITA keeps the image and draws the text, TIA keeps the text and draws the image. The loader
    draws, and the label records whether they belong together.
    """

    image_of: Tensor  # [A] int64, the row that lends its photo
    text_of: Tensor  # [A] int64, the row that lends its title
    label: Tensor  # [A] float32: 1 = they belong together

    def __len__(self) -> int:
        return self.label.shape[0]


@dataclass(frozen=True, kw_only=True)
class AlignmentBatch(_Tensors):
    """One step of the alignment tasks.

    Fields of ``items`` (cats, values, buckets) are not read: any width is accepted.

    ``index`` names C distinct items for the contrastive loss and ``group`` their product (equal =
    same product, never used as each other's negatives). Items of ``index`` that lack a modality are
    left out by the model.
    """

    items: ItemBatch  # unique contents, of training listings only
    ita: AlignmentPairs
    tia: AlignmentPairs
    index: Tensor  # [C] int64, rows of items, distinct (C may be 0)
    group: Tensor  # [C] int64


def check_batch(batch: Batch, config: ModelConfig) -> None:
    """Check that a batch fits the config.

    It is meant for loaders and tests. It checks shapes, dtypes and index ranges, which reads all
    integer tensors, so it is too slow for every step.

    Raises:
        ValueError: a batch does not fit. Names tensor, shape and dtype.
    """
    items, audience, history, pairs = batch.items, batch.audience, batch.history, batch.pairs
    i, s, g, b = len(items), len(audience), len(history), len(pairs)
    t, h = items.text.shape[1], audience.history.shape[1]
    n_item, n_audience, n_pair = len(config.item_numeric), len(config.audience_numeric), len(config.pair_numeric)
    shapes: list[tuple[str, Tensor, tuple[int, ...]]] = [
        ("items.text", items.text, (i, t, config.text_width)),
        ("items.text_mask", items.text_mask, (i, t)),
        ("items.has_text", items.has_text, (i,)),
        ("items.patches", items.patches, (i, config.patches, config.image_width)),
        ("items.has_image", items.has_image, (i,)),
        ("items.cats", items.cats, (i, len(config.item_categorical))),
        ("items.values", items.values, (i, n_item)),
        ("items.buckets", items.buckets, (i, n_item)),
        ("audience.cats", audience.cats, (s, len(config.audience_categorical))),
        ("audience.values", audience.values, (s, n_audience)),
        ("audience.buckets", audience.buckets, (s, n_audience)),
        ("audience.history", audience.history, (s, h)),
        ("audience.history_kind", audience.history_kind, (s, h)),
        ("audience.history_gap", audience.history_gap, (s, h)),
        ("history.image", history.image, (g, config.image_width)),
        ("history.text", history.text, (g, config.text_width)),
        ("history.has_image", history.has_image, (g,)),
        ("history.has_text", history.has_text, (g,)),
        ("history.cats", history.cats, (g, 2)),
        ("pairs.item", pairs.item, (b,)),
        ("pairs.audience", pairs.audience, (b,)),
        ("pairs.values", pairs.values, (b, n_pair)),
        ("pairs.buckets", pairs.buckets, (b, n_pair)),
        ("pairs.position", pairs.position, (b,)),
        ("pairs.label", pairs.label, (b,)),
    ]
    for name, tensor, shape in shapes:
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: shape {tuple(tensor.shape)}, expected {shape}")
        leaf = name.split(".")[1]
        wanted = "bool" if leaf in _BOOLEAN else "int64" if leaf in _INTEGER else "float"
        found = "float" if tensor.is_floating_point() else str(tensor.dtype).removeprefix("torch.")
        if found != wanted:
            raise ValueError(f"{name}: dtype {tensor.dtype}, expected {wanted}")
    if t > config.text_tokens or h > config.history_length:
        raise ValueError(f"{t} text tokens, {h} history slots: at most {config.text_tokens}, {config.history_length}")
    sizes = [(f"items.cats[{f.name}]", items.cats[:, k], f.size) for k, f in enumerate(config.item_categorical)]
    sizes += [(f"items.buckets[{f.name}]", items.buckets[:, k], f.size) for k, f in enumerate(config.item_numeric)]
    sizes += [
        (f"audience.cats[{f.name}]", audience.cats[:, k], f.size) for k, f in enumerate(config.audience_categorical)
    ]
    sizes += [
        (f"audience.buckets[{f.name}]", audience.buckets[:, k], f.size) for k, f in enumerate(config.audience_numeric)
    ]
    sizes += [(f"pairs.buckets[{f.name}]", pairs.buckets[:, k], f.size) for k, f in enumerate(config.pair_numeric)]
    sizes += [
        ("audience.history + 1", audience.history + 1, g + 1),
        ("audience.history_kind", audience.history_kind, 3),
        ("pairs.item", pairs.item, i),
        ("pairs.audience", pairs.audience, s),
        ("pairs.position", pairs.position, config.position_size),
    ]
    for name, index, size in sizes:
        if index.numel() and (int(index.min()) < 0 or int(index.max()) >= size):
            raise ValueError(f"{name}: values {int(index.min())} .. {int(index.max())}, expected 0 .. {size - 1}")


_BOOLEAN = frozenset({"text_mask", "has_text", "has_image"})
_INTEGER = frozenset({"cats", "buckets", "history", "history_kind", "item", "audience", "position"})
