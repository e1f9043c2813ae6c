"""`camenn shards`: flags, checks, closing table."""

import argparse
import sys

from pipelines.runner.exit_codes import run_main
from pipelines.runner.flags import add_common_flags, new_parser, parse_with_beam


def build_parser() -> argparse.ArgumentParser:
    """Build the parser with the flags of `camenn shards`."""
    parser = new_parser("shards", "Label clicks, add as-of features, and write a self-contained training shard set.")
    parser.add_argument(
        "--data", required=True, help="data directory with catalog, clicks, orders and, optionally, users and stores"
    )
    parser.add_argument("--store", required=True, help="embedding store that `camenn embed` wrote")
    parser.add_argument("--out", required=True, help="shard set; made if it is not there")
    parser.add_argument(
        "--attribution_hours",
        type=float,
        default=24.0,
        help="an order within so many hours after a click is credited to it (default %(default)s)",
    )
    parser.add_argument("--history", type=int, default=100, help="entries of a user's history (default %(default)s)")
    parser.add_argument("--as_of", help="read nothing after this time, UTC (default: the smaller of both logs' ends)")
    parser.add_argument(
        "--timezone",
        default="UTC",
        help="IANA zone of stores that the table `stores` does not name (default %(default)s)",
    )
    parser.add_argument(
        "--test_share",
        type=float,
        default=0.2,
        help="share of clicks, the last by time, in the test part (default %(default)s)",
    )
    parser.add_argument(
        "--late_days",
        type=float,
        default=2.0,
        help=(
            "days after a day's last attribution window until its labels are final and later runs keep it as it "
            "is (default %(default)s)"
        ),
    )
    parser.add_argument("--plan", action="store_true", help="print what a run would read and build, and build nothing")
    parser.add_argument("--rerun", action="store_true", help="run again although neither inputs nor flags changed")
    parser.add_argument(
        "--rebuild", action="store_true", help="build all days again, also final ones; the manifest records it"
    )
    add_common_flags(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Parse the flags, run and print."""
    a, beam_flags = parse_with_beam(build_parser(), argv)
    from pipelines.io import files
    from pipelines.runner.console import closing_table
    from pipelines.shards.options import STAGE, ShardOptions, check_flags
    from pipelines.shards.stage import plan, run

    options = ShardOptions(
        data=files.absolute(a.data),
        store=files.absolute(a.store),
        out=files.absolute(a.out),
        attribution_hours=a.attribution_hours,
        history=a.history,
        as_of=a.as_of,
        timezone=a.timezone,
        test_share=a.test_share,
        max_reject_rate=a.max_reject_rate,
        late_days=a.late_days,
    )
    check_flags(options)
    if a.plan:
        summary = plan(options, beam_flags, rebuild=a.rebuild)
    else:
        summary = run(options, beam_flags, rerun=a.rerun, rebuild=a.rebuild)
    closing_table(STAGE, summary, as_json=a.json)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
