"""Reasons of rejects and defects: one list, which the code uses and nothing else."""

import ast
import re
from pathlib import Path

from schemas.catalog import CATALOG
from schemas.events import CLICKS, ORDERS
from schemas.reasons import Reason

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [path for name in ("pipelines", "camenn_model") for path in sorted((ROOT / name).rglob("*.py"))]


def test_published_reasons_stay() -> None:
    """Alerts filter by them. A reason may be added to this list, and none may leave it."""
    published = {
        *("null_item_id", "null_exposure_id", "null_session_id", "null_order_id", "null_user_id", "null_store_id"),
        *("null_clicked_at", "null_ordered_at", "null_quantity", "not_utf8", "impossible_time"),
        *("duplicate_item_id", "duplicate_exposure_id", "missing_image", "unreadable_image", "changed_image"),
        *("not_a_file", "malformed_uri", "outside_root", "unsupported_scheme", "empty_image", "too_many_bytes"),
        *("too_many_pixels", "not_an_image", "truncated_image", "corrupt_image", "unsupported_mode"),
    }
    assert published == {reason.value for reason in Reason}


def test_every_required_column_has_its_reason() -> None:
    required = {
        column.name
        for contract in (CATALOG, CLICKS, ORDERS)
        for column in contract.columns
        if not (column.nullable or column.optional)
    }
    assert {Reason.null(column) for column in required} == {one for one in Reason if one.name.startswith("NULL_")}


def test_every_reason_is_used_and_none_is_spelled_out() -> None:
    used: set[str] = set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "Reason":
                used.add(node.attr)
            assert not (isinstance(node, ast.Constant) and node.value in list(Reason)), f"{path}:{node.lineno}"
    assert {reason.name for reason in Reason if not reason.name.startswith("NULL_")} <= used


def test_every_reason_says_what_is_wrong_and_what_to_do() -> None:
    for reason in Reason:
        assert reason.table in ("rejects", "defects")
        assert re.fullmatch(r"[A-Z`].*\.", reason.meaning) and re.fullmatch(r"[A-Z`].*\.", reason.remedy)
