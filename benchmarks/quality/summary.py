"""One line of the results' main figures."""

from typing import Any

from benchmarks.quality.figures import Result, by_model, mean_and_error
from benchmarks.quality.job import OF

LOGS = {"log_a": "full_log", "log_b": "other_half", "real": "real_log", "city": "city"}
"""Names of logs, and what the summary calls them"""
MODELS = {"full": "camenn"}
"""The same for models. The others have their own name."""
FIGURES = ("auc", "session_auc", "gauc", "log_loss", "ne", "pcoc")


def summarize(results: list[Result]) -> dict[str, Any]:
    """Return each figure's mean over seeds, and its standard error.

    Names are LOG.MODEL.FIGURE, and LOG.MODEL.FIGURE_se where there are two seeds or more. LOG.seeds
    is the number of CameNN's. A part of a log that models learned from is LOG.part.
    """
    found: dict[str, Any] = {}
    for (kind, model), of_seeds in by_model(results).items():
        name, _, part = kind.partition(OF)
        log = LOGS.get(name)
        tests = [result["test"] for result in of_seeds if "test" in result]
        if log is None or not tests:
            continue
        if part:
            log = f"{log}.{part}"
        if model == "full":
            found[f"{log}.seeds"] = len(tests)
        for figure in FIGURES:
            mean, error = mean_and_error([test[figure] for test in tests])
            name = f"{log}.{MODELS.get(model, model)}.{figure}"
            found[name] = round(mean, 5)
            if len(tests) > 1:
                found[f"{name}_se"] = round(error, 5)
    return dict(sorted(found.items()))
