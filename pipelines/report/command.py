"""`camenn report`: flags."""

import argparse
import sys

from pipelines.runner.exit_codes import run_main
from pipelines.runner.flags import add_json_flag, new_parser
from schemas.errors import InputError


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of `camenn report`."""
    parser = new_parser("report", "Write one self-contained HTML page about a working directory.")
    # Nothing here runs on Beam.
    parser.epilog = None
    parser.add_argument(
        "--run",
        metavar="WORK",
        required=True,
        help="working directory that holds store/, shards/, model/, scores/ and metrics.json, as far as they are made",
    )
    parser.add_argument("--out", help="directory for index.html (default: WORK/report)")
    add_json_flag(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Parse, run and print."""
    arguments = build_parser().parse_args(argv)
    if not arguments.run:
        raise InputError("--run: the working directory is empty text. Give its path.")
    from pipelines.io import files
    from pipelines.report.page import COMMAND, ReportOptions, run
    from pipelines.runner.console import closing_table

    options = ReportOptions(run=arguments.run, out=arguments.out or files.join(arguments.run, "report"))
    closing_table(COMMAND, run(options), as_json=arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
