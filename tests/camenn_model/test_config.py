from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from camenn_model.config import FieldSpec, LossConfig, ModelConfig
from tests.support.random_batches import FIELDS, tiny_config


def test_model_config_survives_json() -> None:
    config = tiny_config()
    assert ModelConfig.from_json(config.to_json()) == config
    loss = LossConfig(weighting="uncertainty")
    assert LossConfig.from_json(loss.to_json()) == loss


def test_profile_holds_the_documented_sizes() -> None:
    small = ModelConfig.profile("small", fields=FIELDS, text_width=384, image_width=1536, base_rate=0.2)
    assert (small.width, small.heads, small.ffn, small.shared_layers, small.experts, small.top_k) == (
        64,
        4,
        256,
        1,
        4,
        2,
    )
    assert (small.text_tokens, small.patches, small.history_length) == (16, 16, 100)
    base = ModelConfig.profile("base", fields=FIELDS, text_width=768, image_width=1536, base_rate=0.2, patch_grid=4)
    assert (base.width, base.heads, base.ffn, base.shared_layers, base.experts, base.top_k) == (256, 8, 1024, 2, 8, 2)
    assert (base.text_tokens, base.patches) == (32, 16)


def test_model_config_gives_columns_in_field_order() -> None:
    config = tiny_config()
    assert [field.name for field in config.item_numeric] == ["price", "blur", "luminance"]
    assert [field.name for field in config.pair_numeric] == ["item_clicks", "item_cvr", "times_bought"]
    assert (config.item_hash_size, config.user_hash_size) == (50, 30)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_k": 5}, "top_k"),
        ({"width": 15}, "multiple"),
        ({"base_rate": 0.0}, "base_rate"),
        ({"fields": FIELDS[1:]}, "item_hash"),
        ({"fields": FIELDS + FIELDS[:1]}, "unique"),
        ({"dropout": 1.0}, "dropout"),
    ],
)
def test_model_config_refuses_what_cannot_be_built(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(tiny_config(), **change)


def test_field_spec_refuses_wrong_kind() -> None:
    with pytest.raises(ValueError, match="takes categorical"):
        FieldSpec(name="x", group="item", kind="numeric", size=3)
    with pytest.raises(ValueError, match="unknown group"):
        FieldSpec(name="x", group="nowhere", kind="numeric", size=3)
