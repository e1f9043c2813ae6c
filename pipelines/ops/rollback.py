"""Publish the previous run again: `camenn rollback`.

Readers then see the run that was published before the present one.
"""

import argparse
import sys

from pipelines.runner.exit_codes import run_main
from pipelines.runner.flags import add_json_flag


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of `camenn rollback`."""
    parser = argparse.ArgumentParser(
        prog="camenn rollback",
        description="Let readers see the run that was published before the present one.",
        allow_abbrev=False,
    )
    parser.add_argument("--out", required=True, help="the output, as in WORK/scores")
    parser.add_argument("--reason", metavar="TEXT", help="kept beside the publication")
    add_json_flag(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Parse, roll back and print."""
    arguments = build_parser().parse_args(argv)
    from pipelines.runner.console import closing_table
    from pipelines.runs.publication import rollback

    closing_table("rollback", rollback(arguments.out, arguments.reason), as_json=arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
