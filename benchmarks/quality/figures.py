"""Results by model, and statistics over their seeds."""

import math
import re
import statistics
from collections import defaultdict
from typing import Any

from scipy.stats import ttest_1samp

Result = dict[str, Any]
Results = dict[tuple[str, str], list[Result]]
"""By (kind of world: its name without the seed, model), ordered by seed"""


def by_model(results: list[Result]) -> Results:
    """Group results by model, ordered by seed."""
    found: Results = defaultdict(list)
    for result in sorted(results, key=lambda result: result["seed"]):
        found[re.sub(r"\d+$", "", result["world"]), result["model"]].append(result)
    return found


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Return (mean, its standard error).

    The error of a single value is NaN.
    """
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.mean(values), error


def shown(values: list[float], digits: int = 4) -> str:
    """Format mean ± standard error."""
    mean, error = mean_and_error(values)
    return f"{mean:.{digits}f}" + ("" if math.isnan(error) else f" ± {error:.{digits}f}")


def paired(found: Results, kind: str, one: str, other: str, *path: str) -> list[float]:
    """Return a figure's differences between two models, by seed."""
    values = [{r["seed"]: _figure(r, path) for r in found.get((kind, model), [])} for model in (one, other)]
    return [values[0][seed] - values[1][seed] for seed in sorted(values[0].keys() & values[1].keys())]


def _figure(result: Result, path: tuple[str, ...]) -> Any:
    value: Any = result
    for name in path:
        value = value[name]
    return value


def over_truth(results: list[Result], stratum: str) -> list[float]:
    """Return expected AUC over the truth's, by result.

    The truth's is the AUC of the true probabilities. Results with too few examples of the stratum,
    or from before it was reported, are left out.
    """
    strata = (result["expected"]["strata"].get(stratum, {"auc": None}) for result in results)
    return [found["auc"] / found["auc_of_truth"] for found in strata if found["auc"] is not None]


def surely_above(differences: list[float], errors: float = 3.0) -> bool:
    """Return whether differences are significantly above 0.

    They are where all have one sign, and their mean is more than some standard errors above 0.
    """
    mean, error = mean_and_error(differences)
    return len(differences) > 1 and min(differences) > 0 and mean > errors * error


def p_value(differences: list[float]) -> float:
    """Return the two-sided p value of the differences' mean.

    It is by Student's t test, and NaN for a single difference.
    """
    if len(differences) < 2:
        return math.nan
    if min(differences) == max(differences):
        return 0.0 if differences[0] else 1.0
    return float(ttest_1samp(differences, 0).pvalue)
