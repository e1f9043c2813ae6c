"""Photos for listings of their kind.

They are of the Grocery Store Dataset.

The data set (Klasson, Zhang and Kjellström, WACV 2019) has photos of fruit, vegetables and cartons,
taken by phone in shops. Its `train.txt` and `val.txt` name them by class.
"""

import hashlib
from pathlib import Path

import numpy as np
import pandas as pd

from schemas.errors import InputError

LISTS = ("train.txt", "val.txt")
_APPLES = ("Golden-Delicious", "Granny-Smith", "Pink-Lady", "Red-Delicious", "Royal-Gala")
_APPLE_JUICE = ("Bravo-Apple-Juice", "God-Morgon-Apple-Juice", "Tropicana-Apple-Juice")
_ORANGE_JUICE = ("Bravo-Orange-Juice", "God-Morgon-Orange-Juice", "Tropicana-Juice-Smooth")
_GRAPEFRUIT_JUICE = (
    "God-Morgon-Orange-Red-Grapefruit-Juice",
    "God-Morgon-Red-Grapefruit-Juice",
    "Tropicana-Golden-Grapefruit",
)
_JUICE = (*_APPLE_JUICE, *_ORANGE_JUICE, *_GRAPEFRUIT_JUICE, "Tropicana-Mandarin-Morning")
_MELONS = ("Cantaloupe", "Galia-Melon", "Honeydew-Melon", "Watermelon")
_MILK = (
    "Arla-Ecological-Medium-Fat-Milk",
    "Arla-Lactose-Medium-Fat-Milk",
    "Arla-Medium-Fat-Milk",
    "Arla-Standard-Milk",
    "Garant-Ecological-Medium-Fat-Milk",
    "Garant-Ecological-Standard-Milk",
)
_PEARS = ("Anjou", "Conference", "Kaiser")
_POTATOES = ("Floury-Potato", "Solid-Potato")
_SOY_MILK = ("Alpro-Fresh-Soy-Milk", "Alpro-Shelf-Soy-Milk")
_TOMATOES = ("Beef-Tomato", "Regular-Tomato", "Vine-Tomato")
_YOGHURT = (
    "Arla-Mild-Vanilla-Yoghurt",
    "Arla-Natural-Mild-Low-Fat-Yoghurt",
    "Arla-Natural-Yoghurt",
    "Valio-Vanilla-Yoghurt",
    "Yoggi-Strawberry-Yoghurt",
    "Yoggi-Vanilla-Yoghurt",
)

