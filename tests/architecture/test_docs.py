"""The pages in docs/ are current, linked, and speak of things that exist."""

import re
from pathlib import Path

import pytest

from benchmarks.quality import publish
from docs import generate
from examples.complete_journey.cli import build_parser
from pipelines.cli import COMMANDS
from pipelines.runner import exit_codes
from pipelines.runner.exit_codes import ExitCode

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
ENTRIES = ("decisions", "notebook")
"""Folders whose pages are entries with an index of their own"""
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.rglob("*.md")])
CHANGES = (
    "a feature from a catalog column",
    "last touch across devices",
    "a new image encoder",
    "another gate",
    "an output column in scores",
    "S3 or another object store",
    "a report chart",
    "a new loss",
    "another split",
    "the CVR tower",
    "a reject reason",
    "a metric",
)
"""Ordinary changes that a newcomer must find at once"""


WITHOUT_FILES = ("a column of the users table",)
"""Changes of the input alone"""


def without_code(text: str) -> str:
    """A page without its code blocks and code spans, which hold no links."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL))


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)
    found: set[str] = set()
    for heading in re.findall(r"^#{1,6} +(.+?) *$", text, flags=re.MULTILINE):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        anchor = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        number = 0
        while (name := f"{anchor}-{number}" if number else anchor) in found:
            number += 1
        found.add(name)
    return found


def links(page: Path) -> list[str]:
    """The relative targets of a page's links and pictures."""
    found = re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text()))
    return [target for target in found if not re.match(r"[a-z]+:", target)]


def change_rows() -> dict[str, list[str]]:
    """Each change of the table "Where does X go?" with its places."""
    lines = (DOCS / "architecture.md").read_text().partition("## Where does X go?")[2].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return {row[0]: re.findall(r"`([A-Za-z_0-9/]+(?:\.py|\.html|/))`", row[1]) for row in cells[2:]}


@pytest.mark.parametrize("name", sorted(generate.reference()))
def test_reference_is_current(name: str) -> None:
    assert (DOCS / "reference" / name).read_text() == generate.reference()[name], "run `make docs`"


def test_pictures_and_tables_of_rooms_are_current() -> None:
    assert (DOCS / "architecture.md").read_text() == generate.architecture(), "run `make docs`"


def test_every_exit_code_has_its_sentences_and_one_number() -> None:
    assert len({code.value for code in ExitCode}) == len(ExitCode)
    for code in ExitCode:
        assert code.meaning.endswith(".") and code.remedy.endswith("."), code
    assert exit_codes.FURTHER_CODES.keys() <= COMMANDS.keys()
    names = ("UNEXPECTED_ERROR", "INPUT_ERROR", "GATED", "BUSY", "STALE", "BROKEN_PIPE")
    assert [ExitCode[name] for name in names] == [1, 2, 3, 4, 5, 141], "published: schedulers act on them"


def test_places_of_changes_exist() -> None:
    """Every path of the table "Where does X go?" is there, and there are many rows of few places."""
    rows = change_rows()
    assert len(rows) >= 30
    for change, places in rows.items():
        assert (change in WITHOUT_FILES or places) and len(places) <= 3, change
        for place in places:
            assert (ROOT / place).exists(), place


@pytest.mark.parametrize("change", CHANGES)
def test_ordinary_changes_have_a_row(change: str) -> None:
    assert [row for row in change_rows() if row.startswith(change)], change


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings_that_exist(page: Path) -> None:
    for target in links(page):
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        if any(found.is_relative_to(DOCS / folder) and not (DOCS / folder).exists() for folder in ENTRIES):
            continue  # they come with another change
        assert found.exists(), f"{target} leads nowhere"
        assert not anchor or anchor in anchors(found.read_text()), f"{target}: no such heading"


def test_index_names_every_page() -> None:
    index = DOCS / "index.md"
    named = {(DOCS / target.partition("#")[0]).resolve() for target in links(index)}
    for page in PAGES:
        if page.is_relative_to(DOCS) and page != index and page.relative_to(DOCS).parts[0] not in ENTRIES:
            assert page in named, f"{page.relative_to(ROOT)} is not in docs/index.md"
    text = index.read_text()
    for folder in ENTRIES:
        assert f"]({folder}/" in text, folder


def test_sources_name_pages_that_exist() -> None:
    """What messages, docstrings and scripts say of docs/."""
    files = [path for folder in generate.PACKAGES for path in (ROOT / folder).rglob("*.py")]
    files += [
        path
        for folder in ("schemas", "simulator", "benchmarks", "examples", "scripts")
        for path in (ROOT / folder).rglob("*")
    ]
    files += [ROOT / name for name in ("Dockerfile", "Makefile", "run_local.sh", "run_tests.sh")]
    for path in files:
        if path.is_file() and path.suffix in (".py", ".sh", ""):
            for page in re.findall(r"docs/[a-z_/]+\.(?:md|png)", path.read_text()):
                assert (ROOT / page).exists(), f"{path.relative_to(ROOT)}: {page}"


def test_quality_page_has_a_place_for_its_tables() -> None:
    text = (publish.DOCS / "quality.md").read_text()
    assert text.count(publish.BEGIN) == text.count(publish.END) == 1
    assert (publish.DOCS / "quality.png").exists() and list((publish.DOCS / "data").glob("*.json"))


def test_readme_names_every_command_and_no_unknown_flag() -> None:
    text = (ROOT / "README.md").read_text()
    for command in COMMANDS:
        assert f"camenn {command}" in text or f"**{command}**" in text or command == "simulate", command
    known = generate.flags() + build_parser().format_help()
    beam = {"--runner", "--flink_master", "--flink_job_server_jar", "--environment_type", "--environment_config"}
    beam |= {"--direct_num_workers", "--direct_running_mode", "--all"}
    beam |= {"--standalone", "--nproc_per_node"}
    for flag in set(re.findall(r"--[a-z_]+", text)) - beam:
        assert flag in known, flag
