"""Commands start at once.

The imports of `--help`, of a wrong flag and of a stage's own module are checked in processes of
their own.
"""

import json
import subprocess
import sys

import pytest

from pipelines.cli import COMMANDS

HEAVY = ("torch", "apache_beam", "pandas", "pyarrow", "numpy", "matplotlib", "transformers", "timm")
STAGES = ("shards", "train", "score", "report", "nightly")
"""Stages whose own module needs no torch; `embed` is the one that needs it"""

SCRIPT = """
import json, sys
try:
    code = {what}
except SystemExit as ended:
    code = ended.code
print(json.dumps([code, [name for name in {heavy!r} if name in sys.modules]]))
"""


def imported(what: str) -> tuple[int, list[str]]:
    """Run an expression in a new process; returns the exit code and which heavy libraries it imported."""
    script = SCRIPT.format(what=what, heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    code, found = json.loads(done.stdout.splitlines()[-1])
    return code, found


@pytest.mark.parametrize("command", COMMANDS)
def test_help_imports_no_heavy_library(command: str) -> None:
    assert imported(f"__import__('pipelines.cli').cli.main([{command!r}, '--help'])") == (0, [])


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in ("doctor", "nightly")])
def test_a_flag_that_is_missing_imports_no_heavy_library(command: str) -> None:
    assert imported(f"__import__('pipelines.cli').cli.main([{command!r}])") == (2, [])


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_is_imported_without_torch(stage: str) -> None:
    module = {"report": "page", "nightly": "night"}.get(stage, "stage")
    _, found = imported(f"__import__('pipelines.{stage}.{module}') and 0")
    assert "torch" not in found and "pyarrow" in found
