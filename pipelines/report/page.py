"""Write one HTML page about a working directory: `camenn report`.

The page is self-contained. It shows what came in, what was learned, and what was scored.
"""

import base64
import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jinja2
from markupsafe import Markup

from pipelines.io import clock, files
from pipelines.report import (
    labels,
    listing_details,
    section_accounting,
    section_listings,
    section_model,
    section_nights,
    section_runs,
)
from pipelines.report.data import Item, Work, read_items, read_work
from pipelines.report.labels import count, duration, number, percent, signed
from pipelines.report.photos import Photo, Photos
from pipelines.report.plots import plot_deciles, plot_trend
from pipelines.report.scores import ScoreDigest, compare_nights, digest_scores
from pipelines.runner.console import NO_ROWS
from pipelines.runs.manifest import versions
from pipelines.stages import OUTPUT_FOLDERS, STAGES

COMMAND = "report"
PAGE = "index.html"


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """One report: the working directory, and where the page goes."""

    run: str
    out: str


def missing_commands(root: str) -> dict[str, str]:
    """Return the commands that produce the sections' missing sources."""
    store, shards, model, scores = (files.join(root, folder) for folder in OUTPUT_FOLDERS.values())
    return {
        "embed": f"camenn embed --data DATA --store {store}",
        "shards": f"camenn shards --data DATA --store {store} --out {shards}",
        "train": f"camenn train --shards {shards} --out {model}",
        "baselines": f"python -m benchmarks.baselines --shards {shards} --model {model} --out "
        f"{files.join(root, 'metrics.json')}",
        "score": f"camenn score --data DATA --store {store} --model {model} --out {scores}",
    }


def headline(work: Work, context: dict[str, Any], digest: ScoreDigest | None) -> list[dict[str, str]]:
    """Build the figures at the top of the page.

    Each has label, value, a note, and the note's tone.
    """
    found = []
    metrics = work.metrics or {}
    test = metrics.get("test", {})
    if test.get("auc") is not None:
        rivals = {
            name: values["auc"]
            for name, values in metrics.get("baselines", {}).items()
            if values.get("auc") is not None
        }
        note, tone = "no baseline to compare with", ""
        if rivals:
            rival = max(rivals, key=lambda name: rivals[name])
            gain = test["auc"] - rivals[rival]
            note, tone = (
                f"{signed(gain)} against {labels.BASELINE_TITLES.get(rival, rival)}",
                "up" if gain > 0 else "down",
            )
        found.append({"label": "AUC on unseen clicks", "value": number(test["auc"], 3), "note": note, "tone": tone})
    if test.get("pcoc") is not None:
        found.append(
            {
                "label": "Predicted for each bought",
                "value": number(test["pcoc"], 2),
                "note": "1.00 is right on average",
                "tone": "",
            }
        )
    recall = (metrics.get("representation") or {}).get("image_to_text", {}).get("r_at_5")
    if recall is not None:
        found.append(
            {"label": "Photo finds its title", "value": percent(recall, 0), "note": "among the first five", "tone": ""}
        )
    if "embed" in work.manifests:
        summary = work.manifests["embed"].summary
        found.append(
            {
                "label": "Listings",
                "value": count(summary.get("rows_out")),
                "note": f"{count(summary.get('images_in_store'))} different photos",
                "tone": "",
            }
        )
    if context["funnel"]:
        kept = context["funnel"][-1]
        found.append(
            {
                "label": "Training and test examples",
                "value": count(kept.rows),
                "note": f"from {count(context['funnel'][0].rows)} clicks",
                "tone": "",
            }
        )
    if digest is not None:
        pairs = work.manifests["score"].summary.get("pairs", digest.rows)
        found.append(
            {
                "label": "Pairs scored",
                "value": count(pairs),
                "note": f"{count(digest.rows)} published, mean {percent(digest.mean)}",
                "tone": "",
            }
        )
    if context["quality_flags"] is not None:
        flagged = context["quality_flags"]["flags"].get("mismatch", 0)
        share = flagged / max(context["quality_flags"]["listings"], 1)
        found.append(
            {
                "label": "Listings to fix",
                "value": count(flagged),
                "note": f"{percent(share)} of the catalog",
                "tone": "",
            }
        )
    if work.manifests:
        seconds = sum(manifest.seconds for manifest in work.manifests.values())
        found.append(
            {
                "label": "Time, all stages",
                "value": duration(seconds),
                "note": f"{len(work.manifests)} of {len(OUTPUT_FOLDERS)} stages",
                "tone": "",
            }
        )
    return found


