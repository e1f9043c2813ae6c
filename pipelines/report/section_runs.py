"""The report's account of how the runs were made.

It shows time and speed, encoders, versions, and the commands that repeat them.
"""

import shlex
from typing import Any

from pipelines.report.data import Work
from pipelines.runs.manifest import Manifest
from pipelines.stages import OUTPUT_FOLDERS, STAGES

REPEAT_FLAGS = {
    stage: tuple(names.split())
    for stage, names in {
        "embed": "data store image_root allow_absolute image_weights image_model text_encoder grid patch_size "
        "max_tokens device precision max_reject_rate",
        "shards": "data store out attribution_hours history as_of timezone test_share max_reject_rate",
        "train": "shards out profile attention epochs batch_size learning_rate weighting no_alignment "
        "seed device precision",
        "score": "data store model out score_date top_k audience timezone max_reject_rate shards",
    }.items()
}
"""Flags of each stage that can be restored from a manifest's options. A test compares them with the
stages' own parsers."""

_NAMES = {"inception_v4": "InceptionV4", "bert": "BERT"}
"""How papers write the names of architectures"""


def timings(work: Work) -> list[dict[str, Any]]:
    """List stages with their seconds, rows and speed.

    `share` is of the longest.
    """
    longest = max((manifest.seconds for manifest in work.manifests.values()), default=0.0) or 1.0
    trained = (work.metrics or {}).get("train", {})
    found = []
    for stage, manifest in work.manifests.items():
        unit = {"train": "examples", "score": "pairs"}.get(stage, "rows")
        # A stage's work is counted in examples trained on, in pairs scored, or else in rows read.
        rows = {"train": trained.get("examples"), "score": manifest.summary.get("pairs")}.get(
            stage, manifest.summary.get("rows_in")
        )
        speed = rows / manifest.seconds if rows and manifest.seconds else None
        if stage == "train":
            speed = trained.get("examples_per_second")
        found.append(
            {
                "title": STAGES[stage].title,
                "stage": stage,
                "seconds": manifest.seconds,
                "share": manifest.seconds / longest,
                "rows": rows,
                "speed": speed,
                "unit": unit,
                "images": manifest.summary.get("encoded_images"),
                "titles": manifest.summary.get("encoded_titles"),
                "summary": manifest.summary,
            }
        )
    return found


def encoders(work: Work) -> list[dict[str, Any]]:
    """List the encoders of the embedding store.

    One is `untrained` where its weights are random.
    """
    manifest = work.manifests.get("embed")
    if manifest is None:
        return []
    found = []
    for name, title, default in (("image", "Photos", "inception_v4"), ("text", "Titles", "bert")):
        spec = manifest.options.get(name, {})
        # Manifests from before there were other models name none.
        model = str(spec.get("model", default))
        description = str(spec.get("description", "not recorded"))
        found.append(
            {
                "title": f"{title}: {_NAMES.get(model, model)}",
                "description": description,
                "untrained": str(spec.get("source", description)).startswith("random:"),
                "fingerprint": spec.get("fingerprint", ""),
            }
        )
    return found


def version_sets(work: Work) -> list[tuple[str, str]]:
    """List the sets of versions that stages ran with.

    Returns (stages, versions in one line), one entry for all stages that ran with the same
    versions.
    """
    found: dict[str, list[str]] = {}
    for stage, manifest in work.manifests.items():
        found.setdefault(", ".join(f"{name} {value}" for name, value in sorted(manifest.versions.items())), []).append(
            stage
        )
    return [(", ".join(stages), line) for line, stages in found.items()]


def commands(work: Work) -> list[list[str]]:
    """List the commands that repeat these runs.

    They are taken from the options in the runs' manifests.
    """
    found = [repeat_command(stage, work.manifests[stage]) for stage in OUTPUT_FOLDERS if stage in work.manifests]
    return [*found, ["camenn report", f"--run {shlex.quote(work.root)}"]]


def repeat_command(stage: str, manifest: Manifest) -> list[str]:
    """Build one stage's command line.

    It is the command and its flags with their values.
    """
    options = dict(manifest.options)
    if stage == "embed":
        image, text = options.get("image", {}), options.get("text", {})
        options |= {name: image.get(name) for name in ("grid", "patch_size", "device", "precision")}
        options |= {
            "image_weights": image.get("source"),
            "image_model": image.get("named_model") or None,
            "text_encoder": text.get("source"),
            "max_tokens": text.get("max_tokens"),
        }
    if stage == "train":
        options |= {
            "learning_rate": options.get("optimizer", {}).get("learning_rate"),
            "weighting": options.get("loss", {}).get("weighting"),
        }
        options["no_alignment"] = options.get("alignment") is False
    words = [f"camenn {stage}"]
    for name in REPEAT_FLAGS[stage]:
        value = options.get(name)
        if value is True:
            words.append(f"--{name}")
        elif value is not None and value is not False:
            words.append(f"--{name} {shlex.quote(str(value))}")
    return words
