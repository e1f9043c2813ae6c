"""`camenn simulate`: make a data directory with known truth."""

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from schemas.errors import InputError
from simulator.config import MAX_PHOTOS, PRESETS, CityConfig, preset_config

if TYPE_CHECKING:
    from tqdm import tqdm

    from simulator.generate import CitySummary

_SECONDS_BETWEEN_LINES = 10.0

_SETTINGS = {
    "seed": (int, "the same seed gives the same files"),
    "clicks": (int, "clicks aimed at; a few per cent more or less come out"),
    "listings": (int, "listings of all stores together"),
    "classes": (int, "product classes (with --photos: at most that many)"),
    "stores": (int, "stores"),
    "users": (int, "users"),
    "days": (int, "days; the last fifth are test days"),
    "photo_bank": (int, f"distinct pictures, at most {MAX_PHOTOS}"),
    "photo_pixels": (int, "side of a picture"),
    "content_weight": (float, "weight of visual and text content: 0 removes its effect (a control)"),
    "corruption": (float, "multiplies the stores' corruption rates: 0 spoils nothing (a control)"),
}
"""Flags that set the field of the same name of CityConfig (photo_bank: photos)."""


class ProgressPrinter:
    """A printer of progress.

    It is a live bar on a terminal, and elsewhere a plain line on stderr every ten seconds at most.
    """

    def __init__(self) -> None:
        self._bar: tqdm | None = None
        self._what = ""
        self._last = time.monotonic()

    def __call__(self, what: str, done: int, total: int) -> None:
        """Show that `done` of `total` are done."""
        if sys.stderr.isatty():
            if what != self._what:
                from tqdm import tqdm

                self.close()
                self._bar = tqdm(total=total, desc=what, file=sys.stderr)
            if self._bar is not None:
                self._bar.update(done - self._bar.n)
        elif time.monotonic() - self._last >= _SECONDS_BETWEEN_LINES:
            self._last = time.monotonic()
            print(f"simulate: {what} {done} of {total}", file=sys.stderr, flush=True)
        self._what = what

    def close(self) -> None:
        """End the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def build_parser() -> argparse.ArgumentParser:
    """Build the flags of `camenn simulate`."""
    parser = argparse.ArgumentParser(
        prog="camenn simulate",
        description="Make a simulated city: a data directory (tables and images) with its truth beside it.",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DATA", help="data directory to make; must not exist or be empty"
    )
    parser.add_argument(
        "--preset", choices=sorted(PRESETS), default="default", help="sizes to start from (default: %(default)s)"
    )
    for name, (kind, text) in _SETTINGS.items():
        parser.add_argument(f"--{name}", type=kind, help=f"{text} (default: the preset's)")
    parser.add_argument(
        "--photos", type=Path, metavar="DIR", help="real photos, one sub-folder per class, instead of drawings"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON summary as the last line")
    return parser


def read_config(args: argparse.Namespace) -> CityConfig:
    """Build the configuration from the flags.

    Raises:
        InputError: a value out of range.
    """
    fields = {name: getattr(args, name) for name in _SETTINGS if getattr(args, name) is not None}
    if "photo_bank" in fields:
        fields["photos"] = fields.pop("photo_bank")
    if args.photos is not None:
        fields["photo_folder"] = str(args.photos.resolve())
    return preset_config(args.preset, fields)


def _print_summary(out: Path, summary: "CitySummary", seconds: float) -> None:
    from simulator.truth import LADDER_RUNGS

    ladder = json.loads((out / "truth" / "ladder.json").read_text())["all"]
    print(f"{'what':<32}{'count':>12}  where")
    for name in ("listings", "clicks", "orders", "users", "stores"):
        where = "catalog" if name == "listings" else name
        print(f"{name:<32}{getattr(summary, name):>12,}  {out / where}.parquet")
    print(f"{'photos':<32}{summary.photos:>12,}  {out / 'images'}")
    print(f"{'clicks per exposure':<32}{summary.ctr:>12.4f}")
    print(f"{'orders per click':<32}{summary.cvr:>12.4f}")
    for rung in LADDER_RUNGS:
        print(f"{'expected AUC, ' + rung.replace('_', ' '):<32}{ladder[rung]:>12.4f}  {out / 'truth' / 'ladder.json'}")
    print(f"{'seconds':<32}{seconds:>12.1f}")


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code.

    0 when the data directory is there, 2 when the input does not allow it (the reason is on
    stderr).
    """
    args = build_parser().parse_args(argv)
    # The simulator's libraries take a while: not for `--help`.
    from simulator.generate import generate_city

    started = time.monotonic()
    progress = ProgressPrinter()
    try:
        summary, made = generate_city(args.out, read_config(args), progress)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    finally:
        progress.close()
    if not made:
        print(f"{args.out} already holds this city: nothing to do")
    seconds = time.monotonic() - started
    _print_summary(args.out, summary, seconds)
    if args.json:
        counts = {"rows_in": 0, "rows_out": summary.rows, "rejected": 0, "encoded_images": 0, "encoded_titles": 0}
        figures = {k: v for k, v in asdict(summary).items() if k != "rows"}
        print(json.dumps({**counts, "seconds": round(seconds, 3), "out": str(args.out), "made": made, **figures}))
    return 0