def build_context(work: Work, photos: Photos) -> tuple[dict[str, Any], list[str]]:
    """Build everything that the template shows.

    Returns it with the names of the sections that lack their source.
    """
    scores = work.manifests.get("score")
    digest = digest_scores(scores, with_stores=True) if scores and scores.paths("scores") else None
    flagged = section_listings.read_flagged(work)
    wanted = section_listings.retrieval_ids(work)
    if flagged:
        wanted |= set(flagged[0]["item_id"])
    chosen = section_listings.choose_stores(digest) if digest and len(digest.stores) else None
    if chosen:
        wanted |= set(chosen[0]["item_id"])
    items = read_items(work, wanted)
    details = listing_details.read_details(work, wanted)
    shown = section_listings.retrieval_ids(work)
    if flagged:
        shown |= set(flagged[0]["item_id"])
    if chosen:
        shown |= set(chosen[0]["item_id"][chosen[0]["store_id"].isin(chosen[1])])
    photos.read_ahead(items[name].image_uri for name in shown if name in items)

    def card(item_id: str, note: str = "", good: bool | None = None) -> section_listings.Card:
        item = items.get(item_id)
        if item is None:
            return section_listings.Card(
                item=Item(item_id=item_id), photo=Photo(reason="not in the catalog"), note=note, good=good
            )
        photo, detail = photos.find(item.image_uri), details.get(item_id)
        return section_listings.Card(item=item, photo=photo, note=note, good=good, detail=detail)

    drift = drift_from = None
    if digest is not None and work.previous_scores is not None and work.previous_scores.paths("scores"):
        drift, drift_from = (
            compare_nights(digest, digest_scores(work.previous_scores, with_stores=False)),
            work.previous_scores.run,
        )
    shards = work.manifests.get("shards")
    nights = section_nights.published_nights(work)
    context: dict[str, Any] = {
        "name": os.path.basename(work.root.rstrip("/")) or work.root,
        "written": clock.utc_now().strftime("%Y-%m-%d %H:%M UTC"),
        "as_of": str(shards.summary["as_of"])[:16].replace("T", " ")
        if shards and shards.summary.get("as_of")
        else None,
        "stages": [{"name": STAGES[stage].title.lower(), "made": stage in work.manifests} for stage in OUTPUT_FOLDERS],
        "how": missing_commands(work.root),
        "encoders": section_runs.encoders(work),
        "quality": section_model.quality(work),
        "representation": (work.metrics or {}).get("representation"),
        "queries": section_listings.retrieval(work, card),
        "retrieved": work.retrieval is not None,
        "quality_flags": {
            "cards": section_listings.flagged_cards(flagged[0], card),
            "flags": flagged[1],
            "listings": flagged[2],
        }
        if flagged
        else None,
        "flag_words": labels.FLAG_WORDS,
        "stores": section_listings.stores(chosen[0], chosen[1], section_listings.ITEMS_PER_STORE, card)
        if chosen
        else [],
        "store_figures": listing_details.store_figures(work, digest, chosen[1]) if chosen and digest else {},
        "other_stores": _list_stores(chosen, items) if chosen else [],
        "store_count": digest.stores["store_id"].nunique() if digest else 0,
        "scored": scores is not None,
        "drift": drift,
        "drift_from": drift_from,
        "drift_words": section_model.drift_words(drift) if drift else None,
        "decile_plot": plot_deciles(drift.shares) if drift else None,
        "nights": nights,
        "trends": trend_plots(nights),
        "night_rows": section_nights.night_rows(work),
        "gates": section_nights.gate_rows(work),
        "funnel": section_accounting.click_funnel(work),
        "splits": section_accounting.splits(work),
        "accounting": section_accounting.table_accounting(work),
        "reasons": section_accounting.reasons(work),
        "training": section_model.training(work),
        "trained": (work.metrics or {}).get("train", {}),
        "metrics_path": work.metrics_path,
        "timings": section_runs.timings(work),
        "commands": section_runs.commands(work),
        "runs": list(work.manifests.values()),
        "versions": section_runs.version_sets(work),
        "version": versions()["camenn"],
    }
    context["figures"] = headline(work, context, digest)
    sources = {
        "quality": "quality",
        "retrieval": "queries",
        "mismatches": "quality_flags",
        "stores": "stores",
        "drift": "drift",
        "funnel": "funnel",
        "training": "training",
        "timings": "timings",
    }
    return context, [name for name, key in sources.items() if not context[key]]


