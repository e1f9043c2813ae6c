"""Declare the flags that stages share.

All other flags go to Beam unchanged.
"""

import argparse
import difflib
from typing import Any

JOB_SERVER_OPTIONS = (
    "parallelism",
    "max_parallelism",
    "checkpointing_interval",
    "object_reuse",
    "state_backend",
    "execution_mode_for_batch",
)
"""Options that Flink's job server announces only when a job is submitted. Python's parsers do not know them."""


def add_encoder_flags(parser: argparse.ArgumentParser) -> None:
    """Add flags for the encoders and their inputs.

    `embed` runs them, `doctor` looks for them.
    """
    parser.add_argument(
        "--image_weights",
        default="timm/inception_v4.tf_in1k",
        help=(
            "photo encoder: hub name of a timm model, .safetensors file or its directory, or random:SEED (default "
            "%(default)s)"
        ),
    )
    parser.add_argument(
        "--image_model",
        help=(
            "architecture of --image_weights, a name of timm.list_models() (default: what config.json beside the "
            "weights says, else inception_v4)"
        ),
    )
    parser.add_argument(
        "--text_encoder",
        default="google-bert/bert-base-uncased",
        help="title encoder, BERT or another of transformers' encoders: hub name or directory (default %(default)s)",
    )
    parser.add_argument(
        "--grid", type=int, default=8, help="patches per side of a photo (default %(default)s: 64 patches)"
    )
    parser.add_argument(
        "--patch_size",
        type=int,
        help="pixels per side of a patch (default: 75, or the photo encoder's own where it takes no others)",
    )
    parser.add_argument("--max_tokens", type=int, default=32, help="tokens kept of a title (default %(default)s)")


def add_json_flag(parser: argparse.ArgumentParser) -> None:
    """Add `--json`, which every command has."""
    parser.add_argument(
        "--json", action="store_true", help="print the closing table as one JSON object on the last line of stdout"
    )


def add_common_flags(parser: argparse.ArgumentParser) -> None:
    """Add `--json` and `--max_reject_rate`.

    Every stage that reads tables has them.
    """
    add_json_flag(parser)
    parser.add_argument(
        "--max_reject_rate",
        type=float,
        default=0.01,
        help="share of a table's rows that may be rejected before the run stops (default %(default)s)",
    )


def new_parser(stage: str, description: str) -> argparse.ArgumentParser:
    """Make a stage's parser.

    Abbreviated flags are refused: they would shadow Beam's.
    """
    return argparse.ArgumentParser(
        prog=f"camenn {stage}",
        description=description,
        allow_abbrev=False,
        epilog="Flags not listed here go to Apache Beam unchanged.",
    )


def parse_with_beam(parser: argparse.ArgumentParser, argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Parse a stage's flags.

    Returns them and the flags for Beam. A flag unknown to both ends the program with a suggestion.
    """
    arguments, rest = parser.parse_known_args(argv)
    # Beam takes seconds to import: not for `--help`, nor for a flag of ours that is wrong.
    from pipelines.runner.beam import check_runner, option_classes

    beam_parser: Any = argparse.ArgumentParser(add_help=False, allow_abbrev=False, conflict_handler="resolve")
    for options in option_classes():
        options._add_argparse_args(beam_parser)
    for name in JOB_SERVER_OPTIONS:
        beam_parser.add_argument(f"--{name}")
    _, unknown = beam_parser.parse_known_args(rest)
    if unknown:
        known = [flag for p in (parser, beam_parser) for action in p._actions for flag in action.option_strings]
        near = difflib.get_close_matches(unknown[0].split("=")[0], known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        parser.error(f"unknown argument {unknown[0]}{hint} (neither camenn nor Apache Beam has it)")
    check_runner(rest)
    return arguments, rest
