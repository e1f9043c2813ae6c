"""`camenn nightly`: the stages in order, from one config file. A plain sequence: each stage skips what did not change."""

import argparse
import importlib
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

from pipelines import files
from pipelines.console import closing_table
from pipelines.options import add_json_flag, run_main
from schemas.contract import InputError

STAGES = {
    "embed": "pipelines.embed_catalog",
    "shards": "pipelines.build_shards",
    "train": "pipelines.train_model",
    "score": "pipelines.score_catalog",
    "report": "pipelines.report",
}

EXAMPLE = """\
# camenn nightly --config city.toml
data = "/data/city"     # catalog, clicks, orders and so on
work = "/data/camenn"   # store/, shards/, model/, scores/ and report/ are made in it
train = true            # false: score with the model that is there
beam = []               # flags for Apache Beam, for example ["--direct_num_workers=2", "--direct_running_mode=multi_processing"]

[embed]                 # flags of `camenn embed` beyond --data and --store
grid = 4
max_tokens = 16

[shards]

[train_flags]
profile = "small"

[score]
top_k = 100
"""


def read_config(path: str) -> dict[str, Any]:
    """The config, checked.

    Raises:
        InputError: not there, not TOML, an unknown or missing key.
    """
    try:
        config = tomllib.loads(Path(path).read_text())
    except FileNotFoundError as error:
        raise InputError(f"--config {path}: no such file. `camenn nightly --init` prints one to start from.") from error
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"--config {path}: not TOML: {error}") from error
    known = {
        "data": str,
        "work": str,
        "train": bool,
        "beam": list,
        "embed": dict,
        "shards": dict,
        "train_flags": dict,
        "score": dict,
    }
    for name, value in config.items():
        if name not in known:
            raise InputError(f"--config {path}: unknown key '{name}'. Known ones: {', '.join(known)}.")
        if not isinstance(value, known[name]):
            raise InputError(f"--config {path}: '{name}' must be a {known[name].__name__}.")
    for name in ("data", "work"):
        if name not in config:
            raise InputError(f"--config {path}: '{name}' is missing.")
    return config


def to_flags(values: dict[str, Any]) -> list[str]:
    """A table of the config as flags; a true boolean is the flag alone, a false one is left out."""
    flags = []
    for name, value in values.items():
        if isinstance(value, bool):
            flags += [f"--{name}"] if value else []
        else:
            flags += [f"--{name}", str(value)]
    return flags


def plan(config: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """The night's commands, in order: (stage, flags)."""
    data, work, beam = config["data"], config["work"], [str(flag) for flag in config.get("beam", [])]
    store, shards, model, scores = (files.join(work, name) for name in ("store", "shards", "model", "scores"))
    steps = [("embed", ["--data", data, "--store", store, *to_flags(config.get("embed", {})), *beam])]
    if config.get("train", True):
        steps.append(
            ("shards", ["--data", data, "--store", store, "--out", shards, *to_flags(config.get("shards", {})), *beam])
        )
        steps.append(("train", ["--shards", shards, "--out", model, *to_flags(config.get("train_flags", {}))]))
    steps.append(
        (
            "score",
            [
                "--data",
                data,
                "--store",
                store,
                "--model",
                model,
                "--out",
                scores,
                *to_flags(config.get("score", {})),
                *beam,
            ],
        )
    )
    steps.append(("report", ["--run", work]))
    return steps


def build_parser() -> argparse.ArgumentParser:
    """The flags of `camenn nightly`."""
    parser = argparse.ArgumentParser(
        prog="camenn nightly",
        description="Run embed, shards, train, score and report in order; each does only what changed.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", help="TOML file; see --init")
    parser.add_argument("--init", action="store_true", help="print a config to start from, and stop")
    add_json_flag(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Parse, run the stages until one fails, print."""
    arguments = build_parser().parse_args(argv)
    if arguments.init:
        print(EXAMPLE, end="")
        return 0
    if arguments.config is None:
        raise InputError("--config is missing. `camenn nightly --init` prints a config to start from.")
    config = read_config(arguments.config)
    started = time.monotonic()
    seconds: dict[str, float] = {}
    for stage, flags in plan(config):
        print(f"nightly: {stage}", file=sys.stderr, flush=True)
        began = time.monotonic()
        code = int(importlib.import_module(STAGES[stage]).main(flags))
        seconds[stage] = round(time.monotonic() - began, 1)
        if code:
            print(
                f"nightly: {stage} ended with exit code {code}; what is published is the last good night's",
                file=sys.stderr,
            )
            return code
    from pipelines.manifest import require_latest

    scores = require_latest(files.join(config["work"], "scores"), "score", "work")
    names = ("rows_in", "rows_out", "rejected", "encoded_images", "encoded_titles", "score_date")
    summary = {name: scores.summary[name] for name in names} | {
        "stage_seconds": seconds,
        "seconds": round(time.monotonic() - started, 1),
        "out": config["work"],
    }
    closing_table("nightly", summary, as_json=arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
