"""`camenn gc`: remove what no kept run refers to."""

import argparse
import sys

from pipelines.runner.exit_codes import run_main
from pipelines.runner.flags import add_json_flag
from schemas.manifest import KEEP


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of `camenn gc`."""
    parser = argparse.ArgumentParser(
        prog="camenn gc",
        description="Remove files of an output that no kept run refers to and that are older than 48 hours.",
        allow_abbrev=False,
    )
    parser.add_argument("--out", required=True, help="the output, as in WORK/scores or WORK/store")
    parser.add_argument(
        "--keep", type=int, default=KEEP, help="runs published last that are kept (default %(default)s)"
    )
    parser.add_argument(
        "--retention_days", type=float, help="keep no run that was published longer ago, but the published one"
    )
    parser.add_argument("--dry_run", action="store_true", help="say what would be removed, and remove nothing")
    add_json_flag(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Parse, collect and print."""
    arguments = build_parser().parse_args(argv)
    from pipelines.runner.console import closing_table
    from pipelines.runs.garbage import collect

    summary = collect(arguments.out, arguments.keep, arguments.retention_days, dry_run=arguments.dry_run)
    closing_table("gc", summary, as_json=arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
