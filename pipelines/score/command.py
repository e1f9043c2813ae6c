"""`camenn score`: flags and closing table."""

import argparse
import sys

from pipelines.runner.exit_codes import run_main
from pipelines.runner.flags import add_common_flags, new_parser, parse_with_beam
from schemas.errors import InputError


def build_parser() -> argparse.ArgumentParser:
    """Build the parser with the flags of `camenn score`."""
    parser = new_parser(
        "score", "Score listings for an audience as of a date, judge the listings' photos and titles, and publish both."
    )
    parser.add_argument(
        "--data",
        required=True,
        help="data directory with catalog, clicks, orders and, optionally, users, stores, audience, candidates",
    )
    parser.add_argument("--store", required=True, help="embedding store that `camenn embed` wrote")
    parser.add_argument("--model", required=True, help="model directory that `camenn train` wrote")
    parser.add_argument("--out", required=True, help="scores; made if it is not there")
    parser.add_argument(
        "--score_date",
        help="score as of this date's start, UTC; nothing at or after it is read (default: the day after the logs end)",
    )
    parser.add_argument(
        "--top_k", type=int, default=100, help="listings kept for each audience row, 0 = all (default %(default)s)"
    )
    parser.add_argument(
        "--precision",
        default="fp32",
        choices=("fp32", "bf16"),
        help=(
            "bf16: listings that cannot be among the top_k are computed in bfloat16 only, which pays for profile "
            "`base` where the processor multiplies in it; what is published is computed in fp32 (default "
            "%(default)s)"
        ),
    )
    parser.add_argument(
        "--audience",
        default="auto",
        choices=("auto", "stores", "users"),
        help=(
            "auto: the table `audience` or else stores; stores: every store at every 4-hour bucket; users: those "
            "active in the last 28 days (default %(default)s)"
        ),
    )
    parser.add_argument(
        "--timezone",
        default="UTC",
        help="IANA zone of stores that the table `stores` does not name (default %(default)s)",
    )
    parser.add_argument(
        "--shards",
        help=(
            "shard set that `camenn shards` wrote: the model must be calibrated on its latest closed days, or "
            "the night is gated (default: not checked)"
        ),
    )
    parser.add_argument(
        "--plan",
        action="store_true",
        help="print how many pairs a run would score and how long that takes, and score nothing",
    )
    parser.add_argument("--rerun", action="store_true", help="score again although neither inputs nor flags changed")
    add_common_flags(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Parse the flags, run and print."""
    a, beam_flags = parse_with_beam(build_parser(), argv)
    if a.top_k < 0:
        raise InputError(f"--top_k {a.top_k}: must be 0 (all) or more.")
    if a.precision == "bf16" and a.top_k == 0:
        raise InputError(
            "--precision bf16 saves nothing where all listings are published: give --top_k 1 or more, or leave it out."
        )
    from pipelines.io import files
    from pipelines.runner.console import closing_table
    from pipelines.score.inputs import STAGE, ScoreOptions
    from pipelines.score.stage import plan, run

    options = ScoreOptions(
        data=files.absolute(a.data),
        store=files.absolute(a.store),
        model=files.absolute(a.model),
        out=files.absolute(a.out),
        score_date=a.score_date,
        top_k=a.top_k,
        audience=a.audience,
        precision=a.precision,
        timezone=a.timezone,
        max_reject_rate=a.max_reject_rate,
        shards=files.absolute(a.shards) if a.shards else None,
    )
    summary = plan(options, beam_flags) if a.plan else run(options, beam_flags, rerun=a.rerun)
    closing_table(STAGE, summary, as_json=a.json)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