KINDS: dict[str, dict[str, tuple[str, ...]]] = {
    "APPLES": {
        "APPLES BRAEBURN (BULK&BAG)": ("Pink-Lady", "Royal-Gala"),
        "APPLES FUJI (BULK&BAG)": ("Pink-Lady", "Royal-Gala"),
        "APPLES GALA (BULK&BAG)": ("Royal-Gala",),
        "APPLES GOLD DELICIOUS (BULK&BA": ("Golden-Delicious",),
        "APPLES GRANNY SMITH (BULK&BAG)": ("Granny-Smith",),
        "APPLES OTHER (BULK&BAG)": _APPLES,
        "APPLES RED DELICIOUS (BULK&BAG": ("Red-Delicious",),
    },
    "CANNED JUICES": {
        "APPLE JUICE & CIDER (50% AND U": _APPLE_JUICE,
        "APPLE JUICE & CIDER (OVER 50%": _APPLE_JUICE,
        "ASEPTIC PACK JUICE AND DRINKS": _JUICE,
        "BLENDED JUICE&COMBINATIONS (50": _JUICE,
        "BLENDED JUICE&COMBINATIONS (OV": _JUICE,
        "BLENDED JUICE&COMBINATIONS (UN": _JUICE,
        "GRAPEFRUIT JUICE (50% AND UNDE": _GRAPEFRUIT_JUICE,
        "GRAPEFRUIT JUICE (OVER 50% JUI": _GRAPEFRUIT_JUICE,
        "JUICE (100% JUICE)": _JUICE,
        "JUICE (UNDER 50% JUICE)": _JUICE,
        "ORANGE JUICE  (OVER 50% JUICE)": _ORANGE_JUICE,
    },
    "CARROTS": {
        "CARROTS - BULK": ("Carrots",),
        "CARROTS BAGGED": ("Carrots",),
        "CARROTS MINI PEELED": ("Carrots",),
    },
    "CITRUS": {
        "CLEMENTINES": ("Satsumas",),
        "GRAPEFRUIT": ("Red-Grapefruit",),
        "LEMONS": ("Lemon",),
        "LIMES": ("Lime",),
        "ORANGES NAVELS ALL": ("Orange",),
        "ORANGES NON NAVEL ALL": ("Orange",),
        "TANGERINES & TANGELOS": ("Satsumas",),
    },
    "FLUID MILK PRODUCTS": {
        "BUTTERMILK": ("Arla-Sour-Milk",),
        "CHOCOLATE MILK": _MILK,
        "FLUID MILK WHITE ONLY": _MILK,
        "MISCELLANEOUS MILK": _MILK,
        "YOGURT NOT MULTI-PACKS": _YOGHURT,
    },
    "HERBS": {"GARLIC WHOLE CLOVES": ("Garlic",)},
    "JUICE": {
        "BLENDED JUICE&COMBINATIONS (OV": _JUICE,
        "JUICE": _JUICE,
        "JUICE (OVER 50% JUICE)": _JUICE,
        "JUICE (UNDER 10% JUICE)": _JUICE,
        "NON-CARB JCE (UNDER 50%JCE)": _JUICE,
        "NON-CARB JCE(OVER 50% JCE)": _JUICE,
    },
    "MELONS": {
        "CANTALOUPE WHOLE": ("Cantaloupe",),
        "HONEYDEW WHOLE": ("Honeydew-Melon",),
        "MELONS WHOLE OTHER": ("Galia-Melon",),
        "WATERMELON PERSONAL": ("Watermelon",),
        "WATERMELON SEEDLESS WHOLE": ("Watermelon",),
        "WATERMELON W/SEEDS WHOLE": ("Watermelon",),
    },
    "MILK BY-PRODUCTS": {"SOUR CREAMS": ("Arla-Ecological-Sour-Cream", "Arla-Sour-Cream")},
    "MUSHROOMS": {
        "MUSHROOMS OTHER": ("Brown-Cap-Mushroom",),
        "MUSHROOMS PORTABELLA": ("Brown-Cap-Mushroom",),
        "MUSHROOMS W/WHOLE PKG": ("Brown-Cap-Mushroom",),
    },
    "NON-DAIRY BEVERAGES": {"SOY BEVERAGE": _SOY_MILK, "SOY/RICE MILK": _SOY_MILK},
    "ONIONS": {
        "ONIONS OTHER": ("Yellow-Onion",),
        "ONIONS SWEET (BULK&BAG)": ("Yellow-Onion",),
        "ONIONS YELLOW (BULK&BAG)": ("Yellow-Onion",),
    },
    "ORGANICS FRUIT & VEGETABLES": {
        "JUICE": _JUICE,
        "ORGANIC APPLES": _APPLES,
        "ORGANIC CARROTS": ("Carrots",),
        "ORGANIC MELONS": _MELONS,
        "ORGANIC MUSHROOMS": ("Brown-Cap-Mushroom",),
        "ORGANIC ONIONS": ("Yellow-Onion",),
        "ORGANIC PEARS": _PEARS,
        "ORGANIC POTATOES": _POTATOES,
        "ORGANIC TOMATOES": _TOMATOES,
    },
    "PEARS": {
        "PEARS ANJOU": ("Anjou",),
        "PEARS BARTLETT": ("Conference",),
        "PEARS BOSC": ("Kaiser",),
        "PEARS OTHER": _PEARS,
    },
    "PEPPERS-ALL": {
        "PEPPERS GREEN BELL": ("Green-Bell-Pepper",),
        "PEPPERS OTHER BELL": ("Orange-Bell-Pepper", "Yellow-Bell-Pepper"),
        "PEPPERS RED BELL": ("Red-Bell-Pepper",),
    },
    "POTATOES": {
        "POTATOES GOLD (BULK&BAG)": ("Solid-Potato",),
        "POTATOES OTHER": _POTATOES,
        "POTATOES RUSSET (BULK&BAG)": ("Floury-Potato",),
        "POTATOES SWEET&YAMS": ("Sweet-Potato",),
        "POTATOES WHITE (BULK&BAG)": ("Solid-Potato",),
    },
    "PROCESSED": {"CIDER": _APPLE_JUICE, "JUICE": _JUICE},
    "REFRGRATD JUICES/DRNKS": {
        "DAIRY CASE 100% PURE JUICE - O": _ORANGE_JUICE,
        "DAIRY CASE 100% PURE JUICE OTH": _JUICE,
        "DAIRY CASE CITRUS PNCH/OJ SUBS": _ORANGE_JUICE,
        "DAIRY CASE FRUIT DRINKS (NO JU": _JUICE,
        "DAIRY CASE JUICE DRNK UNDER 10": _JUICE,
    },
    "SQUASH": {"SQUASH ZUCCHINI": ("Zucchini",)},
    "STONE FRUIT": {
        "NECTARINES WHITE FLESH": ("Nectarine",),
        "NECTARINES YELLOW FLESH": ("Nectarine",),
        "PEACHES WHITE FLESH": ("Peach",),
        "PEACHES YELLOW FLESH": ("Peach",),
        "PLUMS": ("Plum",),
    },
    "TOMATOES": {
        "TOMATOES HOT HOUSE BULK": ("Beef-Tomato", "Regular-Tomato"),
        "TOMATOES HOTHOUSE ON THE VINE": ("Vine-Tomato",),
        "TOMATOES VINE RIPE BULK": ("Regular-Tomato", "Vine-Tomato"),
        "TOMATOES VINE RIPE PKG": ("Regular-Tomato", "Vine-Tomato"),
        "TOMATOES-OTHER": _TOMATOES,
    },
    "TROPICAL FRUIT": {
        "AVOCADO": ("Avocado",),
        "BANANAS": ("Banana",),
        "KIWI FRUIT": ("Kiwi",),
        "MANGO": ("Mango",),
        "PAPAYA": ("Papaya",),
        "PINEAPPLE WHOLE&PEEL/CORED": ("Pineapple",),
    },
    "VALUE ADDED FRUIT": {"MELON HALVES/QUARTERS": _MELONS},
    "VALUE ADDED VEGETABLES": {"CARROTS SLICED/SHRED/STICKS": ("Carrots",)},
    "VEGETABLES - ALL OTHERS": {
        "ASPARAGUS": ("Asparagus",),
        "CABBAGE": ("Cabbage",),
        "CUCUMBERS": ("Cucumber",),
        "ONIONS YELLOW (BULK&BAG)": ("Yellow-Onion",),
        "TOMATOES-OTHER": _TOMATOES,
    },
    "YOGURT": {"YOGURT MULTI-PACKS": _YOGHURT, "YOGURT NOT MULTI-PACKS": _YOGHURT},
}
"""{product category: {product type: classes whose photos show it}}, names as the two sources write them.
Types that no class shows, cranberry juice or red onions for one, are left out.
"""


