"""Run a command and turn errors into exit codes."""

import os
import sys
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Any, Self

from pipelines.runner.log import set_up_logging
from schemas.errors import InputError


class ExitCode(IntEnum):
    """The codes that `camenn` commands end with.

    docs/reference/exit_codes.md is generated from it.
    """

    meaning: str
    """What happened"""
    remedy: str
    """What to do about it"""

    def __new__(cls, value: int, meaning: str, remedy: str) -> Self:
        """Make a code with its two sentences."""
        code = int.__new__(cls, value)
        code._value_, code.meaning, code.remedy = value, meaning, remedy
        return code

    OK = 0, "The command did what it is for.", "Nothing."
    UNEXPECTED_ERROR = (
        1,
        "A bug or a crash, with a traceback. Of `camenn doctor`: something essential is missing.",
        "Run again, and report it if it comes back. Of `doctor`: follow the line below each `fail`.",
    )
    INPUT_ERROR = (
        2,
        "Something that you can fix: a table, a column, a flag, a damaged file, a full disk.",
        "Read the message, which names file, column and remedy. Fix it, then run again.",
    )
    GATED = (
        3,
        "A run is finished, but not published: a gate failed, or the new model of `train --challenge` lost to "
        "the published one. Readers keep the run before.",
        "Look at the run and fix what the gate names, or `camenn publish OUT/runs/RUN --force --reason TEXT`. "
        "After a challenge that was lost: nothing, the published model stays.",
    )
    BUSY = 4, "Another night is running in the same work directory.", "Nothing: that night goes on."
    STALE = (
        5,
        "The night went well, but the published scores are older than `keep.stale_hours`.",
        "Check that catalog and logs still arrive.",
    )
    INTERRUPTED = 130, "Ended by Ctrl-C (128 + SIGINT).", "Run again: committed work is used."
    BROKEN_PIPE = 141, "The reader of a pipe has gone, as `head` does (128 + SIGPIPE).", "Nothing."
    TERMINATED = (
        143,
        "Ended by SIGTERM (128 + SIGTERM). `camenn nightly` writes its record first and ends with 1.",
        "Run again: committed work is used.",
    )


FURTHER_CODES = {
    "embed": (ExitCode.GATED,),
    "train": (ExitCode.GATED,),
    "score": (ExitCode.GATED,),
    "nightly": (ExitCode.GATED, ExitCode.BUSY, ExitCode.STALE),
}
"""Codes that not every command ends with, by command"""


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
        return ExitCode.GATED
    except Exception as error:
        from pipelines.io.errors import input_error_behind

        cause = input_error_behind(error, given)
        if cause is None:
            raise
        print(f"camenn: error: {cause}", file=sys.stderr)
        return ExitCode.INPUT_ERROR


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
