"""Docstrings are easy to read: the counts of scripts/language.py are within their limits."""

from pathlib import Path

import pytest

from scripts import language


def test_docstrings_and_lines_are_within_their_limits(capsys: pytest.CaptureFixture[str]) -> None:
    code = language.main(["--list"])
    assert code == 0, capsys.readouterr().out


def test_faults_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = '"""Read a file.\n\nWhat follows may be long; it is not the first paragraph.\n"""\n'
    bad = '"""What a file holds; one of many words that go on and on and on."""\n' + "x = 1  # " + "-" * 120 + "\n"
    monkeypatch.setattr(language, "ROOT", tmp_path)
    (tmp_path / "good").mkdir()
    (tmp_path / "good" / "a.py").write_text(good)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "b.py").write_text(bad)
    assert set(language.count(["good"], listing=False).values()) == {0.0}
    assert all(share > 0 for share in language.count(["bad"], listing=False).values())
    with pytest.raises(FileNotFoundError):
        language.count(["absent"], listing=False)
