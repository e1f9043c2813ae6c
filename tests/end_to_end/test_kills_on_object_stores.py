"""Commands killed between two requests to an object store: some points of each, `object_kill_lab` has all."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.object_stores import running_stores

PROJECT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.objects
def test_readers_see_the_old_run_or_the_new_one(tmp_path: Path) -> None:
    with running_stores(tmp_path):
        done = subprocess.run(
            [sys.executable, "-m", "tests.support.object_kill_lab", "--place", "s3://camenn/lab", "--points", "2"],
            cwd=PROJECT,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-3000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert sum(tally["points"] for tally in found["tallies"].values()) >= 14
    assert sum(tally["old"] for tally in found["tallies"].values()) > 0
    assert not found["broken"] and not any(found["left"].values())
