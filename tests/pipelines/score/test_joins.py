"""Ids that two tables write differently: counted, and reported with the change of form that joins them."""

from collections.abc import Sequence

import pyarrow as pa
import pytest

from pipelines.score.joins import Join, Side, join_ids


def join(left: Sequence[str | None], right: Sequence[str | None]) -> Join:
    """Join two columns whose messages name them LEFT and RIGHT."""
    return join_ids(
        Side(ids=pa.array(left, pa.string()), where="LEFT"), Side(ids=pa.array(right, pa.string()), where="RIGHT")
    )


@pytest.mark.parametrize(
    ("left", "right", "reported"),
    [
        (["s1", "s2", "s3"], ["S1", "S2", "S3"], "upper and lower case made no difference"),
        (["s1 ", "s2"], ["s1", " s2"], "blanks around them made no difference"),
        (["007", "040"], ["7", "40"], "leading zeros made no difference"),
        (["s7", "s40"], ["s07", "s40 "], "blanks around them, leading zeros made no difference"),
        (["1.0", "2.0"], ["1", "2"], "a '.0' at their end made no difference"),
        (["café", "thé"], ["cafe\u0301", "the\u0301"], "composed and decomposed letters made no difference"),
        (["1", "2", "3"], ["shop-1", "shop-2", "shop-3", "shop-11"], "'shop-' did not stand before them"),
        (["shop-1", "shop-2"], ["1", "2"], "'shop-' did not stand before them"),
        (["1", "2"], ["1@city", "2@city"], "'@city' did not stand after them"),
    ],
)
def test_a_change_of_form_is_found_and_told(left: list[str | None], right: list[str | None], reported: str) -> None:
    found = join(left, right)
    assert (found.found, found.recoded) == (0, len(left))
    assert reported in found.lacking and found.lacking.startswith("LEFT: ") and "RIGHT" in found.lacking
    assert f"'{left[0]}' here is" in found.lacking


def test_some_of_the_ids_may_be_written_otherwise() -> None:
    found = join(["s1", "s1", "s2", "s3", "s3", None], ["s1", "S2", "S3", None])
    assert (found.asked, found.found, found.recoded) == (5, 2, 3)
    assert "3 of 5 rows" in found.lacking and "'s2' here is 'S2' there" in found.lacking


def test_ids_of_which_case_is_a_part_are_not_the_same_without_it() -> None:
    known = [f"{first}{second}" for first in "aAbB" for second in "cCdD"]
    found = join(["eC", "aE", "ec", "Ae"], known)
    assert (found.found, found.recoded) == (0, 0)
    assert "would join" not in found.lacking and "values there are like 'ac'" in found.lacking


def test_other_numbers_are_others() -> None:
    """A digit before a number makes another number, not another form of the same id."""
    assert join(["11", "12"], ["211", "212"]).recoded == 0
    assert join(["u5", "u6"], ["u1", "u2"]).recoded == 0


def test_some_that_are_new_need_no_explanation() -> None:
    ids = [f"u{number}" for number in range(1_000)]
    found = join(ids[:980], ids[20:])
    assert (found.found, found.recoded) == (960, 0) and "20 of 980 rows" in found.lacking
    assert join(ids, ids).lacking == ""
    assert join([], ids) == Join(asked=0, found=0)
    assert "it has none" in join(["u1"], []).lacking
