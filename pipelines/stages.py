"""The registry of stages.

It has each stage's name, command module and output folder in a working directory.

Stages refer to each other by name only. Code that runs, shows or repeats one looks it up here, and
imports its module when needed.
"""

import importlib
from dataclasses import dataclass
from types import ModuleType


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage between tables and scores.

    `command`: module with `build_parser` and `main`.
    """

    name: str
    command: str
    summary: str
    """Its line in `camenn --help`"""
    title: str
    """Its display name, as in the report"""
    folder: str
    """Its output in a working directory"""
    on_beam: bool = True

    def module(self) -> ModuleType:
        """Import the command's module."""
        return importlib.import_module(self.command)


EMBED = Stage(
    name="embed",
    command="pipelines.embed.command",
    summary="encode every distinct photo and title of the catalog, once",
    title="Embed the catalog",
    folder="store",
)
SHARDS = Stage(
    name="shards",
    command="pipelines.shards.command",
    summary="label clicks, add as-of features, write training shards",
    title="Build training shards",
    folder="shards",
)
TRAIN = Stage(
    name="train",
    command="pipelines.train.command",
    summary="train CameNN on a shard set, calibrate it, write a model package",
    title="Train the model",
    folder="model",
    on_beam=False,
)
SCORE = Stage(
    name="score",
    command="pipelines.score.command",
    summary="score the catalog for an audience, and publish",
    title="Score the catalog",
    folder="scores",
)
REPORT = Stage(
    name="report",
    command="pipelines.report.command",
    summary="write one self-contained HTML page about a run",
    title="Report",
    folder="report",
    on_beam=False,
)

STAGES = {stage.name: stage for stage in (EMBED, SHARDS, TRAIN, SCORE, REPORT)}
"""In the order in which they run"""

OUTPUT_FOLDERS = {stage.name: stage.folder for stage in (EMBED, SHARDS, TRAIN, SCORE)}
"""Folders of the stages that publish runs, by stage"""
