"""Show a person progress and results.

There is a live bar on a terminal or plain lines in a log, a closing table, and `--json`.
"""

import json
import os
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from pipelines.runner.log import stage_logger

LOG_EVERY_S = 10.0

NO_ROWS = {"rows_in": 0, "rows_out": 0, "rejected": 0, "encoded_images": 0, "encoded_titles": 0}
"""For the closing table of a command that reads no table: whoever collects the JSON of all commands
finds the same names in each."""


class Bar:
    """One stage's progress, to use in a `with` block.

    It is a tqdm bar on a terminal, and a plain line every 10 s elsewhere.
    """

    def __init__(self, title: str, total: int, unit: str = "rows") -> None:
        self.title, self.total, self.unit = title, total, unit
        self.done = 0
        self.live = sys.stderr.isatty()
        self.started = self.spoken = time.monotonic()
        self.note = ""

    def __enter__(self) -> "Bar":
        self.bar = tqdm(
            total=self.total,
            desc=self.title,
            unit=f" {self.unit}",
            unit_scale=True,
            disable=not self.live,
            dynamic_ncols=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        if not self.live:
            self._log()

    def update(self, done: int, note: str = "", total: int | None = None) -> None:
        """Set how much is done in all.

        Optionally, it sets a short note (the loss, say) and a total that is known better now.
        """
        self.note = note
        if total is not None and total != self.total:
            self.total = self.bar.total = total
        if note:
            self.bar.set_postfix_str(note, refresh=False)
        self.bar.update(done - self.done)
        self.done = done
        if not self.live and time.monotonic() - self.spoken >= LOG_EVERY_S:
            self._log()

    def _log(self) -> None:
        self.spoken = time.monotonic()
        seconds = max(self.spoken - self.started, 1e-9)
        rate = self.done / seconds
        left = f", {(self.total - self.done) / rate:.0f} s left" if 0 < self.done < self.total else ""
        note = f", {self.note}" if self.note else ""
        stage_logger(self.title).info(f"{self.done:,} of {self.total:,} {self.unit}, {rate:,.0f}/s{left}{note}")


class ProgressFile:
    """A worker's side of a bar.

    Counts are kept in small files of a local directory, which the submitting process adds up.

    `p.run()` blocks and reports nothing, and workers may be other processes, hence files. Where there
    is no directory (a remote runner), nothing is done.
    """

    def __init__(self, directory: str | None) -> None:
        self.directory = directory
        self.path: str | None = None
        self.count = 0
        self.expected = 0
        self.written = 0.0

    def add(self, rows: int, *, expected: int = 0) -> None:
        """Count `rows` as done and `expected` more to do.

        The file is written at most four times a second.
        """
        self.count += rows
        self.expected += expected
        if self.directory is None or not os.path.isdir(self.directory):
            return
        if self.path is None:
            self.path = os.path.join(self.directory, uuid.uuid4().hex)
        if time.monotonic() - self.written > 0.25:
            self.flush()

    def flush(self) -> None:
        """Write the count now."""
        if self.path is not None:
            with open(self.path, "w") as handle:
                handle.write(f"{self.count} {self.expected}")
            self.written = time.monotonic()


@contextmanager
def watch(title: str, total: int | None, unit: str, local: bool) -> Iterator[str | None]:
    """Show a bar while a Beam job runs.

    Yields the directory for `ProgressFile`, or None on a remote runner.

    Without `total`, workers say what there is to do as they find out.
    """
    if not local:
        stage_logger(title).info("handed to the runner, whose own page shows progress")
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="camenn-progress-") as directory, Bar(title, total or 0, unit) as bar:
        stop = threading.Event()

        def show() -> None:
            done, expected = _totals(directory)
            bar.update(done, total=total if total is not None else expected)

        def poll() -> None:
            while not stop.wait(0.3):
                show()

        thread = threading.Thread(target=poll, daemon=True)
        thread.start()
        try:
            yield directory
        finally:
            stop.set()
            thread.join()
            show()


def _totals(directory: str) -> tuple[int, int]:
    done = expected = 0
    for entry in os.scandir(directory):
        with open(entry.path) as handle:
            # A file that is being written right now may be empty for a moment.
            words = handle.read().split()
        if len(words) == 2:
            done, expected = done + int(words[0]), expected + int(words[1])
    return done, expected


def closing_table(stage: str, summary: dict[str, Any], *, as_json: bool) -> None:
    """Print what a command did.

    It says how fast it was and where the output is. With `as_json`, it is one JSON object on the
    last line of stdout.
    """
    if as_json:
        print(json.dumps(summary, sort_keys=True), flush=True)
        return
    width = max(len(name) for name in summary)
    print(f"\ncamenn {stage}")
    for name, value in summary.items():
        print(f"  {name:<{width}}  {_shown(value)}")
    print(flush=True)


def _shown(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_shown(inner)}" for name, inner in value.items()) or "-"
    return str(value)
