"""The report's trends.

They show the runs published night after night, and the outcome of each night.
"""

from dataclasses import dataclass
from typing import Any

from pipelines.io import files
from pipelines.report.data import Work
from pipelines.report.labels import gate_title
from pipelines.runs.manifest import Manifest
from pipelines.runs.night_record import read_nights
from pipelines.runs.publication import publications, published_manifests
from pipelines.stages import STAGES

TREND_NIGHTS = 60
RECORDS_SHOWN = 14
EXIT_WORDS = {
    None: "running, or cut off",
    0: "all is well",
    1: "something unforeseen",
    2: "something to fix",
    3: "gated",
    4: "another night was running",
    5: "published scores too old",
}


@dataclass(frozen=True, kw_only=True)
class Published:
    """One published night of scores."""

    run: str
    at: str
    score_date: str
    model: str
    mean_cvr: float
    listings: int
    rows: int
    mismatched: float
    """Share of listings that are flagged as mismatched"""
    pcoc: float | None
    """Predicted over observed orders on the latest closed days, where a shard set was given"""
    seconds: float
    new_model: bool = False


@dataclass(frozen=True, kw_only=True)
class NightRow:
    """One night, as recorded."""

    number: int
    started: str
    exit_code: int | None
    words: str
    message: str
    seconds: float
    stages: str


@dataclass(frozen=True, kw_only=True)
class GateRow:
    """One gate that a published run was checked by."""

    stage: str
    title: str
    passed: bool
    words: str


def gate_rows(work: Work) -> list[GateRow]:
    """Return the gates of the published runs.

    Those that failed, and were overridden, come first.
    """
    rows = [
        GateRow(stage=STAGES[stage].title, title=gate_title(gate["name"]), passed=gate["passed"], words=gate["words"])
        for stage, manifest in work.manifests.items()
        for gate in manifest.gates
    ]
    return sorted(rows, key=lambda row: row.passed)


def published_nights(work: Work) -> list[Published]:
    """List the published nights of scores, oldest first.

    Nights that were rolled back are left out.
    """
    if "score" not in work.manifests:
        return []
    root = files.join(work.root, "scores")
    times = {entry["run"]: entry["at"] for entry in publications(root)}
    found: list[Published] = []
    for manifest in published_manifests(root, TREND_NIGHTS):
        summary = manifest.summary
        if "mean_cvr" not in summary or "score_date" not in summary:
            continue
        model = str(summary.get("model_version", ""))
        found.append(
            Published(
                run=manifest.run,
                at=times.get(manifest.run, manifest.created_at),
                score_date=summary["score_date"],
                model=model,
                mean_cvr=summary["mean_cvr"],
                listings=summary["listings"],
                rows=summary["rows_out"],
                mismatched=summary.get("flagged_mismatch", 0) / max(summary["listings"], 1),
                pcoc=_pcoc(manifest),
                seconds=manifest.seconds,
                new_model=bool(found) and found[-1].model != model,
            )
        )
    return found


def _pcoc(manifest: Manifest) -> float | None:
    calibration: dict[str, Any] = manifest.summary.get("calibration") or {}
    return calibration.get("pcoc")


def night_rows(work: Work) -> list[NightRow]:
    """List the latest nights, the newest first."""
    found = []
    for record in reversed(read_nights(work.root)[-RECORDS_SHOWN:]):
        stages = record["stages"]
        found.append(
            NightRow(
                number=record["number"],
                started=record["started_at"][:16].replace("T", " "),
                exit_code=record["exit_code"],
                words=EXIT_WORDS.get(record["exit_code"], "not known"),
                message=record["message"],
                seconds=sum(stage["seconds"] for stage in stages),
                stages=", ".join(f"{stage['stage']} {stage['status']}" for stage in stages),
            )
        )
    return found
