"""The requirements of setup.py: none with a published vulnerability, and none that constraints.txt lacks."""

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
REQUIREMENTS = [
    Requirement(text) for text in re.findall(r'"([A-Za-z0-9\[\]_-]+>=[0-9.]+)"', (ROOT / "setup.py").read_text())
]
PINS = {
    canonicalize_name(name): version
    for name, version in (
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    )
}


def test_every_requirement_is_pinned_at_its_floor_or_above() -> None:
    assert len(REQUIREMENTS) > 25
    for requirement in REQUIREMENTS:
        pin = PINS[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(pin), (str(requirement), pin)


@pytest.mark.parametrize(
    ("name", "vulnerable"),
    [
        ("jinja2", "3.1.5"),
        ("lightgbm", "4.5.0"),
        ("pillow", "12.2.0"),
        ("playwright", "1.55.0"),
        ("duckdb", "1.4.1"),
        ("pyarrow", "23.0.0"),
        ("pytest", "9.0.2"),
        ("torch", "2.12.1"),
        ("tqdm", "4.66.2"),
        ("transformers", "5.9.0"),
    ],
)
def test_vulnerable_versions_are_not_asked_for(name: str, vulnerable: str) -> None:
    (requirement,) = (requirement for requirement in REQUIREMENTS if canonicalize_name(requirement.name) == name)
    assert not requirement.specifier.contains(vulnerable)
