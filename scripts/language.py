"""Count the faults that make docstrings hard to read.

    python -m scripts.language [--list] [FOLDER ...]

The faults are fragments, semicolons, long first lines and long lines. Counted are the docstrings of
modules, classes and functions of the named folders (default: every package but tests). The first
paragraph should be a sentence: functions open with an imperative verb, nothing opens with a word
such as "What" or "Whether", no semicolon joins two sentences, and the first line has at most ten
words. `--list` prints each offender. The exit code is 1 where a share is above its limit.
"""

import argparse
import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("schemas", "camenn_model", "pipelines", "simulator", "benchmarks", "examples", "scripts")
FRAGMENTS = re.compile(
    r"(What|Whether|Of|Who|Whom|Whose|Where|When|How|Which|Why|"
    r"If|As|For|From|In|On|At|Than|That|Those|By|With|Without)\b"
)
MOST_WORDS = 10
LONGEST_LINE = 120
LIMITS = {"fragments": 0.02, "semicolons": 0.02, "long_first_lines": 0.02, "long_lines": 0.0}
"""Largest allowed share of the docstrings, or of the lines"""


def find_docstrings(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, text) of each docstring of a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield getattr(node, "lineno", 1), text


def find_faults(text: str) -> list[str]:
    """Name the faults of one docstring."""
    paragraph = text.split("\n\n")[0]
    faults = []
    if FRAGMENTS.match(paragraph):
        faults.append("fragments")
    if ";" in re.sub(r"`[^`]*`", "", paragraph):
        faults.append("semicolons")
    if len(paragraph.split("\n")[0].split()) > MOST_WORDS:
        faults.append("long_first_lines")
    return faults


def find_files(place: Path) -> list[Path]:
    """Return a folder's Python files, or one given file.

    Raises:
        FileNotFoundError: there is none, so that a wrong name does not pass for a clean folder.
    """
    found = [place] if place.suffix == ".py" else list(place.rglob("*.py"))
    if not found or not all(path.exists() for path in found):
        raise FileNotFoundError(f"{place}: no Python file is there")
    return found


def count(folders: list[str], *, listing: bool) -> dict[str, float]:
    """Return the share of docstrings with each fault.

    The share of long lines is one of lines.
    """
    found = dict.fromkeys(LIMITS, 0)
    docstrings = lines = 0
    for path in sorted(file for folder in folders for file in find_files(ROOT / folder)):
        name = path.relative_to(ROOT)
        for line, text in find_docstrings(path):
            docstrings += 1
            for fault in find_faults(text):
                found[fault] += 1
                if listing:
                    print(f"{name}:{line}: {fault}: {text.splitlines()[0]}")
        for number, written in enumerate(path.read_text().splitlines(), 1):
            lines += 1
            if len(written) > LONGEST_LINE:
                found["long_lines"] += 1
                if listing:
                    print(f"{name}:{number}: long_lines: {len(written)} characters")
    return {fault: times / max(lines if fault == "long_lines" else docstrings, 1) for fault, times in found.items()}


def main(argv: list[str] | None = None) -> int:
    """Count, print, and compare the shares with their limits."""
    parser = argparse.ArgumentParser(prog="python -m scripts.language", description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="*", default=list(FOLDERS), help="default: all packages but tests")
    parser.add_argument("--list", action="store_true", help="print each offender")
    arguments = parser.parse_args(argv)
    shares = count(arguments.folders, listing=arguments.list)
    for fault, share in shares.items():
        print(f"{fault:<18}{share:8.2%}   at most {LIMITS[fault]:.0%}")
    return int(any(share > LIMITS[fault] for fault, share in shares.items()))


if __name__ == "__main__":
    sys.exit(main())
