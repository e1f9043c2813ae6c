"""The reference in docs/ equals the schemas and parsers, and the README mentions only things that exist."""

import re
from pathlib import Path

from docs import generate
from pipelines.cli import COMMANDS

ROOT = Path(__file__).parents[2]


def test_tables_reference_is_current() -> None:
    assert (ROOT / "docs" / "tables.md").read_text() == generate.tables(), "run `make docs`"


def test_flags_reference_is_current() -> None:
    assert (ROOT / "docs" / "flags.md").read_text() == generate.flags(), "run `make docs`"


def test_pictures_and_tables_of_rooms_are_current() -> None:
    assert (ROOT / "docs" / "architecture.md").read_text() == generate.architecture(), "run `make docs`"


def test_places_of_changes_exist() -> None:
    """Every path of the table "Where does X go?" is there, and there are many rows."""
    rows = (ROOT / "docs" / "architecture.md").read_text().partition("## Where does X go?")[2].splitlines()[4:]
    assert len(rows) >= 20
    for row in rows:
        places = re.findall(r"`([a-z_0-9/]+(?:\.py|\.html|/))`", row)
        assert places, row
        for place in places:
            assert (ROOT / place).exists(), place


def test_readme_links_exist() -> None:
    text = (ROOT / "README.md").read_text()
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (ROOT / target).exists(), target


def test_readme_names_every_command_and_no_unknown_flag() -> None:
    text = (ROOT / "README.md").read_text()
    for command in COMMANDS:
        assert f"camenn {command}" in text or f"**{command}**" in text or command == "simulate", command
    known = generate.flags()
    beam = {"--runner", "--flink_master", "--flink_job_server_jar", "--environment_type", "--environment_config"}
    beam |= {"--direct_num_workers", "--direct_running_mode", "--all"}
    beam |= {"--standalone", "--nproc_per_node"}
    for flag in set(re.findall(r"--[a-z_]+", text)) - beam:
        assert flag in known, flag
