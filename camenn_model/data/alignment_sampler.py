"""Sampler of photo and title pairs.

They are pairs that belong together, or not.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from camenn_model.batch import AlignmentBatch, AlignmentPairs
from camenn_model.data.item_table import Ints, ItemTable


class AlignmentSampler:
    """A uniform sampler of alignment pairs over the training catalog.

    It is FashionBERT's matching, made directional. Half of the pairs are the listing's own. Of the
    others half come from the same subcategory, half from anywhere, never from the same product,
    photo or title. Held-out listings are never drawn.
    """

    def __init__(self, table: ItemTable) -> None:
        self.table = table
        self.rows = np.flatnonzero(table.with_content() & ~table.held_out)
        groups = table.subcategory[self.rows]
        self.by_group = np.argsort(groups, kind="stable")
        self.group_start = np.searchsorted(groups[self.by_group], groups)
        self.group_end = np.searchsorted(groups[self.by_group], groups, side="right")

    def __len__(self) -> int:
        return len(self.rows)

    def others(self, anchors: Ints, rng: np.random.Generator) -> Ints:
        """Draw a listing of another product for each anchor.

        Anchors and results are indices into `rows`. A result is -1 where ten draws found none.
        """
        found = np.full(len(anchors), -1, dtype=np.int64)
        near = rng.random(len(anchors)) < 0.5
        for attempt in range(10):
            open_ = np.flatnonzero(found < 0)
            if not len(open_):
                break
            anchor = anchors[open_]
            low, high = self.group_start[anchor], self.group_end[anchor]
            within = self.by_group[(low + rng.random(len(open_)) * (high - low)).astype(np.int64)]
            anywhere = rng.integers(0, len(self.rows), len(open_))
            drawn = np.where(near[open_], within, anywhere)
            a, b = self.rows[anchor], self.rows[drawn]
            table = self.table
            same = (
                (table.product[a] == table.product[b])
                | (table.image_row[a] == table.image_row[b])
                | (table.title_row[a] == table.title_row[b])
            )
            found[open_] = np.where(same, -1, drawn)
            # A subcategory of one product has no foreign listing: from the sixth draw on all
            # subcategories are searched.
            near &= attempt < 5
        return found

    def draw(self, pairs: int, listings: int, rng: np.random.Generator) -> AlignmentBatch | None:
        """Draw a batch for the alignment tasks.

        It has `pairs` ITA and `pairs` TIA pairs, and `listings` for the contrastive loss, the
        pairs' anchors among them. None if the catalog has no two.
        """
        if len(self.rows) < 2:
            return None
        contrasted = rng.choice(len(self.rows), size=min(max(pairs, listings), len(self.rows)), replace=False)
        anchors = contrasted[:pairs]
        pieces, columns = [contrasted], []
        for _ in ("ita", "tia"):
            foreign = self.others(anchors, rng)
            swap = (rng.random(len(anchors)) < 0.5) & (foreign >= 0)
            other = np.where(swap, foreign, anchors)
            pieces.append(other)
            columns.append((other, ~swap))
        places, inverse = np.unique(np.concatenate(pieces), return_inverse=True)
        index, ita_other, tia_other = np.split(inverse, np.cumsum([len(contrasted), len(anchors)]))
        anchor = index[: len(anchors)]
        table_rows = self.rows[places]

        def paired(image: Ints, text: Ints, label: NDArray[np.bool_]) -> AlignmentPairs:
            return AlignmentPairs(
                image_of=torch.from_numpy(image),
                text_of=torch.from_numpy(text),
                label=torch.from_numpy(label.astype(np.float32)),
            )

        _, group = np.unique(self.table.product[self.rows[contrasted]], return_inverse=True)
        return AlignmentBatch(
            items=self.table.batch(table_rows, content_only=True),
            ita=paired(anchor, ita_other, columns[0][1]),
            tia=paired(tia_other, anchor, columns[1][1]),
            index=torch.from_numpy(index),
            group=torch.from_numpy(group),
        )
