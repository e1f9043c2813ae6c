"""Listing quality of photos and titles.

It flags photos and titles that do not belong together, and poor ones. Other listings are the
reference (`agreement.py`).
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from camenn_model.content.agreement import Ints, Judgement

MISMATCH_AT = 0.5
"""A photo and a title that are more probably a pair of two listings than of one ..."""
MISMATCH_PERCENTILE = 0.90
"""... and among the worst tenth of the catalog: where photos and titles carry little information
about each other, every pair is uncertain.
"""
VAGUE_PERCENTILE = 0.05
"""Among the least sharp twentieth of photos."""
DARK_BELOW = 0.12
"""Mean luminance, 0 to 1."""
SMALL_BELOW = 0.01
"""Megapixels: 100 × 100 px."""
SHORT_TITLE = 3
"""Tokens, [CLS] and [SEP] included, so one word piece."""
UNKNOWN_ABOVE = 0.5
"""Share of words that the vocabulary does not know."""


PRIOR_CLICKS = 20.0
"""Clicks at which half of the apparent loss is counted."""


@dataclass(frozen=True)
class Activity:
    """Clicks of the last weeks, and orders credited to them.

    Both are int64 [N] in the order of the items.
    """

    clicks: Ints
    orders: Ints


def lost_orders(group: Ints, flagged: NDArray[np.bool_], activity: Activity) -> NDArray[np.float64]:
    """Estimate the orders that flagged listings may have lost.

    They are lost to photo or title, float64 [N], and 0 without a flag. [ours]

    c / (c + 20) · max(0, c · e - o), with c clicks and o orders of the listing, and e the
    conversion rate of the unflagged listings of its group, smoothed by 20 clicks of the catalog's
    rate. Orders lost before a click are not included.

    Args:
        group: number of each listing's subcategory, from 0; -1 = none.
        flagged: listings with a flag.
        activity: clicks and orders of the listings.
    """
    place = group - group.min(initial=0)
    clicks, orders = (values.astype(np.float64) for values in (activity.clicks, activity.orders))
    sound = ~flagged
    total = clicks[sound].sum()
    rate = orders[sound].sum() / total if total else 0.0
    size = int(place.max(initial=-1)) + 1
    of_group = [np.bincount(place[sound], weights=values[sound], minlength=size) for values in (clicks, orders)]
    expected = (of_group[1] + PRIOR_CLICKS * rate) / (of_group[0] + PRIOR_CLICKS)
    missing = np.maximum(0.0, clicks * expected[place] - orders)
    return np.where(flagged, clicks / (clicks + PRIOR_CLICKS) * missing, 0.0)


def judge(items: pa.Table, found: Judgement, activity: Activity) -> pa.Table:
    """Compute the columns of the listing_quality table.

    These are all columns but model_version, in the order of `items`.

    Args:
        items: table under the contract `ITEMS`, N rows.
        found: judgement of all N listings.
        activity: of all N listings.
    """
    mismatch = found.mismatch
    known = np.isfinite(mismatch)
    percentile = np.full(len(mismatch), np.nan, dtype=np.float32)
    if known.any():
        order = np.sort(mismatch[known])
        percentile[known] = np.searchsorted(order, mismatch[known], side="left") / len(order)
    blur, luminance, megapixels, tokens, unknown = (
        items[name].to_numpy(zero_copy_only=False).astype(np.float64)
        for name in ("blur", "luminance", "megapixels", "title_tokens", "unknown_share")
    )
    no_image = items["image_key"].is_null().to_numpy()
    no_text = items["title_key"].is_null().to_numpy()
    sharpness = np.nanquantile(blur, VAGUE_PERCENTILE) if np.isfinite(blur).any() else -np.inf
    with np.errstate(invalid="ignore"):
        flags = {
            "mismatch": (mismatch > MISMATCH_AT) & (percentile >= MISMATCH_PERCENTILE),
            "no_image": no_image,
            "no_text": no_text,
            "vague_image": ~no_image & ((blur < sharpness) | (luminance < DARK_BELOW) | (megapixels < SMALL_BELOW)),
            "poor_title": ~no_text & ((tokens <= SHORT_TITLE) | (unknown > UNKNOWN_ABOVE)),
        }
    listed = [[name for name, mask in flags.items() if mask[row]] for row in range(len(mismatch))]

    flagged = np.logical_or.reduce(list(flags.values()))
    group, _ = pd.factorize(items["subcategory"].to_pandas())
    lost = lost_orders(group.astype(np.int64), flagged, activity)

    def nullable(values: NDArray[np.floating]) -> pa.Array:
        return pa.array(values.astype(np.float32), mask=~np.isfinite(values))

    return pa.table(
        {
            "item_id": items["item_id"],
            "ita": nullable(found.ita),
            "tia": nullable(found.tia),
            "cosine": nullable(found.cosine),
            "mismatch": nullable(mismatch),
            "mismatch_percentile": nullable(percentile),
            "flags": pa.array(listed, pa.list_(pa.string())),
            "clicks": pa.array(activity.clicks),
            "orders": pa.array(activity.orders),
            "lost_orders": pa.array(lost.astype(np.float32)),
        }
    )
