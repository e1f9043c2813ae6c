"""Check that two tables write ids the same way.

Where they do not, the module finds the change of form that makes them equal.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.io.tables import Source

FORMS: dict[str, Callable[[pa.Array], pa.Array]] = {
    "blanks around them": pc.utf8_trim_whitespace,
    "upper and lower case": pc.utf8_lower,
    "leading zeros": lambda ids: pc.replace_substring_regex(ids, "(^|[^0-9])0+([0-9])", r"\1\2"),
    "a '.0' at their end": lambda ids: pc.replace_substring_regex(ids, r"^(\d+)\.0$", r"\1"),
    "composed and decomposed letters": lambda ids: pc.utf8_normalize(ids, form="NFC"),
}
"""Changes that programs make to ids, by a description of the difference. Each function returns ids
with that difference removed."""
SEARCHED_FROM = 0.02
"""Least share of rows not found from which a change of form is searched for: some ids are always new"""
LEAST_DISTINCT = 0.99
"""Least share of ids that must stay distinct under a change of form: ids in which case matters, for
example, are not the same without it."""
AFFIXES_TRIED = 3


@dataclass(frozen=True, kw_only=True)
class Side:
    """One side of a join.

    It has the ids, one per row, and their location.
    """

    ids: pa.Array | pa.ChunkedArray
    where: str
    """As in "DATA/audience.parquet: column 'store_id'". It begins a message"""


def column_of(source: Source, column: str, ids: pa.Array | pa.ChunkedArray) -> Side:
    """Return a column of a table as a join's side."""
    return Side(ids=ids, where=f"{source.files[0]}: column '{column}' of table '{source.contract.name}'")


@dataclass(frozen=True, kw_only=True)
class Join:
    """A count of left rows whose id the right has."""

    asked: int
    """Rows with an id"""
    found: int
    recoded: int = 0
    """Further rows that a change of form would join"""
    lacking: str = ""
    """The rows not found, with an example of both sides, and a remedy. '' where all are found"""


def join_ids(left: Side, right: Side) -> Join:
    """Count the left ids that the right side has.

    Nulls are left out.
    """
    ids, known = pc.drop_null(left.ids.cast(pa.string())), pc.drop_null(pc.unique(right.ids.cast(pa.string())))
    there = pc.is_in(ids, value_set=known)
    found = pc.sum(there).as_py() or 0
    if found == len(ids):
        return Join(asked=len(ids), found=found)
    others = ids.filter(pc.invert(there))
    lost = pc.unique(others)
    words = f"{left.where}: {len(others):,} of {len(ids):,} rows have a value that {right.where} lacks"
    change = _find_change(lost, known) if len(others) > SEARCHED_FROM * len(ids) else None
    recoded = pc.sum(pc.is_in(others, value_set=change.same)).as_py() or 0 if change else 0
    if change and 2 * recoded > len(others):
        words += (
            f" ('{change.one}' here is '{change.other}' there). {recoded:,} of them would join if {change.words}: "
            "write them the same way in both"
        )
        return Join(asked=len(ids), found=found, recoded=recoded, lacking=words)
    there_are = f"values there are like '{known[0]}'" if len(known) else "it has none"
    words += f" ('{lost[0]}' is the first; {there_are})"
    return Join(asked=len(ids), found=found, lacking=words)


@dataclass(frozen=True, kw_only=True)
class _Change:
    """A change of form and the ids made equal."""

    words: str
    same: pa.Array
    """Lost ids that it joins"""
    one: str
    other: str


def _find_change(lost: pa.Array, known: pa.Array) -> _Change | None:
    """Find the change of form that joins the lost ids.

    It is the simplest change that joins the most of them.
    """
    best: _Change | None = None
    for words, here, there in (*_forms(lost, known), *_affixes(lost, known)):
        if min(_distinct(here) / len(lost), _distinct(there) / max(len(known), 1)) < LEAST_DISTINCT:
            continue
        place = pc.index_in(here, value_set=there)
        same = lost.filter(pc.is_valid(place))
        if len(same) and (best is None or len(same) > len(best.same)):
            best = _Change(
                words=words, same=same, one=same[0].as_py(), other=known.take(place.drop_null()[:1])[0].as_py()
            )
    return best


def _distinct(ids: pa.Array) -> int:
    return int(pc.count_distinct(ids).as_py())


def _forms(lost: pa.Array, known: pa.Array) -> Iterator[tuple[str, pa.Array, pa.Array]]:
    """Yield both ids without each difference of form.

    Yields (words, lost ids, known ids), with each difference of form removed in turn, and then with
    all of them removed.
    """
    here, there, met = lost, known, []
    for words, change in FORMS.items():
        yield f"{words} made no difference", change(lost), change(known)
        before = here, there
        here, there = change(here), change(there)
        if not (here.equals(before[0]) and there.equals(before[1])):
            met.append(words)
    if len(met) > 1:
        yield f"{', '.join(met)} made no difference", here, there


def _affixes(lost: pa.Array, known: pa.Array) -> Iterator[tuple[str, pa.Array, pa.Array]]:
    """Yield both ids without one side's common affix.

    Yields (words, lost ids, known ids), with the prefix or suffix that all ids of one side share
    removed.

    Digits alone do not count as an affix: removing them would make other numbers.
    """
    if min(len(lost), len(known)) < 2:
        return
    for longer, shorter, flip in ((known, lost, False), (lost, known, True)):
        for find, words in ((pc.ends_with, "before"), (pc.starts_with, "after")):
            for sample in shorter[:AFFIXES_TRIED].to_pylist():
                fits = longer.filter(pc.and_(find(longer, sample), pc.not_equal(longer, sample)))
                if not sample or not len(fits):
                    continue
                shortest = min(fits.to_pylist(), key=len)
                affix = shortest.removesuffix(sample) if words == "before" else shortest.removeprefix(sample)
                if affix.isdigit():
                    continue
                start, stop = (len(affix), None) if words == "before" else (0, -len(affix))
                has = pc.starts_with(longer, affix) if words == "before" else pc.ends_with(longer, affix)
                cut = pc.if_else(has, pc.utf8_slice_codeunits(longer, start, stop), longer)
                yield f"'{affix}' did not stand {words} them", *((cut, shorter) if flip else (shorter, cut))
