"""The prefix formula of ``docs/explanation/model.md`` written out for one pair at a time, with loops and without masks.

It shares nothing with the model but its weights and its tokens: padding is cut away instead of masked, heads are a
loop, every pair computes its own item and audience.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from camenn_model.batch import Batch
from camenn_model.model.camenn import CameNN
from camenn_model.model.layers import EncoderLayer, FeedForward, layers_of
from camenn_model.model.towers import Tower


def reference_logits(model: CameNN, batch: Batch) -> Tensor:
    """Logits [B] of a model in eval mode with prefix attention."""
    items = model.item_tokens(batch.items)
    audience = model.audience_tokens(batch.audience, *model.item_tokens.liked(batch.history))
    logits = []
    for pair in range(len(batch.pairs)):
        i, u = int(batch.pairs.item[pair]), int(batch.pairs.audience[pair])
        x, affinity = embed_pair(model, batch, pair)
        if not model.config.cvr_layers:
            logits.append(model.cvr_tower.head.bias[0] + affinity)
            continue
        item, user, tokens = items.tokens[i][items.mask[i]], audience.tokens[u][audience.mask[u]], x
        memory = int(audience.mask[u][len(audience.mask[u]) - audience.memory :].sum())
        for layer in layers_of(model.shared):
            item, user, tokens = prefix_layer(layer, item, user, tokens, memory)
        score = model.cvr_gate.weights[0].weight @ items.gate[i] + model.cvr_gate.weights[1].weight @ audience.gate[u]
        order = sorted(range(len(score)), key=lambda e: (-float(score[e]), e))[: model.config.top_k]
        gate = torch.softmax(score[order], dim=0)
        mixed = [torch.zeros_like(group) for group in (item, user, tokens)]
        for weight, expert in zip(gate, order, strict=True):
            outputs = prefix_layer(layers_of(model.mixture.experts)[expert], item, user, tokens, memory)
            norm = norm_of(model, expert)
            mixed = [total + weight * layer_norm(norm, output) for total, output in zip(mixed, outputs, strict=True)]
        logits.append(tower_logit(model.cvr_tower, torch.cat(mixed), mixed[2][0]) + affinity)
    return torch.stack(logits)


def full_logits(model: CameNN, batch: Batch) -> Tensor:
    """Logits [B] of a model in eval mode with full attention: all tokens of a pair attend to all."""
    items = model.item_tokens(batch.items)
    audience = model.audience_tokens(batch.audience, *model.item_tokens.liked(batch.history))
    logits = []
    for pair in range(len(batch.pairs)):
        i, u = int(batch.pairs.item[pair]), int(batch.pairs.audience[pair])
        x, affinity = embed_pair(model, batch, pair)
        tokens = torch.cat([x, items.tokens[i][items.mask[i]], audience.tokens[u][audience.mask[u]]])
        for layer in layers_of(model.shared):
            tokens = layer_output(layer, tokens, tokens)
        score = model.cvr_gate.weights[0].weight @ items.gate[i] + model.cvr_gate.weights[1].weight @ audience.gate[u]
        order = sorted(range(len(score)), key=lambda e: (-float(score[e]), e))[: model.config.top_k]
        gate = torch.softmax(score[order], dim=0)
        mixed = torch.zeros_like(tokens)
        for weight, expert in zip(gate, order, strict=True):
            output = layer_output(layers_of(model.mixture.experts)[expert], tokens, tokens)
            mixed = mixed + weight * layer_norm(norm_of(model, expert), output)
        logits.append(tower_logit(model.cvr_tower, mixed, mixed[0]) + affinity)
    return torch.stack(logits)


def embed_pair(model: CameNN, batch: Batch, pair: int) -> tuple[Tensor, Tensor]:
    """Return a pair's tokens, and its preference product.

    (tokens of one pair with both sides' vectors in the first, [X, d], and the product of the item's
    and the audience row's vectors)
    """
    i, u = int(batch.pairs.item[pair]), int(batch.pairs.audience[pair])
    items, history, sides = batch.items, batch.history, (model.item_tokens, model.audience_tokens)
    item = model.item_tokens(items).tokens[i]
    pooled = model.config.cvr_tokens == "pooled"
    fields = item[2 + (0 if pooled else model.config.text_tokens + model.config.patches) :].mean(0)
    tastes = model.item_tokens.tastes
    image_vectors = linear(tastes.image, items.patches[i].float().mean(0)) if items.has_image[i] else tastes.no_image
    titled = items.has_text[i] and items.text_mask[i].any()
    text_vectors = linear(tastes.text, items.text[i][items.text_mask[i]].float().mean(0)) if titled else tastes.no_text
    ours = [fields, image_vectors, text_vectors]
    identity = model.item_tokens.identity(history.cats)
    user = model.audience_tokens(batch.audience, *model.item_tokens.liked(history)).tokens[u]
    entries = min(batch.audience.history.shape[1], model.config.history_tokens) if model.config.cvr_layers else 0
    theirs = [user[: len(user) - entries].mean(0)]
    for place, kind in enumerate((2, 1)):  # bought, clicked
        count, total = 0, [torch.zeros_like(fields) for _ in range(3)]
        for entry, what in zip(batch.audience.history[u], batch.audience.history_kind[u], strict=True):
            if entry >= 0 and what == kind:
                count += 1
                photo, title = history.image[entry].float(), history.text[entry].float()
                seen = linear(tastes.image, photo) if history.has_image[entry] else tastes.no_image
                read = linear(tastes.text, title) if history.has_text[entry] else tastes.no_text
                total = [old + new for old, new in zip(total, (identity[entry], seen, read), strict=True)]
        doubt, gain = sides[1].log_doubt[place].exp(), sides[1].log_gain[place].exp()
        theirs += [gain * each / (count + doubt) for each in total]
    vectors = []
    for side, summary in ((model.affinity.item, ours), (model.affinity.audience, theirs)):
        vectors.append(linear(side.out, F.gelu(linear(side.hidden, layer_norm(side.norm, torch.cat(summary))))))
    likes = [model.affinity.liked_looks.weight @ torch.cat([theirs[2], theirs[5]])]
    likes.append(model.affinity.liked_words.weight @ torch.cat([theirs[3], theirs[6]]))
    worth = 5.0 * model.affinity.worth
    product = torch.cat([vectors[0], image_vectors, text_vectors]) * torch.cat([vectors[1], *likes]) * worth
    product[: len(image_vectors)] /= model.config.width**0.5
    part = model.pair_tokens
    own = items.cats[i, list(model.item_tokens.identity_columns)]
    known = model.item_tokens.identity(own[None])[0]
    known = known + (
        model.item_tokens.patch(items.patches[i].float()).mean(0) if items.has_image[i] else sides[0].no_image
    )
    known = known + (
        (model.item_tokens.text(items.text[i][items.text_mask[i]].float()).mean(0) if titled else 0 * known)
        if items.has_text[i]
        else sides[0].no_text
    )
    extra = model.affinity.item_task.weight @ vectors[0] + model.affinity.audience_task.weight @ vectors[1]
    entry = layer_norm(model.item_tokens.entry_norm, known)
    found = remembered(model, batch, u, entry)
    extra = extra + entry + model.target_attention.out.weight @ found
    groups = part.groups(batch.pairs.values[pair], batch.pairs.buckets[pair])
    parts = [part.task + extra + sum(groups), *groups, part.position.weight[0]]
    tokens = layer_norm(part.norm, torch.stack([parts[0] + parts[-1]] if pooled else parts))
    deep = model.affinity.deep.weight[0] @ F.gelu(linear(model.affinity.deep_hidden, tokens[0]))
    return tokens, product.sum() + deep + wide_logit(model, batch, pair) + counts_logit(model, batch, pair, found)


def remembered(model: CameNN, batch: Batch, u: int, entry: Tensor) -> Tensor:
    """Target attention of one listing's entry to one history, head by head and entry by entry."""
    part, audience = model.target_attention, batch.audience
    entries = model.item_tokens.liked(batch.history)[1]
    width = len(entry) // part.heads
    found, masses = [], []
    for head in range(part.heads):
        own = slice(head * width, (head + 1) * width)
        query = part.query.weight[own] @ entry
        scores, values = [part.nothing[head]], [torch.zeros(width)]
        for place, number in enumerate(audience.history[u].tolist()):
            if number < 0:
                continue
            kind = int(audience.history_kind[u, place])
            age = min(31, int(part.age.oldest), int(audience.history_gap[u, place] * 3.4))
            match = query @ (part.key.weight[own] @ entries[number]) * part.log_sharpness.exp() / width**0.5
            scores.append(match + part.age_bias.weight[age, head] + part.kind_bias.weight[kind, head])
            value = part.value.weight[own] @ entries[number]
            values.append(value + part.age.weight[age, own] + part.kind.weight[kind, own])
        weights = torch.softmax(torch.stack(scores), dim=0)
        found.append(sum(weight * value for weight, value in zip(weights, values, strict=True)))
        masses.append(weights[1:].sum())
    read = torch.cat(found)
    return torch.cat([entry, read, read * entry, torch.stack(masses)])


def counts_logit(model: CameNN, batch: Batch, pair: int, found: Tensor) -> Tensor:
    """The count network's logit of one pair, its audience row and what target attention found for it,
    number by number.
    """
    counts, u = model.counts, int(batch.pairs.audience[pair])
    first = counts.bias + counts.found.weight @ found
    for part, fields, values, buckets in (
        (counts.audience, model.config.audience_numeric, batch.audience.values[u], batch.audience.buckets[u]),
        (counts.pairs, model.config.pair_numeric, batch.pairs.values[pair], batch.pairs.buckets[pair]),
    ):
        for column, field in enumerate(fields):
            bucket = int(buckets[column])
            measures = (0.0, 0.0, 1.0, 0.0)
            if bucket:
                measures = (float(values[column]), 2 * bucket / (field.size - 1) - 1, 0.0, float(bucket == 1))
            for place, measure in enumerate(measures):
                first += measure * part.weight[place * len(fields) + column]
    return linear(counts.out, F.gelu(linear(counts.hidden, F.gelu(first))))[0]


def wide_logit(model: CameNN, batch: Batch, pair: int) -> Tensor:
    """The linear part of one pair's logit: a sum of numbers, one after the other."""
    wide, items, audience, pairs = model.wide, batch.items, batch.audience, batch.pairs
    i, u = int(pairs.item[pair]), int(pairs.audience[pair])
    total = wide.bias[0]
    fields = model.config.item_categorical, model.config.audience_categorical
    names = [[field.name for field in side] for side in fields]
    category = int(items.cats[i, names[0].index("category")])
    first = 0
    for column, field in enumerate(fields[0]):
        if field.name != "item_hash":
            total = total + wide.items.number[first + int(items.cats[i, column])]
            first += field.size
    first = 0
    for column, field in enumerate(fields[1]):
        if field.name != "user_hash":
            place = first + int(audience.cats[u, column])
            total = total + wide.audience.number[place] + wide.cross[place, category]
            first += field.size
    for part, named, values, buckets in (
        (wide.item_numbers, model.config.item_numeric, items.values[i], items.buckets[i]),
        (wide.audience_numbers, model.config.audience_numeric, audience.values[u], audience.buckets[u]),
        (wide.pair_numbers, model.config.pair_numeric, pairs.values[pair], pairs.buckets[pair]),
    ):
        first = 0
        for slope, field, value, bucket in zip(part.slope, named, values, buckets, strict=True):
            total = total + part.number[first + int(bucket)] + (slope * value if bucket > 0 else 0)
            first += field.size
    photo = items.patches[i].float().mean(0) if items.has_image[i] else None
    text_vectors = items.text[i][items.text_mask[i]] if items.has_text[i] else items.text[i][:0]
    for content, mean in (
        (wide.image, photo),
        (wide.text, text_vectors.float().mean(0) if len(text_vectors) else None),
    ):
        if mean is None and (content is wide.image or not items.has_text[i]):
            total = total + content.absent[0]
        else:
            mean = torch.zeros_like(content.center) if mean is None else mean
            total = total + ((mean - content.center) @ content.directions) @ content.slope
    return total


def prefix_layer(
    layer: EncoderLayer, item: Tensor, user: Tensor, x: Tensor, memory: int
) -> tuple[Tensor, Tensor, Tensor]:
    """I' = f(I; I), U' = f(U; U), X' = f(X; [I, U, X]). The last ``memory`` tokens of U stay as they are."""
    active = len(user) - memory
    return (
        layer_output(layer, item, item),
        torch.cat([layer_output(layer, user[:active], user), user[active:]]),
        layer_output(layer, x, torch.cat([item, user, x])),
    )


def layer_output(layer: EncoderLayer, tokens: Tensor, context: Tensor) -> Tensor:
    """A pre-LN encoder layer: ``tokens`` [n, d] attend to ``context`` [m, d]."""
    width = tokens.shape[1]
    w_query, w_key, w_value = layer.qkv.weight.split(width)
    b_query, b_key, b_value = layer.qkv.bias.split(width)
    normal, seen = layer_norm(layer.attention_norm, tokens), layer_norm(layer.attention_norm, context)
    query, key, value = normal @ w_query.T + b_query, seen @ w_key.T + b_key, seen @ w_value.T + b_value
    tokens = tokens + linear(layer.out, multi_head(query, key, value, layer.heads))
    return tokens + feed_forward(layer.ffn, layer_norm(layer.ffn_norm, tokens))


def norm_of(model: CameNN, expert: int) -> nn.LayerNorm:
    """The norm behind an expert."""
    norm = model.mixture.norms[expert]
    assert isinstance(norm, nn.LayerNorm)
    return norm


def tower_logit(tower: Tower, mixed: Tensor, task: Tensor) -> Tensor:
    """One logit from all mixed tokens [n, d] and the task's own [d]."""
    query = linear(tower.query, layer_norm(tower.query_norm, task))[None]
    attended = multi_head(query, mixed @ tower.key.weight.T, mixed @ tower.value.weight.T, tower.heads)[0]
    z = task + linear(tower.out, attended)
    out = z + feed_forward(tower.ffn, layer_norm(tower.ffn_norm, z))
    hidden = F.gelu(linear(tower.head_hidden, layer_norm(tower.head_norm, out)))
    return linear(tower.head, hidden)[0]


def multi_head(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """Softmax attention head by head, [n, d]."""
    width = query.shape[1] // heads
    outputs = []
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        scores = query[:, part] @ key[:, part].T / width**0.5
        outputs.append(torch.softmax(scores, dim=1) @ value[:, part])
    return torch.cat(outputs, dim=1)


def feed_forward(ffn: FeedForward, x: Tensor) -> Tensor:
    """rise, GELU, fall."""
    return linear(ffn.fall, F.gelu(linear(ffn.rise, x)))


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """X Wᵀ + b."""
    return x @ layer.weight.T + layer.bias


def layer_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """(x - mean) / sqrt(var + eps) · w + b over the last axis."""
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + norm.eps) * norm.weight + norm.bias
