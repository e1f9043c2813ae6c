"""The report's sections: from what was read to what the template shows. Each is None where its source is absent."""

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from pipelines import report_plots as plots
from pipelines.manifest import Manifest
from pipelines.report_data import STAGES, Item, Reason, Work, count_reasons, read_columns
from pipelines.report_photos import Photo
from pipelines.report_scores import Drift, ScoreDigest, top_by_store
from pipelines.report_words import BASELINE_TITLES, METRICS, OUTCOMES, SPLIT_WORDS, STAGE_TITLES, Metric, phrase

EXAMPLES_PER_REASON = 3
QUERIES_PER_DIRECTION = 6
MISMATCHES = 24
STORES_WITH_PHOTOS = 24
STORES_LISTED = 300
ITEMS_PER_STORE = 6
NAMES_PER_STORE = 3

_CALM_PSI, _LARGE_PSI = 0.1, 0.2
"""Below the first a distribution is read as unchanged; the second is the gate of `camenn score`."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """A listing as the page shows it. `note` and `good` belong to where it stands: a figure, and whether to mark it as right."""

    item: Item
    photo: Photo
    note: str = ""
    good: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of a funnel: rows that remain before it, and those that it takes. Shares are of the rows that came in."""

    name: str
    meaning: str
    rows: int
    offset: float
    share: float
    kind: str


@dataclass(frozen=True, kw_only=True)
class Book:
    """The account of one table of one stage."""

    stage: str
    table: str
    rows_in: int
    rows_out: int
    exclusions: dict[str, int]

    @property
    def balances(self) -> bool:
        """Whether every row that came in is accounted for."""
        return self.rows_in == self.rows_out + sum(self.exclusions.values())


@dataclass(frozen=True, kw_only=True)
class MetricRow:
    """One metric of the model and of each baseline; `best` is the index of the best value, None where there is nothing to compare."""

    metric: Metric
    values: list[float | None]
    best: int | None


@dataclass(frozen=True, kw_only=True)
class Query:
    """One retrieval query with its answers."""

    direction: str
    card: Card
    results: list[Card]


@dataclass(frozen=True, kw_only=True)
class Store:
    """One store's best listings."""

    store_id: str
    cards: list[Card]


def books(work: Work) -> list[Book]:
    """The accounts of all tables of all stages."""
    found = []
    for stage, manifest in work.manifests.items():
        for table, counts in sorted(manifest.counts.items()):
            exclusions = {name: rows for name, rows in counts.items() if name not in ("in", "out") and rows}
            order = sorted(exclusions, key=lambda name: (list(OUTCOMES).index(name) if name in OUTCOMES else len(OUTCOMES), name))
            found.append(Book(stage=stage, table=table, rows_in=counts.get("in", 0), rows_out=counts.get("out", 0), exclusions={name: exclusions[name] for name in order}))
    return found


def click_funnel(work: Work) -> list[Step] | None:
    """From all clicks to training examples: what came in, what each reason took, what was left."""
    manifest = work.manifests.get("shards")
    if manifest is None or "clicks" not in manifest.counts:
        return None
    book = next(book for book in books(work) if book.stage == "shards" and book.table == "clicks")
    total = max(book.rows_in, 1)
    steps = [Step(name="clicks read", meaning="every row of the click log", rows=book.rows_in, offset=0.0, share=1.0, kind="in")]
    left = book.rows_in
    for name, rows in book.exclusions.items():
        left -= rows
        steps.append(Step(name=phrase(name), meaning=OUTCOMES.get(name, ""), rows=-rows, offset=left / total, share=rows / total, kind="lost"))
    steps.append(Step(name="examples kept", meaning="one per listing clicked in a session", rows=book.rows_out, offset=0.0, share=book.rows_out / total, kind="out"))
    return steps


def splits(work: Work) -> list[Step]:
    """The examples by part of time, in order of time."""
    manifest = work.manifests.get("shards")
    found: dict[str, int] = manifest.summary.get("examples", {}) if manifest else {}
    total = max(sum(found.values()), 1)
    order = sorted(found, key=lambda name: list(SPLIT_WORDS).index(name) if name in SPLIT_WORDS else len(SPLIT_WORDS))
    return [Step(name=phrase(name), meaning=SPLIT_WORDS.get(name, ""), rows=found[name], offset=0.0, share=found[name] / total, kind=f"split-{name}") for name in order]


def reasons(work: Work) -> dict[str, list[Reason]]:
    """Rejects and defects by reason."""
    return {table: count_reasons(work.manifests, table, EXAMPLES_PER_REASON) for table in ("rejects", "defects")}


