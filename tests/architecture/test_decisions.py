"""Check the form of decision records, their index and their links."""

import datetime
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
SECTIONS = ["Context", "Decision", "Consequences"]
RECORD = re.compile(r"(\d{4})-[a-z0-9]+(?:-[a-z0-9]+)*\.md")
LINK = re.compile(r"\]\((?!\w+:)([^)\s]+)\)")
MOST_LINES = 60
LONGEST_LINE = 100


def find_records(folder: Path) -> list[Path]:
    """Return the records of a folder, in order of their names."""
    return sorted(path for path in folder.glob("*.md") if path.name not in ("README.md", "TEMPLATE.md"))


def read_field(text: str, name: str) -> str:
    """Return a field of a record's head, or an empty text."""
    found = re.findall(rf"^- {name}: (.+)$", text.partition("\n## ")[0], re.MULTILINE)
    return found[0] if len(found) == 1 else ""


def find_faults(folder: Path) -> list[str]:
    """Name what is wrong with the records of a folder and with its index."""
    records = find_records(folder)
    numbers = [path.name[:4] for path in records]
    faults = [f"{path.name}: is not named NNNN-slug.md" for path in records if not RECORD.fullmatch(path.name)]
    if numbers != [f"{number:04}" for number in range(1, len(records) + 1)]:
        faults.append(f"numbers are not 0001, 0002 and so on, each once: {numbers}")
    rows = []
    for path in records:
        text, number = path.read_text(), path.name[:4]
        title = re.match(rf"# {number}: (\S.*)\n", text)
        status, date = read_field(text, "Status"), read_field(text, "Date")
        by = re.fullmatch(r"Superseded by (\d{4})", status)
        if not title:
            faults.append(f"{path.name}: the first line is not '# {number}: title'")
        if status != "Accepted" and not (by and by[1] in numbers and by[1] != number):
            faults.append(f"{path.name}: status {status!r}")
        if not is_date(date):
            faults.append(f"{path.name}: date {date!r}")
        if re.findall(r"^## (.+)$", text, re.MULTILINE) != SECTIONS:
            faults.append(f"{path.name}: sections are not {', '.join(SECTIONS)}, in this order")
        for section in text.split("\n## ")[1:]:
            if not section.partition("\n")[2].strip():
                faults.append(f"{path.name}: section {section.strip()!r} is empty")
        lines = text.splitlines()
        if len(lines) > MOST_LINES:
            faults.append(f"{path.name}: {len(lines)} lines, {MOST_LINES} at most")
        if long := [line for line in lines if len(line) > LONGEST_LINE and not line.startswith(("|", "#"))]:
            faults.append(f"{path.name}: longer than {LONGEST_LINE} characters: {long[0]}")
        rows.append((number, path.name, title[1] if title else "", status, date))
    listed = read_index(folder / "README.md")
    faults += [f"the index lacks, or says otherwise: {row}" for row in rows if row not in listed]
    faults += [f"the index has a row of no record: {row}" for row in listed if row not in rows]
    if listed != sorted(listed):
        faults.append("the index is not in order of numbers")
    return faults


def is_date(text: str) -> bool:
    """Return whether a text is a date as in 2026-11-30."""
    try:
        return datetime.date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def read_index(path: Path) -> list[tuple[str, str, str, str, str]]:
    """Read (number, file, title, status, date) of each row of the index."""
    rows = []
    for line in path.read_text().splitlines():
        if found := re.fullmatch(r"\| \[(\d{4})\]\(([^)]+)\) \| (.+) \| (.+) \| (.+) \|", line):
            number, name, title, status, date = found.groups()
            rows.append((number, name, title, re.sub(r"\[(\d{4})\]\(\1-[^)]+\)", r"\1", status), date))
    return rows


def name_anchors(text: str) -> set[str]:
    """Return the anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def find_dead_links(folder: Path) -> list[str]:
    """Name the relative links of a folder's pages that lead to no file, or to no heading of it."""
    dead = []
    for path in sorted(folder.rglob("*.md")):
        for link in LINK.findall(path.read_text()):
            name, _, anchor = link.partition("#")
            target = (path.parent / name).resolve() if name else path
            if not target.exists() or (anchor and anchor not in name_anchors(target.read_text())):
                dead.append(f"{path.name}: {link}")
    return dead


