"""Run a command and turn errors into exit codes."""

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from pipelines.runner.log import set_up_logging
from schemas.errors import InputError

USER_ERROR, GATES_FAILED = 2, 3
"""Exit codes: what the user can fix, and a finished run that its gates keep from readers"""
UNFORESEEN, BUSY, STALE = 1, 4, 5
"""Exit codes of a night: a bug or a crash, another night is running, the published scores are older than they may be"""


class GatesFailed(Exception):
    """A finished and whole run whose gates failed.

    Readers keep what was published before.
    """


class DryRun(Exception):
    """A job that was built and not submitted.

    `--dry_run=True` asked for it. `job`: what the runner would have submitted.
    """

    def __init__(self, job: Any) -> None:
        super().__init__("the job was built and not submitted")
        self.job = job


def run_main(main: Callable[[list[str] | None], int], argv: list[str] | None = None) -> int:
    """Run a command and return its exit code.

    What the user can fix is one message on stderr and exit code 2, a run that its gates hold back
    3, everything else a traceback.
    """
    set_up_logging()
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
    except GatesFailed as held:
        print(f"camenn: gated: {held}", file=sys.stderr)
        return GATES_FAILED
    except Exception as error:
        from pipelines.io.errors import input_error_behind

        cause = input_error_behind(error, given)
        if cause is None:
            raise
        print(f"camenn: error: {cause}", file=sys.stderr)
        return USER_ERROR


def refuse_not_utf8(words: Sequence[str]) -> None:
    """Refuse a command line that is not UTF-8.

    Tables and documents could not name such a word.

    Raises:
        InputError: a word of the command line is not UTF-8.
    """
    for word in words:
        try:
            word.encode()
        except UnicodeEncodeError as error:
            shown = os.fsencode(word).decode(errors="backslashreplace")
            raise InputError(
                f"{shown}: the path or flag is not UTF-8. Give the file or directory another name."
            ) from error