def _best(metric: Metric, values: list[float | None]) -> int | None:
    known = [(number, value) for number, value in enumerate(values) if value is not None]
    if len(known) < 2:
        return None
    badness = {"high": lambda value: -value, "low": lambda value: value, "one": lambda value: abs(value - 1)}[metric.best]
    return min(known, key=lambda pair: badness(pair[1]))[0]


def quality(work: Work) -> dict[str, Any] | None:
    """The model beside its baselines, the AUCs to draw, and the calibration plot."""
    if work.metrics is None or "test" not in work.metrics:
        return None
    test, baselines = work.metrics["test"], work.metrics.get("baselines", {})
    names = list(baselines)
    columns = [test, *(baselines[name] for name in names)]
    rows = []
    for metric in METRICS:
        values = [column.get(metric.name) for column in columns]
        if any(value is not None for value in values):
            rows.append(MetricRow(metric=metric, values=values, best=_best(metric, values)))
    titles = ["CameNN", *(BASELINE_TITLES.get(name, phrase(name)) for name in names)]
    aucs = sorted(((title, column["auc"]) for title, column in zip(titles, columns, strict=True) if column.get("auc") is not None), key=lambda pair: -pair[1])
    top = max((auc for _, auc in aucs), default=0.5)
    # The axis runs from a coin toss to a round number above the best.
    scale = max(np.ceil((top - 0.5) * 20 + 0.4) / 20, 0.05)
    bars = [{"title": title, "auc": auc, "share": max(0.0, (auc - 0.5) / scale), "ours": title == "CameNN"} for title, auc in aucs]
    bins = pd.DataFrame(work.metrics.get("reliability") or [])
    reliability = plots.plot_reliability(*(bins[name].to_numpy() for name in ("predicted", "observed", "rows"))) if len(bins) else None
    return {"titles": titles, "rows": rows, "test": test, "bars": bars, "axis_end": 0.5 + scale, "reliability": reliability}


