"""Parts shared by the benchmarks' commands.

These are lists of names, a working directory, and a description of the machine.
"""

import argparse
import logging
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipelines.runner.log import StderrHandler

CAMENN = (sys.executable, "-c", "from pipelines.cli import console; console()")
"""`camenn` in a process of its own, of this very tree"""


def names_of(allowed: Sequence[str]) -> Callable[[str], list[str]]:
    """Return the type of a flag that takes names.

    The flag takes some of these names, with commas between.
    """

    def parse(text: str) -> list[str]:
        names = [name for name in text.split(",") if name]
        if not names or set(names) - set(allowed):
            raise argparse.ArgumentTypeError(f"choose from {','.join(allowed)}")
        return names

    return parse


@contextmanager
def work_directory(given: Path | None, name: str) -> Iterator[Path]:
    """Yield the absolute path of the directory of `--work`.

    It is made if it is not there. Without `--work` it is a temporary one that is gone afterwards.
    """
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield given.absolute()
        return
    with tempfile.TemporaryDirectory(prefix=f"camenn-{name}-") as made:
        yield Path(made).absolute()


def machine() -> dict[str, Any]:
    """Return cores and platform, for a result."""
    return {"cores": os.cpu_count(), "platform": platform.platform()}


def progress_log(name: str) -> Callable[[str], None]:
    """Return the function that logs a benchmark's progress.

    Each line goes to stderr at once, as `NAME: text`, whatever the settings of other loggers.
    """
    logger = logging.getLogger(f"benchmarks.{name}")
    if not logger.handlers:
        logger.addHandler(StderrHandler(f"{name}: %(message)s"))
        logger.setLevel(logging.INFO)
        logger.propagate = False
    return logger.info
