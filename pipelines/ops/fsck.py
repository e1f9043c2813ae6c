"""`camenn fsck`: flags and closing table."""

import argparse
import sys

from pipelines.runner.exit_codes import ExitCode, run_main
from pipelines.runner.flags import add_json_flag
from schemas.errors import InputError


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of `camenn fsck`."""
    parser = argparse.ArgumentParser(
        prog="camenn fsck",
        description="Read every file of an output, compare it with the checksum that was written with "
        "it, and say what to run again.",
        epilog="exit codes: 0 all is whole; 2 something is lost or damaged: each file and its "
        "remedy is a line on stderr.",
        allow_abbrev=False,
    )
    place = parser.add_mutually_exclusive_group(required=True)
    place.add_argument("--work", help="the working directory, with store/, shards/, model/ and scores/ in it")
    place.add_argument("--out", help="one output, as in WORK/scores")
    parser.add_argument(
        "--repair",
        action="store_true",
        help="set damaged documents and parts of the store aside (`.damaged`), and let "
        "latest.json name the newest run that is whole",
    )
    add_json_flag(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Parse, check and print."""
    a = build_parser().parse_args(argv)
    from pipelines.io import files
    from pipelines.runner.console import closing_table
    from pipelines.runs.fsck import check, find_outputs, is_output

    place = files.absolute(a.work or a.out)
    if a.out and not is_output(place):
        raise InputError(f"--out {place}: nothing was ever published there. Give an output, as in WORK/scores.")
    roots = find_outputs(place) if a.work else [place]
    summary, found = check(roots, place if a.work else None, repairs=a.repair)
    closing_table("fsck", summary, as_json=a.json)
    return ExitCode.INPUT_ERROR if found.damaged else 0


if __name__ == "__main__":
    sys.exit(run_main(main))
