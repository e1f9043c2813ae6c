"""Titles of listings, and their corruption by careless stores.

A title has the noun of the class and its attributes, in varying words.
"""

import numpy as np

from simulator.config import TEXT_FACTORS

_WORDS: dict[str, tuple[str, ...]] = {
    "organic": ("organic", "bio", "certified organic", "ecological"),
    "imported": ("imported", "from overseas", "foreign import", "import"),
    "seedless": ("seedless", "no seeds", "without seeds", "pip free"),
    "sugar_free": ("no added sugar", "additive free", "sugar free", "without additives"),
    "heavy_pack": ("family size", "bulk pack", "XXL pack", "2 kg pack", "heavy pack"),
    "brand_name": ("brand name", "branded", "famous brand", "premium label"),
    "promotion": ("on sale", "special offer", "promo", "reduced", "discount week"),
}
_FILLERS = ("quality", "choice", "market", "tasty", "daily", "selected")
_GENERIC = (
    "good product",
    "new arrival",
    "store special",
    "daily groceries",
    "best choice",
    "item",
    "see photo",
    "tasty goods",
    "recommended by the shop",
    "hot seller",
)
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def word_title(noun: str, category: str, attributes: np.ndarray, rng: np.random.Generator) -> str:
    """Word a title for `noun`.

    It mentions each attribute that is 1 (`attributes`: bool [6], in the order of TEXT_FACTORS).

    Outside fruit and vegetables no title says seedless. The same attribute is then worded as free
    of sugar or additives.
    """
    before: list[str] = []
    after: list[str] = []
    for slot in rng.permutation(len(TEXT_FACTORS)):
        if not attributes[slot]:
            continue
        name = TEXT_FACTORS[slot]
        if name == "seedless" and category not in ("fruit", "vegetables"):
            name = "sugar_free"
        words = _WORDS[name]
        (before if rng.random() < 0.5 else after).append(words[rng.integers(len(words))])
    if rng.random() < 0.25:
        before.append(_FILLERS[rng.integers(len(_FILLERS))])
    title = " ".join([*before, noun, *after])
    return title[0].upper() + title[1:] if rng.random() < 0.5 else title


def generic_title(rng: np.random.Generator) -> str:
    """Return a title that names nothing."""
    return _GENERIC[rng.integers(len(_GENERIC))]


def misspell(title: str, rng: np.random.Generator) -> str:
    """Misspell about one letter in five, at least one.

    A letter is swapped with its neighbour, dropped or replaced.
    """
    letters = list(title)
    spots = [i for i, letter in enumerate(letters) if letter.isalpha()]
    for spot in rng.choice(spots, size=max(1, len(spots) // 5), replace=False):
        kind = rng.integers(3)
        if kind == 0 and spot + 1 < len(letters):
            letters[spot], letters[spot + 1] = letters[spot + 1], letters[spot]
        elif kind == 1:
            letters[spot] = ""
        else:
            letters[spot] = _LETTERS[rng.integers(26)]
    return "".join(letters)
