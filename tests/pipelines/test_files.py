"""Files appear whole or not at all."""

import json
from pathlib import Path

import pytest

from pipelines.files import atomic_write, write_json


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # A bare name is in the working directory; other directories are made.
    for name in ("found.json", "deep/er/found.json"):
        write_json(name, {"b": 1, "a": [2]})
        assert json.loads((tmp_path / name).read_text()) == {"a": [2], "b": 1}
    with pytest.raises(ZeroDivisionError), atomic_write("found.json") as handle:
        handle.write(b"half")
        handle.write(b"%d" % (1 // 0))
    assert json.loads(Path("found.json").read_text()) == {"a": [2], "b": 1}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "found.json"], "no temporary file is left"
