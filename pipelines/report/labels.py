"""The report's labels and number formats.

The labels explain counts and metrics in plain English.
"""

from dataclasses import dataclass
from typing import Any

DIGITS = 4
"""Default number of decimals of a metric"""
OUTCOMES = {
    "rejected": "cannot be used: a required value is missing or contradicts another",
    "duplicates": "exact copies of another row",
    "unknown_item": "the listing is not in the catalog",
    "final_day": "of a day that an earlier run built for good",
    "open_window": "too recent: an order may still follow",
    "repeated_clicks": "a further click on the same listing in the same session",
    "returns": "quantity of zero or less",
    "unknown_id": "names an audience row or a listing that is not there",
    "other_store": "the listing is of another store than the audience row's",
    "no_listing": "no listing to score: none of its store, or none that was requested",
    "after_as_of": "later than the moment up to which the logs are read",
}
"""Reasons why rows of a table were left out."""

SPLIT_WORDS = {
    "train": "the model learns from these",
    "gap": "left out, so that no label reaches into the next part",
    "early_stop": "decides when training stops",
    "calibration": "turns scores into probabilities",
    "test": "opened once, for the figures on this page",
}

BASELINE_TITLES = {"popularity": "Popularity", "lightgbm": "LightGBM"}

FLAG_WORDS = {
    "mismatch": "photo and title do not belong together",
    "no_image": "no photo",
    "no_text": "no title",
    "vague_image": "photo is blurred, dark or small",
    "poor_title": "title has little information",
}


GATE_WORDS = {
    "coverage_listings": "Listings",
    "coverage_audience_rows": "Audience rows",
    "tables": "Optional tables",
    "store_id": "Stores of the audience in the catalog",
    "store_in_stores": "Stores of the audience in the table of stores",
    "user_in_logs": "Users of the audience in the logs",
    "user_in_users": "Users of the audience in the table of users",
    "logged_item": "Clicked and ordered listings in the catalog",
    "candidate_audience": "Candidates' audience rows",
    "candidate_item": "Candidates' listings",
    "audience_met": "Audience rows that meet a listing",
    "listings_met": "Listings that meet an audience row",
    "pairs": "Pairs",
    "candidates": "Candidates",
    "candidates_used": "Candidates that are scored",
    "photos": "Listings with a photo",
    "titles": "Listings with a title",
    "known_category": "Categories that the model knows",
    "known_subcategory": "Subcategories that the model knows",
    "known_brand": "Brands that the model knows",
    "known_store": "Stores that the model knows",
    "calibration": "Predicted over observed orders",
    "mean_cvr": "Mean predicted rate",
    "psi": "Distribution of the scores",
    "photos_kept": "Photos since the run before",
    "challenge": "The new model against the one before",
}
"""Quantity that a gate checks"""


def gate_title(name: str) -> str:
    """Return a gate's name for readers.

    The model's user fields have gates of their own.
    """
    if name in GATE_WORDS:
        return GATE_WORDS[name]
    if name.startswith("known_user_"):
        return f"Users' {phrase(name.removeprefix('known_user_'))} that the model knows"
    return phrase(name)


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A description of how one metric is shown.

    `best`: 'high', 'low' or 'one' (the closer to 1, the better).
    """

    name: str
    title: str
    meaning: str
    best: str


METRICS = (
    Metric(
        name="auc",
        title="AUC",
        meaning="chance that a bought click ranks above one that was not; 0.5 is a coin toss",
        best="high",
    ),
    Metric(name="gauc", title="GAUC", meaning="AUC within each user, weighted by clicks", best="high"),
    Metric(name="session_auc", title="Session AUC", meaning="AUC within each session", best="high"),
    Metric(
        name="ndcg_at_10",
        title="NDCG@10",
        meaning="how far up a session's bought listings stand; 1 is perfect",
        best="high",
    ),
    Metric(name="hr_at_10", title="Hit rate@10", meaning="sessions whose first ten hold a bought listing", best="high"),
    Metric(name="log_loss", title="Log loss", meaning="mean surprise of the predicted probabilities", best="low"),
    Metric(
        name="ne",
        title="Normalised entropy",
        meaning="log loss over that of always predicting the average; below 1 is better than that",
        best="low",
    ),
    Metric(
        name="ece",
        title="Calibration error",
        meaning="mean distance between predicted and bought share, 15 bins",
        best="low",
    ),
    Metric(
        name="pcoc", title="Predicted / bought", meaning="1 is right on average, above 1 predicts too much", best="one"
    ),
)


def count(value: float | None) -> str:
    """Write a whole number with separators, or a dash."""
    return "–" if value is None else f"{value:,.0f}"


def number(value: float | None, digits: int = DIGITS) -> str:
    """Write a number with fixed decimals, or a dash."""
    return "–" if value is None or value != value else f"{value:,.{digits}f}"


def signed(value: float, digits: int = DIGITS) -> str:
    """Write a difference with its sign."""
    return f"{value:+.{digits}f}".replace("-", "−")


def percent(value: float | None, digits: int = 1) -> str:
    """Write a share as per cent, or a dash."""
    if value is None or value != value:
        return "–"
    least = 10.0 ** -(digits + 2)
    return f"<{least:.{digits}%}" if 0 < value < least else f"{value:.{digits}%}"


def duration(seconds: float | None) -> str:
    """Write a duration in readable units.

    For example 8.2 s, 3 min 20 s, 2 h 5 min.
    """
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def phrase(name: str) -> str:
    """Write a column or reason name as words."""
    return name.replace("_", " ")


def shown(value: Any) -> str:
    """Write a value of a stage's summary.

    It may have any type.
    """
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{phrase(name)} {shown(inner)}" for name, inner in value.items()) or "–"
    if isinstance(value, list):
        return ", ".join(shown(inner) for inner in value) or "–"
    return str(value)