def trend_plots(nights: list[section_nights.Published]) -> list[dict[str, str]]:
    """Plot each figure that is tracked over the nights.

    Each has title and plot. There are none before the second night.
    """
    if len(nights) < 2:
        return []
    changes = [night.new_model for night in nights]
    figures: list[tuple[str, list[float | None], float | None]] = [
        ("Mean predicted rate, %", [100 * night.mean_cvr for night in nights], None),
        ("Listings", [float(night.listings) for night in nights], None),
        ("Flagged as mismatched, % of listings", [100 * night.mismatched for night in nights], None),
    ]
    pcoc = [night.pcoc for night in nights]
    if any(value is not None for value in pcoc):
        figures.append(("Predicted for each bought, latest closed days", pcoc, 1.0))
    return [
        {"title": title, "plot": plot_trend(values, changes, f"{title}, by night", even=even)}
        for title, values, even in figures
    ]


def _list_stores(chosen: tuple[Any, list[str], list[str]], items: dict[str, Item]) -> list[section_listings.Store]:
    """List stores beyond those with photos.

    They have their first few listings by name, so that no photo is read for them.
    """
    without = Photos(None, allow_absolute=False).find(None)

    def plain(item_id: str, note: str = "") -> section_listings.Card:
        return section_listings.Card(item=items.get(item_id, Item(item_id=item_id)), photo=without, note=note)

    return section_listings.stores(chosen[0], chosen[2], section_listings.NAMES_PER_STORE, plain)


def render(context: dict[str, Any]) -> str:
    """Render the page.

    Every value from a table is escaped. The page's content security policy allows only its own
    script.
    """
    templates = jinja2.PackageLoader("pipelines.report")
    environment = jinja2.Environment(
        loader=templates,
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Callable[..., str]] = {
        "count": count,
        "signed": signed,
        "number": number,
        "percent": percent,
        "duration": duration,
        "phrase": labels.phrase,
        "shown": labels.shown,
    }
    environment.filters.update(filters)
    style, script = (templates.get_source(environment, name)[0] for name in ("report.css", "report.js"))
    script_hash = "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("report.html").render(
        **context, style=Markup(style), script=Markup(script), script_hash=script_hash
    )


def run(options: ReportOptions) -> dict[str, Any]:
    """Write the page and return the closing table."""
    started = time.monotonic()
    work = read_work(options.run)
    embed = work.manifests.get("embed")
    root = embed.options.get("image_root") if embed else None
    photos = Photos(root, allow_absolute=bool(embed and embed.options.get("allow_absolute")))
    context, missing = build_context(work, photos)
    page = render(context).encode()
    path = files.join(options.out, PAGE)
    with files.atomic_write(path, durable=True) as handle:
        handle.write(page)
    return {
        **NO_ROWS,
        "page": path,
        "bytes": len(page),
        "photos": photos.shown(),
        "photos_not_shown": photos.failed(),
        "missing": ", ".join(missing) or "nothing",
        "seconds": round(time.monotonic() - started, 1),
        "out": options.out,
    }
