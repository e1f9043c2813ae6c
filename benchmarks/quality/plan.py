"""The plan of models and their training logs.

It is ordered: seed 0 of everything comes first, so that a table is complete early.
"""

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.quality.job import FROZEN, POPULARITY, TUNED, Job
from benchmarks.quality.worlds import World

PARTS = ("city", "real", "controls", "ablations", "log")
CITY_MODELS = ("full", "layers", "no_content", "displayed", "no_alignment", "no_ids", FROZEN, POPULARITY, *TUNED)
REAL_MODELS = ("full", "no_alignment", "no_history", FROZEN, POPULARITY, *TUNED)
LOG_MODELS = (
    "full",
    "lightgbm",
    "direct_parts",
    "layers",
    "no_target_attention",
    "one_expert",
    "dense_gate",
    "no_history",
    "no_alignment",
    POPULARITY,
    "lightgbm_plain",
    "mmoe",
)
LOG_HISTORY = 400
"""Entries of a history in the full log, for all models"""
LOG_PARTS = (16, 4)
"""Parts of the full log that are learned from for the learning curve, of CameNN and LightGBM"""
OTHER_HALF = ("full", "lightgbm", "direct_parts")
TRIED_ON = 0.25
"""Share of the full log that baselines are tuned on"""
ABLATIONS = (
    "full",
    "no_alignment",
    "no_ita",
    "no_tia",
    "no_contrastive",
    "no_agreement",
    "no_choice",
    "no_images",
    "no_text",
    "layers",
    "dense_gate",
    "one_expert",
    "no_history",
    "full_attention",
    "gate_without_content",
)
CONTROLS = ("permuted_labels", "shuffled_patches", "shuffled_alignment")
SMALL_CITY: dict[str, Any] = {"clicks": 60_000, "listings": 3_000, "stores": 30, "users": 450, "photos": 2_000}
"""The ablations' city"""
WORTHLESS: dict[str, Any] = {
    "content_weight": 0.0,
    "order_mismatch": 0.0,
    "click_bad_image": 0.0,
    "click_bad_text": 0.0,
    "classes": 42,
}
"""The control in which content has no effect: photos and titles change no click and no order. A
class is a subcategory, which every model knows: with more classes, photos and titles would identify
the class."""
HISTORY = 50
"""Entries of a history, for all models: users have more than a hundred clicks each"""
QUICK_CITY: dict[str, Any] = {}
QUICK_EPOCHS = 3
"""Epochs in the demo's city: with fewer steps nothing is learned yet"""
QUICK_MODELS = ("full", "permuted_labels", POPULARITY, "lightgbm")
QUICK_TRIALS = 3


def full_log(arguments: argparse.Namespace, half: str) -> World:
    """Return one half of the households' full log, which `examples.complete_journey` made."""
    return world(arguments, f"log_{half}", None, data=getattr(arguments, f"log_{half}"), history=LOG_HISTORY)


def world(
    arguments: argparse.Namespace,
    name: str,
    city: dict[str, Any] | None,
    preset: str = "default",
    *,
    data: Path | None = None,
    history: int = HISTORY,
) -> World:
    """Return a log with the encoders of the command line.

    Where there is no city, it is a data directory: the real log's, or the given one.
    """
    real = city is None
    return World(
        name=name,
        work=str(arguments.work),
        preset=preset,
        city=city,
        data_directory=str(data or arguments.real) if real else None,
        image_root=str(arguments.image_root) if real and arguments.image_root else None,
        image_weights=arguments.image_weights,
        text_encoder=arguments.text_encoder,
        flags={"shards": ["--history", str(history)]},
    )


def list_jobs(arguments: argparse.Namespace) -> list[Job]:
    """List all requested jobs, in order."""
    if arguments.quick:
        jobs = [
            Job(world=world(arguments, "quick", QUICK_CITY, "demo"), model=model, seed=0, epochs=QUICK_EPOCHS)
            for model in QUICK_MODELS
        ]
        if arguments.real:
            jobs += [
                Job(world=world(arguments, "real", None), model=model, seed=0, epochs=arguments.real_epochs)
                for model in ("full", "lightgbm")
            ]
        trials = QUICK_TRIALS
    else:
        jobs, trials = sorted(_jobs(arguments), key=lambda job: job.seed), arguments.trials
    return [replace(job, trials=trials, results=str(arguments.results or "")) for job in jobs]


def _jobs(arguments: argparse.Namespace) -> Iterator[Job]:
    epochs = arguments.epochs
    for seed in range(arguments.seeds):
        if "city" in arguments.parts:
            city = world(arguments, f"city{seed}", {"seed": seed})
            for model in CITY_MODELS:
                yield Job(world=city, model=model, seed=seed, epochs=epochs)
        if "real" in arguments.parts and arguments.real:
            real = world(arguments, "real", None)
            for model in REAL_MODELS:
                yield Job(world=real, model=model, seed=seed, epochs=arguments.real_epochs)
    if "log" in arguments.parts:
        yield from _log_jobs(arguments)
    for seed in range(min(arguments.seeds, arguments.ablation_seeds)):
        small = world(arguments, f"small{seed}", {**SMALL_CITY, "seed": seed})
        if "controls" in arguments.parts:
            empty = world(arguments, f"worthless{seed}", {**SMALL_CITY, **WORTHLESS, "seed": seed})
            clean = world(arguments, f"clean{seed}", {**SMALL_CITY, "seed": seed, "corruption": 0.0})
            for where, models in (
                (small, ("full", *CONTROLS)),
                (empty, ("full", "no_content")),
                (clean, ("full", "no_alignment")),
            ):
                for model in models:
                    yield Job(world=where, model=model, seed=seed, epochs=epochs)
        if "ablations" in arguments.parts:
            for model in ABLATIONS:
                if model != "full" or "controls" not in arguments.parts:
                    yield Job(world=small, model=model, seed=seed, epochs=epochs)


def _log_jobs(arguments: argparse.Namespace) -> Iterator[Job]:
    if arguments.log_a:
        log = full_log(arguments, "a")
        for seed in range(min(arguments.seeds, arguments.ablation_seeds)):
            for model in LOG_MODELS:
                yield Job(world=log, model=model, seed=seed, tuned_on=TRIED_ON)
        for part in LOG_PARTS:
            for model in ("full", "lightgbm"):
                yield Job(world=log, model=model, seed=0, part=part, tuned_on=TRIED_ON)
    if arguments.log_b:
        for model in OTHER_HALF:
            yield Job(world=full_log(arguments, "b"), model=model, seed=0, tuned_on=TRIED_ON)
