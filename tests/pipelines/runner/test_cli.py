"""The console script ends with the command's exit code, whatever threads or objects the command leaves."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.runner.exit_codes import ExitCode

COMMAND = """
import atexit, os

class Aborts:
    def __del__(self):
        os.abort()

left = Aborts()

def main(argv):
    atexit.register(print, "registered")
    print("printed", end=" ")
    {ends}
"""
SCRIPT = (
    "import sys; from pipelines import cli; cli.COMMANDS['leave'] = ('leaves', ''); "
    "sys.argv[1:] = ['leave']; cli.console()"
)


@pytest.mark.parametrize(
    ("ends", "code"),
    [
        ("return 0", 0),
        ("return 3", 3),
        ("raise SystemExit(2)", 2),
        ("raise SystemExit", 0),
        ("raise SystemExit('no')", 1),
        ("raise ValueError('no')", 1),
        ("raise KeyboardInterrupt", 130),
    ],
)
def test_what_a_command_leaves_behind_does_not_change_its_exit_code(tmp_path: Path, ends: str, code: int) -> None:
    (tmp_path / "leaves.py").write_text(COMMAND.format(ends=ends))
    script = f"import sys; sys.path.append({str(tmp_path)!r}); {SCRIPT}"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert ended.returncode == code, ended.stderr
    assert ended.stdout == "printed registered\n"
    assert ("no" in ended.stderr) == ("no" in ends)


@pytest.mark.parametrize("lines", [1, 100_000])
def test_a_reader_who_has_gone_is_no_traceback(tmp_path: Path, lines: int) -> None:
    # as `camenn ... | head` does: few lines meet the closed pipe at the last flush, many in the middle of the command
    (tmp_path / "leaves.py").write_text(
        f"def main(argv):\n    for _ in range({lines}): print('a line')\n    return 0\n"
    )
    script = f"import sys; sys.path.append({str(tmp_path)!r}); {SCRIPT}"
    reading, writing = os.pipe()
    os.close(reading)
    ended = subprocess.run([sys.executable, "-c", script], stdout=writing, stderr=subprocess.PIPE, check=False)
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (ExitCode.BROKEN_PIPE, b"")
