from __future__ import annotations

import dataclasses

import pytest
import torch

from camenn_model.batch import check_batch
from tests.support.random_batches import random_alignment, random_batch, tiny_config


def test_check_batch_names_the_offending_tensor() -> None:
    config = tiny_config()
    batch = random_batch(config)
    check_batch(batch, config)
    wrong = dataclasses.replace(batch.pairs, item=batch.pairs.item + 6)
    with pytest.raises(ValueError, match=r"pairs\.item"):
        check_batch(dataclasses.replace(batch, pairs=wrong), config)
    narrow = dataclasses.replace(batch.items, patches=batch.items.patches[:, :3])
    with pytest.raises(ValueError, match=r"items\.patches: shape"):
        check_batch(dataclasses.replace(batch, items=narrow), config)
    floats = dataclasses.replace(batch.audience, cats=batch.audience.cats.float())
    with pytest.raises(ValueError, match=r"audience\.cats: dtype"):
        check_batch(dataclasses.replace(batch, audience=floats), config)


def test_to_moves_every_tensor() -> None:
    config = tiny_config()
    moved = random_batch(config).to("meta")
    assert {moved.items.text.device.type, moved.history.cats.device.type, moved.pairs.label.device.type} == {"meta"}
    assert random_alignment(config).to(torch.device("meta")).ita.label.device.type == "meta"
