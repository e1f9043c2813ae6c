"""Send progress and messages to stderr through `logging`.

Every logger of camenn is below `camenn`: `camenn.shards` logs `shards: text`. Whoever embeds a
stage in a program of their own configures that logger as any other.
"""

import logging
import sys
from typing import TextIO

ROOT = "camenn"


class StderrHandler(logging.StreamHandler[TextIO]):
    """A handler that writes to the present stderr.

    A program may have replaced `sys.stderr` since the handler was made. `layout`: of a line, as
    `logging.Formatter` reads it.
    """

    def __init__(self, layout: str) -> None:
        super().__init__(sys.stderr)
        self.setFormatter(logging.Formatter(layout))

    def emit(self, record: logging.LogRecord) -> None:
        # Not setStream: it would flush the old one, which may be closed.
        self.stream = sys.stderr
        super().emit(record)


class _StageFormatter(logging.Formatter):
    """A format that names the stage alone.

    A record with `at` begins with it: nights are read with the times of their lines.
    """

    def format(self, record: logging.LogRecord) -> str:
        at = getattr(record, "at", "")
        return f"{at}{' ' if at else ''}{record.name.removeprefix(f'{ROOT}.')}: {super().format(record)}"


def set_up_logging() -> None:
    """Send log lines to stderr.

    They are camenn's own from INFO on, and other libraries' from WARNING on. Calling it again
    changes nothing.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    for handler in logging.getLogger().handlers:
        if type(handler) is logging.StreamHandler:
            # They have a handler of their own, below.
            handler.addFilter(_not_ours)
    # It prints the whole command line of a job server, twice.
    logging.getLogger("apache_beam.utils.subprocess_server").setLevel(logging.ERROR)
    ours = logging.getLogger(ROOT)
    ours.setLevel(logging.INFO)
    if not any(isinstance(handler, StderrHandler) for handler in ours.handlers):
        handler = StderrHandler("%(message)s")
        handler.setFormatter(_StageFormatter())
        ours.addHandler(handler)


def _not_ours(record: logging.LogRecord) -> bool:
    return record.name != ROOT and not record.name.startswith(f"{ROOT}.")


def stage_logger(name: str) -> logging.Logger:
    """Return the logger of a stage or command."""
    return logging.getLogger(f"{ROOT}.{name}")
