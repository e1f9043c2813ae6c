"""`camenn publish`: let readers see a finished run."""

import argparse
import sys

from pipelines.runner.exit_codes import run_main
from pipelines.runner.flags import add_json_flag


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of `camenn publish`."""
    parser = argparse.ArgumentParser(
        prog="camenn publish",
        description="Let readers see a finished run: one that its gates kept from readers, or an earlier one.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "run", metavar="OUT/runs/RUN", help="the run's directory, as in WORK/scores/runs/20260131T020000-1a2b3c"
    )
    parser.add_argument("--force", action="store_true", help="although its gates failed")
    parser.add_argument("--reason", metavar="TEXT", help="kept beside the publication; --force needs one")
    add_json_flag(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Parse, publish and print."""
    arguments = build_parser().parse_args(argv)
    from pipelines.runner.console import closing_table
    from pipelines.runs.publication import republish

    summary = republish(arguments.run, force=arguments.force, reason=arguments.reason)
    closing_table("publish", summary, as_json=arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