def read_photos(folder: Path) -> dict[str, list[str]]:
    """Read the photos of each class, as paths below `folder`.

    Raises:
        InputError: the folder is no Grocery Store Dataset, or lacks a class or a file that its
            lists name.
    """
    remedy = "give the folder of the Grocery Store Dataset that holds classes.csv, train.txt and val.txt"
    photos: dict[str, list[str]] = {}
    for name in LISTS:
        try:
            lines = (folder / name).read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"complete_journey: --photos: {folder / name} cannot be read ({error}); {remedy}"
            ) from error
        for line in lines:
            path = line.split(",")[0].strip()
            if path:
                photos.setdefault(Path(path).parent.name, []).append(path)
    wanted = {name for types in KINDS.values() for classes in types.values() for name in classes}
    missing = sorted(wanted - set(photos))
    if missing:
        raise InputError(f"complete_journey: --photos: no photo of {missing[0]} in {folder / LISTS[0]}; {remedy}")
    for name in sorted(wanted):
        for path in photos[name]:
            if not (folder / path).is_file():
                raise InputError(f"complete_journey: --photos: {folder / path} is listed but not there; {remedy}")
    return photos


def fingerprint(folder: Path) -> str:
    """Return a fingerprint of the data set's lists.

    It has 16 hex digits.
    """
    return hashlib.sha256(b"\n".join((folder / name).read_bytes() for name in LISTS)).hexdigest()[:16]


def assign_photos(products: pd.DataFrame, photos: dict[str, list[str]], seed: int) -> list[str | None]:
    """Choose a photo for each product, or None.

    Products of the same kind share its photos evenly. Equal seeds give equal photos.
    """
    rng = np.random.default_rng([seed, 2])
    members: dict[tuple[str, ...], list[int]] = {}
    for row, (category, kind) in enumerate(zip(products["product_category"], products["product_type"], strict=True)):
        classes = KINDS.get(category, {}).get(kind)
        if classes is not None:
            members.setdefault(classes, []).append(row)
    chosen: list[str | None] = [None] * len(products)
    for classes in sorted(members):
        pool = rng.permutation(sorted(path for name in classes for path in photos[name]))
        for place, row in enumerate(members[classes]):
            chosen[row] = str(pool[place % len(pool)])
    return chosen
