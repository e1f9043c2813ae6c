"""`camenn simulate`."""

import json
from pathlib import Path

import pytest

from simulator.cli import build_parser, main

SMALL = ["--preset", "tiny", "--clicks", "200", "--photo_pixels", "75"]


def test_main_prints_a_json_summary_as_the_last_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "data"
    assert main(["--out", str(out), *SMALL, "--json"]) == 0
    first = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert first["rows_in"] == first["rejected"] == first["encoded_images"] == first["encoded_titles"] == 0
    assert first["rows_out"] == sum(first[name] for name in ("listings", "clicks", "orders", "users", "stores"))
    assert first["out"] == str(out)
    assert first["made"]
    assert main(["--out", str(out), *SMALL, "--json"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert "already holds this city" in printed[0]
    again = json.loads(printed[-1])
    assert {k: v for k, v in again.items() if k not in ("seconds", "made")} == {
        k: v for k, v in first.items() if k not in ("seconds", "made")
    }


def test_main_refuses_to_overwrite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").write_text("x")
    assert main(["--out", str(tmp_path), *SMALL]) == 2
    assert "does not hold a simulated city" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--listings", "10"], "listings is 10"),
        (["--photo_bank", "5000"], "photos is 5000"),
        (["--classes", "211", "--listings", "200", "--photo_bank", "600"], "210 can be drawn"),
    ],
)
def test_main_names_the_setting_that_is_out_of_range(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert main(["--out", str(tmp_path / "data"), *SMALL, *flags]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "data").exists()


def test_build_parser_rejects_a_misspelt_flag() -> None:
    with pytest.raises(SystemExit):
        build_parser().parse_args(["--out", "x", "--clickz", "3"])