def training(work: Work) -> dict[str, Any] | None:
    """Plots of the training run, and experts that hardly anything is routed to."""
    if work.curves is None or work.curves.empty:
        return None
    experts = sorted((name for name in work.curves.columns if name.startswith("expert_")), key=lambda name: int(name.removeprefix("expert_")))
    last = work.curves[experts].dropna().tail(max(1, len(work.curves) // 10)).mean()
    fair = 1 / max(len(experts), 1)
    return {
        "conversion": plots.plot_conversion_loss(work.curves),
        "alignment": plots.plot_alignment_loss(work.curves),
        "total": plots.plot_total_loss(work.curves),
        "experts": plots.plot_expert_use(work.curves, experts) if experts else None,
        "idle": [phrase(name) for name in experts if last[name] < fair / 10],
        "steps": int(work.curves["step"].max()),
        "examples": work.curves["examples"].max() if "examples" in work.curves else None,
    }


def retrieval_ids(work: Work) -> set[str]:
    """Listings that the retrieval section shows."""
    return {name for query in _chosen_queries(work) for name in (query["item_id"], *(result["item_id"] for result in query["results"]))}


def _chosen_queries(work: Work) -> list[dict[str, Any]]:
    chosen = []
    for direction in ("image_to_text", "text_to_image"):
        chosen += [query for query in work.retrieval or [] if query["direction"] == direction][:QUERIES_PER_DIRECTION]
    return chosen


def retrieval(work: Work, card: Callable[..., Card]) -> list[Query]:
    """The retrieval queries with photos."""
    return [
        Query(
            direction=query["direction"],
            card=card(query["item_id"]),
            results=[card(result["item_id"], note=f"cosine {result['cosine']:.2f}", good=bool(result["same_product"])) for result in query["results"][:5]],
        )
        for query in _chosen_queries(work)
    ]


def read_mismatches(work: Work) -> tuple[pd.DataFrame, dict[str, int], int] | None:
    """Flagged listings, worst first (item_id, ita, tia, cosine, mismatch); listings by flag; all listings. None without scores."""
    manifest = work.manifests.get("score")
    if manifest is None or not manifest.paths("listing_quality"):
        return None
    flags: dict[str, int] = {}
    worst: list[pd.DataFrame] = []
    listings = 0
    for table in read_columns(manifest.paths("listing_quality"), ["item_id", "ita", "tia", "cosine", "mismatch", "flags"]):
        listings += table.num_rows
        for entry in pc.value_counts(pc.list_flatten(table["flags"])).to_pylist():
            flags[entry["values"]] = flags.get(entry["values"], 0) + entry["counts"]
        rows = pc.list_parent_indices(table["flags"]).filter(pc.equal(pc.list_flatten(table["flags"]), "mismatch"))
        frame = table.drop_columns(["flags"]).take(pa.chunked_array(rows.chunks, pa.int64())).to_pandas()
        worst.append(frame.nlargest(MISMATCHES, "mismatch"))
    frame = pd.concat(worst).sort_values(["mismatch", "item_id"], ascending=[False, True]).head(MISMATCHES)
    return frame, dict(sorted(flags.items(), key=lambda pair: -pair[1])), listings


def mismatch_cards(frame: pd.DataFrame, card: Callable[..., Card]) -> list[Card]:
    """Flagged listings with what the model makes of them."""
    rows = zip(frame["item_id"], frame["ita"], frame["tia"], frame["mismatch"], strict=True)
    return [card(item, note=f"mismatch {mismatch:.2f}", good=False) for item, _, _, mismatch in rows]


def choose_stores(digest: ScoreDigest) -> tuple[pd.DataFrame, list[str], list[str]]:
    """Best listings of all stores, the stores shown with photos (those with the most scored pairs), and those only listed."""
    best = top_by_store(digest, ITEMS_PER_STORE)
    pairs = digest.stores.groupby("store_id")["rows"].sum().sort_index().sort_values(ascending=False, kind="stable")
    with_photos = sorted(pairs.index[:STORES_WITH_PHOTOS])
    return best, with_photos, sorted(pairs.index[STORES_WITH_PHOTOS : STORES_WITH_PHOTOS + STORES_LISTED])


def stores(best: pd.DataFrame, names: list[str], items: int, card: Callable[..., Card]) -> list[Store]:
    """The first `items` listings of some stores."""
    groups = dict(list(best[best["place"] <= items].groupby("store_id")))
    return [
        Store(store_id=name, cards=[card(item, note=f"{cvr:.1%}") for item, cvr in zip(groups[name]["item_id"], groups[name]["cvr"], strict=True)])
        for name in names
    ]


def drift_words(drift: Drift) -> tuple[str, str]:
    """('ok' | 'warn' | 'bad', what the stability index says in words)."""
    if drift.psi < _CALM_PSI:
        return "ok", "The scores are spread as they were last night."
    if drift.psi <= _LARGE_PSI:
        return "warn", "The scores have moved somewhat since last night, within what publication allows."
    return "bad", "The scores have moved a lot since last night: look at what changed in the inputs before you rely on them."


def timings(work: Work) -> list[dict[str, Any]]:
    """Stages with their seconds, rows and speed; `share` is of the longest."""
    longest = max((manifest.seconds for manifest in work.manifests.values()), default=0.0) or 1.0
    trained = (work.metrics or {}).get("train", {})
    found = []
    for stage, manifest in work.manifests.items():
        rows = manifest.summary.get("rows_in")
        speed = rows / manifest.seconds if rows and manifest.seconds else None
        if stage == "train" and trained.get("examples_per_second"):
            rows, speed = None, trained["examples_per_second"]
        found.append(
            {
                "title": STAGE_TITLES[stage],
                "stage": stage,
                "seconds": manifest.seconds,
                "share": manifest.seconds / longest,
                "rows": rows,
                "speed": speed,
                "unit": "examples" if stage == "train" else "rows",
                "images": manifest.summary.get("encoded_images"),
                "titles": manifest.summary.get("encoded_titles"),
                "summary": manifest.summary,
            }
        )
    return found


def encoders(work: Work) -> list[dict[str, Any]]:
    """The encoders of the embedding store; `untrained` where the weights are random."""
    manifest = work.manifests.get("embed")
    if manifest is None:
        return []
    titles = {"image": "Photos: InceptionV4", "text": "Titles: BERT"}
    found = []
    for name, title in titles.items():
        spec = manifest.options.get(name, {})
        description = str(spec.get("description", "not recorded"))
        found.append({"title": title, "description": description, "untrained": str(spec.get("source", description)).startswith("random:"), "fingerprint": spec.get("fingerprint", "")})
    return found


def commands(work: Work) -> list[str]:
    """What to type to get these runs again, from the options in their manifests."""
    found = [repeat_command(stage, work.manifests[stage]) for stage, _ in STAGES if stage in work.manifests]
    return [*found, f"camenn report --run {shlex.quote(work.root)}"]


def repeat_command(stage: str, manifest: Manifest) -> str:
    """One stage's command line. Options that a manifest keeps are named as their flags, but for the encoders of `embed`."""
    options = dict(manifest.options)
    if stage == "embed":
        image, text = options.pop("image", {}), options.pop("text", {})
        options |= {"image_weights": image.get("source"), "text_encoder": text.get("source"), "grid": image.get("grid"), "patch_size": image.get("patch_size")}
        options |= {"max_tokens": text.get("max_tokens"), "device": image.get("device"), "precision": image.get("precision")}
    words = ["camenn", stage]
    for name, value in options.items():
        if value is True:
            words.append(f"--{name}")
        elif value is not None and value is not False and isinstance(value, str | int | float):
            words += [f"--{name}", shlex.quote(str(value))]
    return " ".join(words)
