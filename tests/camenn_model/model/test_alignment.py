from __future__ import annotations

import dataclasses

import pytest
import torch

from camenn_model.batch import AlignmentPairs
from camenn_model.config import Attention
from camenn_model.model.camenn import CameNN
from tests.support.random_batches import awake, random_alignment, random_batch, tiny_config


def woken(attention: Attention = "prefix") -> CameNN:
    torch.manual_seed(0)
    model = CameNN(tiny_config(attention=attention))
    awake(model)
    return model.eval()


@pytest.mark.parametrize("attention", ["prefix", "full"])
def test_align_never_looks_at_fields(attention: Attention) -> None:
    model = woken(attention)
    batch = random_alignment(model.config)
    empty = torch.zeros(len(batch.items), 0)
    blind = dataclasses.replace(
        batch, items=dataclasses.replace(batch.items, cats=empty.long(), buckets=empty.long(), values=empty)
    )
    with torch.no_grad():
        seen, hidden = model.align(batch), model.align(blind)
    assert torch.equal(seen.ita, hidden.ita)
    assert torch.equal(seen.tia, hidden.tia)
    assert torch.equal(seen.similarities, hidden.similarities)


def test_align_reads_the_photo_and_the_title_of_the_pair() -> None:
    model = woken()
    batch = random_alignment(model.config)
    base = AlignmentPairs(image_of=torch.tensor([0]), text_of=torch.tensor([1]), label=torch.zeros(1))
    with torch.no_grad():
        logit = model.align(dataclasses.replace(batch, ita=base)).ita
        for field in ("image_of", "text_of"):
            other = dataclasses.replace(base, **{field: torch.tensor([2])})
            assert not torch.allclose(model.align(dataclasses.replace(batch, ita=other)).ita, logit, atol=1e-5)
        moved = dataclasses.replace(batch.items, text=batch.items.text.clone(), patches=batch.items.patches.clone())
        moved.text[0], moved.patches[1] = 9.0, 9.0  # the halves that the pair does not use
        assert torch.allclose(model.align(dataclasses.replace(batch, ita=base, items=moved)).ita, logit, atol=1e-6)


def test_ita_and_tia_are_different_tasks() -> None:
    model = woken()
    batch = random_alignment(model.config)
    with torch.no_grad():
        output = model.align(dataclasses.replace(batch, tia=batch.ita))
    assert not torch.allclose(output.ita, output.tia, atol=1e-3)


def test_align_refuses_pairs_without_a_photo() -> None:
    model = woken()
    batch = random_alignment(model.config)
    items = dataclasses.replace(batch.items, has_image=torch.zeros_like(batch.items.has_image))
    with pytest.raises(ValueError, match="needs a photo and a title"):
        model.align(dataclasses.replace(batch, items=items))


def test_align_leaves_incomplete_items_out_of_the_contrast() -> None:
    model = woken()
    batch = random_alignment(model.config, items=6)
    lacks = torch.tensor([True, True, False, True, True, True])
    none = AlignmentPairs(
        image_of=torch.zeros(0, dtype=torch.int64), text_of=torch.zeros(0, dtype=torch.int64), label=torch.zeros(0)
    )
    items = dataclasses.replace(batch.items, has_text=lacks)
    with torch.no_grad():
        output = model.align(dataclasses.replace(batch, items=items, ita=none, tia=none))
    assert output.similarities.shape == (5, 5)
    assert output.group.tolist() == batch.group[lacks].tolist()
    assert output.ita.shape == (0,)


@pytest.mark.parametrize("attention", ["prefix", "full"])
@pytest.mark.parametrize("reported", ["content_vectors", "modality_states"])
def test_photos_and_titles_are_told_by_their_own_modality_only(reported: str, attention: Attention) -> None:
    model = woken(attention)
    items = random_alignment(model.config).items
    tell = getattr(model, reported)
    with torch.no_grad():
        image, text = tell(items)
        other_image, _ = tell(dataclasses.replace(items, text=items.text + 1, cats=items.cats * 0))
        changed_image, other_text = tell(dataclasses.replace(items, patches=items.patches + 1))
    assert torch.equal(image, other_image) and torch.equal(text, other_text)
    assert not torch.equal(image, changed_image)
    if reported == "content_vectors":
        assert torch.allclose(image.norm(dim=1), torch.ones(len(items)), atol=1e-5)


def test_no_image_vector_stands_in_for_an_absent_photo() -> None:
    model = woken()
    batch = random_batch(model.config, items=3, pairs=6)
    absent = dataclasses.replace(batch.items, has_image=torch.zeros(3, dtype=torch.bool))
    with torch.no_grad():
        before = model(dataclasses.replace(batch, items=absent)).logits
        model.item_tokens.no_image.add_(torch.randn(model.config.width))
        after = model(dataclasses.replace(batch, items=absent)).logits
    assert before.isfinite().all()
    assert not torch.allclose(before, after, atol=1e-4)


def test_modality_dropout_hides_whole_photos_in_training() -> None:
    config = tiny_config()
    tokens = CameNN(config).item_tokens.train()
    items = random_batch(config, items=2000).items
    shown = dataclasses.replace(items, has_image=torch.ones(2000, dtype=torch.bool))
    patches = tokens(shown).mask[:, 2 + config.text_tokens :][:, : config.patches]
    hidden = ~patches.any(1)
    assert 0.07 < float(hidden.float().mean()) < 0.13
    assert bool((patches.all(1) | hidden).all())
