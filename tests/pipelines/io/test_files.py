"""Files appear whole or not at all."""

import json
from pathlib import Path

import pyarrow as pa
import pytest

from pipelines.io.files import atomic_write, find, fingerprint, list_parquet, match, write_json, write_parquet


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


def test_directories_are_taken_as_they_are_named(tmp_path: Path) -> None:
    """Brackets, stars and question marks in a path are no pattern: they must not match another directory."""
    for name in ("st1", "st[1]", "s*1", "s?1", "st[!2]"):
        write_json(str(tmp_path / name / "deep" / "part.json"), name)
    for name in ("st1", "st[1]", "s*1", "s?1", "st[!2]"):
        root = tmp_path / name
        assert [file.path for file in match(str(root), "**")] == [str(root / "deep" / "part.json")]
        assert [file.path for file in match(str(root), "*/part.json")] == [str(root / "deep" / "part.json")]
        assert match(str(root), "*.json") == []
        assert [file.path for file in find([str(root / "deep" / "part.json"), str(root / "none.json")])] == [
            str(root / "deep" / "part.json")
        ]


def test_a_file_that_changed_has_another_fingerprint_whatever_its_name(tmp_path: Path) -> None:
    path = tmp_path / "part[1].parquet"
    write_parquet(str(path), pa.table({"a": [1]}))
    before = fingerprint(find([str(path)]))
    assert before == fingerprint(find([str(path)])) != fingerprint([])
    write_parquet(str(path), pa.table({"a": [1, 2, 3]}))
    assert fingerprint(find([str(path)])) != before


@pytest.mark.parametrize(
    "layout", ["clicks.parquet", "clicks/a.parquet", "clicks/deep/a.parquet", "clicks.parquet/a.parquet"]
)
def test_a_table_is_a_file_or_a_directory(tmp_path: Path, layout: str) -> None:
    """Spark writes a directory under a file's name."""
    write_parquet(str(tmp_path / "d[1]" / layout), pa.table({"a": [1]}))
    assert list_parquet(str(tmp_path / "d[1]" / "clicks"), "clicks") == [str(tmp_path / "d[1]" / layout)]


def test_a_directory_of_a_tables_name_goes_before_a_file(tmp_path: Path) -> None:
    for layout in ("clicks.parquet", "clicks/a.parquet"):
        write_parquet(str(tmp_path / layout), pa.table({"a": [1]}))
    assert list_parquet(str(tmp_path / "clicks"), "clicks") == [str(tmp_path / "clicks" / "a.parquet")]
