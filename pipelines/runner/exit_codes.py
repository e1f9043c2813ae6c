"""Run a command and turn what went wrong into its exit code."""

import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from schemas.errors import InputError

MENDABLE, HELD_BACK = 2, 3
"""Exit codes: what the user can mend; a finished run that its gates keep from readers"""
UNFORESEEN, BUSY, STALE = 1, 4, 5
"""Exit codes of a night: a bug or a crash; another night is running; the published scores are older than they may be"""


class HeldBack(Exception):
    """A run is finished and whole, and its gates failed: readers keep what was published before."""


class DryRun(Exception):
    """The job was built and, as `--dry_run=True` asked, not submitted. `job`: what the runner would have submitted."""

    def __init__(self, job: Any) -> None:
        super().__init__("the job was built and not submitted")
        self.job = job


def run_main(main: Callable[[list[str] | None], int], argv: list[str] | None = None) -> int:
    """Run a command: what the user can mend is one message on stderr and exit code 2, a run that its gates hold back 3, everything else a traceback."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    # It prints the whole command line of a job server, twice.
    logging.getLogger("apache_beam.utils.subprocess_server").setLevel(logging.ERROR)
    # Encoders come from a path or a hub that the user named; nothing else may reach out.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    given = sys.argv[1:] if argv is None else argv
    try:
        refuse_not_utf8(given)
        return main(argv)
    except DryRun as done:
        print(f"camenn: dry run: {done}; nothing was published", file=sys.stderr)
        return 0
    except HeldBack as held:
        print(f"camenn: held back: {held}", file=sys.stderr)
        return HELD_BACK
    except Exception as error:
        from pipelines.io.errors import input_error_behind

        cause = input_error_behind(error, given)
        if cause is None:
            raise
        print(f"camenn: error: {cause}", file=sys.stderr)
        return MENDABLE


def refuse_not_utf8(words: Sequence[str]) -> None:
    """Raise InputError where a word of the command line is not UTF-8: tables and documents could not name it."""
    for word in words:
        try:
            word.encode()
        except UnicodeEncodeError as error:
            shown = os.fsencode(word).decode(errors="backslashreplace")
            raise InputError(
                f"{shown}: the path or flag is not UTF-8. Give the file or directory another name."
            ) from error
