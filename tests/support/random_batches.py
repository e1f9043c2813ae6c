"""Small configs and random batches for the tests of the model."""

from __future__ import annotations

import torch

from camenn_model.batch import AlignmentBatch, AlignmentPairs, AudienceBatch, Batch, HistoryItems, ItemBatch, PairBatch
from camenn_model.config import Attention, FieldSpec, ModelConfig, Tokens

FIELDS = (
    FieldSpec(name="item_hash", group="item", kind="categorical", size=50),
    FieldSpec(name="category", group="item", kind="categorical", size=5),
    FieldSpec(name="subcategory", group="item", kind="categorical", size=9),
    FieldSpec(name="price", group="item_numeric", kind="numeric", size=6),
    FieldSpec(name="blur", group="item_quality", kind="numeric", size=6),
    FieldSpec(name="luminance", group="item_quality", kind="numeric", size=6),
    FieldSpec(name="user_hash", group="audience", kind="categorical", size=30),
    FieldSpec(name="store", group="audience", kind="categorical", size=4),
    FieldSpec(name="hour", group="audience", kind="categorical", size=25),
    FieldSpec(name="user_clicks_per_day", group="audience_counts", kind="numeric", size=6),
    FieldSpec(name="item_clicks", group="item_counts", kind="numeric", size=6),
    FieldSpec(name="item_cvr", group="item_counts", kind="numeric", size=6),
    FieldSpec(name="times_bought", group="pair_counts", kind="numeric", size=6),
)


def tiny_config(
    *,
    attention: Attention = "prefix",
    shared_layers: int = 2,
    experts: int = 4,
    top_k: int = 2,
    width: int = 16,
    heads: int = 2,
    fields: tuple[FieldSpec, ...] = FIELDS,
    cvr_tokens: Tokens = "all",
    cvr_layers: bool = True,
) -> ModelConfig:
    """A model that runs in milliseconds."""
    return ModelConfig(
        profile_name="tiny",
        fields=fields,
        width=width,
        heads=heads,
        ffn=2 * width,
        shared_layers=shared_layers,
        experts=experts,
        top_k=top_k,
        text_tokens=5,
        text_width=12,
        patch_grid=2,
        image_width=10,
        history_length=4,
        history_tokens=3,
        position_size=7,
        base_rate=0.2,
        attention=attention,
        cvr_tokens=cvr_tokens,
        cvr_layers=cvr_layers,
    )


def random_items(config: ModelConfig, count: int, generator: torch.Generator, absent: float = 0.3) -> ItemBatch:
    """Random items of which a share ``absent`` lacks the photo, and likewise the title."""
    g, numeric = generator, len(config.item_numeric)
    has_text = torch.rand(count, generator=g) >= absent
    length = torch.randint(1, config.text_tokens + 1, (count, 1), generator=g)
    return ItemBatch(
        text=torch.randn(count, config.text_tokens, config.text_width, generator=g),
        text_mask=(torch.arange(config.text_tokens) < length) & has_text[:, None],
        has_text=has_text,
        patches=torch.randn(count, config.patches, config.image_width, generator=g),
        has_image=torch.rand(count, generator=g) >= absent,
        cats=_indices([field.size for field in config.item_categorical], count, g),
        values=torch.randn(count, numeric, generator=g),
        buckets=_indices([field.size for field in config.item_numeric], count, g),
    )


def random_history(config: ModelConfig, count: int, generator: torch.Generator) -> HistoryItems:
    """Random items of histories."""
    g, table = generator, {field.name: field.size for field in config.fields}
    return HistoryItems(
        image=torch.randn(count, config.image_width, generator=g),
        text=torch.randn(count, config.text_width, generator=g),
        has_image=torch.rand(count, generator=g) >= 0.3,
        has_text=torch.rand(count, generator=g) >= 0.3,
        cats=_indices([table["item_hash"], table["subcategory"]], count, g),
    )


def random_audience(config: ModelConfig, count: int, history: int, generator: torch.Generator) -> AudienceBatch:
    """Random audience rows whose histories point into ``history`` items."""
    g, slots = generator, (count, config.history_length)
    past = torch.randint(-1, history, slots, generator=g)
    kind = torch.where(past >= 0, torch.randint(1, 3, slots, generator=g), torch.zeros(slots, dtype=torch.int64))
    return AudienceBatch(
        cats=_indices([field.size for field in config.audience_categorical], count, g),
        values=torch.randn(count, len(config.audience_numeric), generator=g),
        buckets=_indices([field.size for field in config.audience_numeric], count, g),
        history=past,
        history_kind=kind,
        history_gap=torch.rand(slots, generator=g) * 5,
    )


def random_batch(
    config: ModelConfig, *, items: int = 6, audience: int = 4, history: int = 5, pairs: int = 12, seed: int = 0
) -> Batch:
    """A random batch with a third of the photos and titles absent."""
    g = torch.Generator().manual_seed(seed)
    sizes = [field.size for field in config.pair_numeric]
    return Batch(
        items=random_items(config, items, g),
        audience=random_audience(config, audience, history, g),
        history=random_history(config, history, g),
        pairs=PairBatch(
            item=torch.randint(items, (pairs,), generator=g),
            audience=torch.randint(audience, (pairs,), generator=g),
            values=torch.randn(pairs, len(sizes), generator=g),
            buckets=_indices(sizes, pairs, g),
            position=torch.randint(config.position_size, (pairs,), generator=g),
            label=torch.randint(2, (pairs,), generator=g).float(),
        ),
    )


def random_alignment(config: ModelConfig, *, items: int = 6, pairs: int = 8, seed: int = 0) -> AlignmentBatch:
    """A random alignment batch, every photo and title present."""
    g = torch.Generator().manual_seed(seed)

    def draw() -> AlignmentPairs:
        image, text = torch.randint(items, (2, pairs), generator=g)
        return AlignmentPairs(image_of=image, text_of=text, label=(image == text).float())

    return AlignmentBatch(
        items=random_items(config, items, g, absent=0.0),
        ita=draw(),
        tia=draw(),
        index=torch.arange(items),
        group=torch.arange(items) // 2 if items > 3 else torch.arange(items),
    )


def awake(model: torch.nn.Module, seed: int = 0) -> None:
    """Scale every parameter so that mistakes show: initial gates are all zero and initial weights tiny."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=g) * 0.2)
        for name, buffer in model.named_buffers():
            if name.endswith((".center", ".directions")):
                buffer.add_(torch.randn(buffer.shape, generator=g) * 0.2)
            if name.endswith(".oldest"):
                # Of ages up to bucket 16 in random batches
                buffer.fill_(12)


def _indices(sizes: list[int], count: int, generator: torch.Generator) -> torch.Tensor:
    """[count, len(sizes)] int64, column k below sizes[k]."""
    if not sizes:
        return torch.zeros(count, 0, dtype=torch.int64)
    return torch.stack([torch.randint(size, (count,), generator=generator) for size in sizes], dim=1)