def test_records_and_their_index_are_sound() -> None:
    assert len(find_records(DOCS / "decisions")) >= 25
    assert find_faults(DOCS / "decisions") == []


def test_template_has_the_form_of_a_record() -> None:
    text = (DOCS / "decisions" / "TEMPLATE.md").read_text()
    assert text.startswith("# NNNN: title\n")
    assert read_field(text, "Status") and read_field(text, "Date")
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == SECTIONS


@pytest.mark.parametrize("folder", ["decisions", "notebook"])
def test_links_lead_somewhere(folder: str) -> None:
    pages = list((DOCS / folder).rglob("*.md"))
    assert any(LINK.search(page.read_text()) for page in pages)
    assert find_dead_links(DOCS / folder) == []


FIRST = "# 0001: First\n\n- Status: Superseded by 0002\n- Date: 2026-11-22\n\n"
SECOND = "# 0002: Second\n\n- Status: Accepted\n- Date: 2026-11-23\n\n"
BODY = "## Context\n\nOne.\n\n## Decision\n\nTwo.\n\n## Consequences\n\nThree.\n"
INDEX = (
    "| number | title | status | date |\n|---|---|---|---|\n"
    "| [0001](0001-first.md) | First | Superseded by [0002](0002-second.md) | 2026-11-22 |\n"
    "| [0002](0002-second.md) | Second | Accepted | 2026-11-23 |\n"
)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("0001-first.md", "Superseded by 0002", "Superseded by 0003"),
        ("0001-first.md", "Superseded by 0002", "Superseded by 0001"),
        ("0001-first.md", "Superseded by 0002", "Proposed"),
        ("0001-first.md", "- Status: Superseded by 0002\n", ""),
        ("0001-first.md", "2026-11-22", "22 November 2026"),
        ("0001-first.md", "2026-11-22", "2026-11-31"),
        ("0001-first.md", "# 0001: First", "# 0002: First"),
        ("0001-first.md", "## Decision", "## Consequences"),
        ("0001-first.md", "## Context\n\nOne.\n\n", ""),
        ("0001-first.md", "Three.\n", ""),
        ("0001-first.md", "Three.", "Three. " * 20),
        ("0001-first.md", "Three.\n", "Three.\n" * 60),
        ("README.md", "Second |", "Another |"),
        ("README.md", "Second | Accepted", "Second | Superseded by 0001"),
        ("README.md", "2026-11-23", "2026-11-24"),
        ("README.md", INDEX.splitlines(keepends=True)[3], ""),
        ("README.md", INDEX, INDEX + "| [0003](0003-third.md) | Third | Accepted | 2026-11-24 |\n"),
        ("README.md", INDEX, "\n".join(reversed(INDEX.splitlines()))),
    ],
)
def test_faults_of_records_are_found(tmp_path: Path, name: str, old: str, new: str) -> None:
    for file, text in (("0001-first.md", FIRST + BODY), ("0002-second.md", SECOND + BODY), ("README.md", INDEX)):
        (tmp_path / file).write_text(text)
    assert find_faults(tmp_path) == []
    text = (tmp_path / name).read_text()
    assert old in text
    (tmp_path / name).write_text(text.replace(old, new, 1))
    assert find_faults(tmp_path)


@pytest.mark.parametrize("name", ["0003-second.md", "0001-second.md", "0002_second.md", "notes.md"])
def test_numbers_are_consecutive_and_unique(tmp_path: Path, name: str) -> None:
    (tmp_path / "0001-first.md").write_text(FIRST + BODY)
    (tmp_path / name).write_text(SECOND + BODY)
    (tmp_path / "README.md").write_text(INDEX)
    assert any("numbers are not" in fault or "not named" in fault for fault in find_faults(tmp_path))


def test_dead_links_are_found(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("# A\n\n[b](b.md#of-two-words) [web](https://example.org/none) [here](#a)\n")
    (tmp_path / "b.md").write_text("## `Of` two words\n")
    assert find_dead_links(tmp_path) == []
    (tmp_path / "a.md").write_text("[b](b.md#of-three) [c](c.md) [here](#b)\n")
    assert find_dead_links(tmp_path) == ["a.md: b.md#of-three", "a.md: c.md", "a.md: #b"]
