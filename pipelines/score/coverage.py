"""Count how much of tonight's input is covered.

Counted are ids that join tables, pairs, photos, titles, and values that the model knows, before
anything is scored.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from camenn_model.config import CATEGORY, SUBCATEGORY
from camenn_model.data.field_encoders import MAX_VOCABULARY, Vocabulary
from pipelines.io.tables import Source, list_slices, read_slice
from pipelines.runs.accounting import Count
from pipelines.runs.gate import LEAST_FOUND, LEAST_ROWS, NEARLY_NONE
from pipelines.score.audience import Candidates
from pipelines.score.gates import LEAST_COVERAGE, MOST_RECODED, Coverage
from pipelines.score.joins import SEARCHED_FROM, Join, Side, column_of, join_ids
from schemas.errors import InputError

if TYPE_CHECKING:
    from pipelines.score.inputs import ScoreInputs
    from pipelines.score.pairs import Pairs
    from pipelines.score.snapshot import Log


def check_ids(joins: dict[str, Join]) -> None:
    """Stop where ids of two tables are written differently.

    That is the case where hardly a row joins, and most would join if both sides wrote ids the same
    way.

    Raises:
        InputError: naming both files and columns, an example of each, and the change of form.
    """
    for join in joins.values():
        if join.found < NEARLY_NONE * join.asked and 2 * join.recoded > join.asked:
            raise InputError(f"{join.lacking}. Nothing was scored.")


def check_meeting(met: np.ndarray, store: Join) -> None:
    """Stop where nearly no audience row meets any listing.

    Args:
        met: listings of its own store that each audience row meets, int64 [S].
        store: how the audience's store_id joins the catalog's.

    Raises:
        InputError: naming both files and an example of each.
    """
    rows, none = len(met), int((met == 0).sum())
    if none == rows or (rows >= LEAST_ROWS and rows - none < NEARLY_NONE * rows):
        raise InputError(
            f"{none:,} of {rows:,} audience rows meet no listing. {store.lacking}. "
            "Write store_id in the audience as in the catalog. Nothing was scored."
        )


def id_joins(
    inputs: "ScoreInputs",
    audience: pa.Table,
    items: pa.Table,
    log: "Log",
    log_counts: list[Count],
    candidates: Candidates | None,
) -> dict[str, Join]:
    """Look up the ids by which the tables join.

    The tables are audience, candidates, users, stores, catalog and logs. Returns the joins by their
    gates' names. A table that is missing tonight is looked up too, and counted as not found:
    earlier nights may have had it.
    """
    sources = inputs.sources

    def side(column: str) -> Side:
        if "audience" in sources:
            return column_of(sources["audience"], column, audience[column])
        return Side(ids=audience[column], where=f"column '{column}' of the audience made from the logs or the catalog")

    def listed(column: str) -> Side:
        return column_of(inputs.tables.catalog, column, items[column])

    found = {"store_id": join_ids(side("store_id"), listed("store_id"))}
    if "users" in sources:
        users = column_of(sources["users"], "user_id", inputs.tables.users["user_id"])
        found["user_in_users"] = join_ids(side("user_id"), users)
    seen = Side(
        ids=pa.array(log.users, pa.string()), where=f"{inputs.tables.clicks.files[0]}: column 'user_id' of the logs"
    )
    found["user_in_logs"] = join_ids(side("user_id"), seen)
    if "stores" in sources and "audience" not in sources:
        # The table `stores` gives the local hour of active users: a given audience has its own hours.
        zones = pa.array(list(inputs.tables.timezones), pa.string())
        found["store_in_stores"] = join_ids(side("store_id"), column_of(sources["stores"], "store_id", zones))
    found["logged_item"] = _logged_items(inputs.tables.clicks, listed("item_id"), log_counts)
    if candidates is not None:
        found["candidate_audience"] = join_ids(candidates.audience_ids, side("audience_id"))
        found["candidate_item"] = join_ids(candidates.item_ids, listed("item_id"))
    return found


def _logged_items(clicks: Source, listed: Side, counts: list[Count]) -> Join:
    """Count how many of the logs' events are of listings.

    The listings are the catalog's. All events are counted. The written form of the other ids is
    sampled from the clicks' last row group.
    """
    known, unknown = (sum(count.rows for count in counts if count.where == where) for where in ("out", "unknown_item"))
    asked = known + unknown
    slices = list_slices(clicks)
    if unknown <= SEARCHED_FROM * asked or not slices:
        return Join(asked=asked, found=known)
    contract = clicks.contract
    item_alone = replace(contract, columns=tuple(c for c in contract.columns if c.name == "item_id"))
    clicked = read_slice(slices[-1], item_alone, ["item_id"])["item_id"]
    sample = join_ids(column_of(clicks, "item_id", clicked), listed)
    recoded = round(asked * sample.recoded / max(sample.asked, 1))
    lacking = f"{sample.lacking} (of the last row group)" if sample.lacking else ""
    return Join(asked=asked, found=known, recoded=min(recoded, unknown), lacking=lacking)


ROWS = {
    "store_id": "audience rows have a store_id of the catalog",
    "store_in_stores": "audience rows have a store_id of table 'stores'",
    "user_in_logs": "audience rows that name a user have a user_id of the logs",
    "user_in_users": "audience rows that name a user have a user_id of table 'users'",
    "logged_item": "clicks and orders have an item_id of the catalog",
    "candidate_audience": "rows of table 'candidates' have an audience_id of the audience",
    "candidate_item": "rows of table 'candidates' have an item_id of the catalog",
}
"""The quantity that a join counts, by the gate's name"""
SAMPLES = ("user_in_logs", "user_in_users")
SHARES = ("logged_item", "candidate_audience", "candidate_item")
STRICT = ("store_id", "store_in_stores")
PLAUSIBLE = ("user_in_logs", "user_in_users", "logged_item")
"""Other joins may legitimately join few rows: candidates of a whole city for a trial's audience, a
catalog without stores"""


def cover_ids(joins: dict[str, Join]) -> list[Coverage]:
    """Return the coverage of each id join for the gates."""
    return [
        Coverage(
            name=name,
            found=join.found,
            asked=join.asked,
            recoded=join.recoded,
            most_recoded=MOST_RECODED,
            counted=ROWS[name],
            lacking=join.lacking,
            least=LEAST_COVERAGE if name in STRICT else LEAST_FOUND,
            by_share=name in SHARES,
            chance=name in SAMPLES,
            plausible=name in PLAUSIBLE,
        )
        for name, join in joins.items()
    ]


def cover_night(inputs: "ScoreInputs", pairs: "Pairs") -> list[Coverage]:
    """Return the coverage of tonight's input for the gates.

    It is in the gates' order.

    Args:
        inputs: the run's inputs.
        pairs: the pairs to score.
    """
    met, items, rows = pairs.met, pairs.items, pairs.audience.num_rows
    found = cover_ids(pairs.joins)
    found.append(
        Coverage(
            name="audience_met",
            found=int((met > 0).sum()),
            asked=rows,
            counted="audience rows meet a listing",
            # Candidates are chosen again each night.
            least=LEAST_COVERAGE if pairs.candidates is None else LEAST_FOUND,
        )
    )
    photos = items.num_rows - items["image_key"].null_count
    # Bytes in the catalog have no address.
    named = pc.or_(
        pc.not_equal(pc.utf8_trim_whitespace(pc.fill_null(items["image_uri"], "")), ""), pc.is_valid(items["image_key"])
    )
    titles = items.num_rows - items["title"].null_count
    if pairs.candidates is None:
        meeting = np.unique(np.concatenate([chunk.items for chunk in pairs.chunks])).size if pairs.chunks else 0
        found += [
            _number("listings_met", meeting, items.num_rows, "listings meet an audience row"),
            _number("pairs", pairs.count, pairs.count, "pairs are scored"),
        ]
    else:
        asked = len(pairs.candidates)
        found += [
            Coverage(
                name="candidates",
                found=asked,
                asked=asked,
                counted="different rows of table 'candidates' name an audience row and a listing",
                lacking="see whether the table is whole, and tonight's",
                least=LEAST_FOUND,
            ),
            Coverage(
                name="candidates_used",
                found=pairs.count,
                asked=asked,
                counted="candidates are scored, the others are listings of another store than the audience row's",
                least=LEAST_FOUND,
                by_share=True,
            ),
        ]
    found += [
        Coverage(
            name="photos",
            found=photos,
            asked=pc.sum(named).as_py() or 0,
            counted="listings that name a photo have an embedding of it",
            lacking=(
                "see the table 'defects' of the embedding store: camenn embed gives there the reason of each photo"
            ),
            least=LEAST_FOUND,
            plausible=True,
        ),
        _number("titles", titles, items.num_rows, "listings have a title"),
    ]
    space = inputs.package.space
    known = [
        ("listings", name, items[name], space.vocabularies[name], LEAST_FOUND)
        for name in (CATEGORY, SUBCATEGORY, "brand")
    ]
    known.append(("audience rows", "store", pairs.audience["store_id"], space.vocabularies["store"], LEAST_COVERAGE))
    for name in space.user_fields:
        column = name.removeprefix("user_")
        # A column that is gone counts as one without values.
        values = (
            pairs.fields[column]
            if column in pairs.fields.column_names
            else pa.chunked_array([pa.nulls(rows, pa.string())])
        )
        known.append(("audience rows", name, values, space.vocabularies[name], LEAST_FOUND))
    return found + [_cover_values(*one) for one in known if one[3].values]


def _number(name: str, found: int, asked: int, counted: str) -> Coverage:
    return Coverage(name=name, found=found, asked=asked, counted=counted, least=LEAST_FOUND)


def _cover_values(rows: str, name: str, column: pa.ChunkedArray, vocabulary: Vocabulary, least: float) -> Coverage:
    """Count the rows whose value the model knows.

    The values are of one column. The model cannot distinguish unknown values.
    """
    place = f"'{name.removeprefix('user_')}'" if name != "store" else "'store_id'"
    side = Side(ids=column, where=f"column {place} of the {rows}")
    join = join_ids(side, Side(ids=pa.array(vocabulary.values, pa.string()), where="the model's vocabulary"))
    return Coverage(
        name=f"known_{name}",
        found=join.found,
        asked=join.asked,
        recoded=join.recoded,
        most_recoded=1 - LEAST_FOUND,
        counted=f"{rows} with a value in column {place} have one that the model knows",
        lacking=join.lacking,
        least=least,
        chance=name != "store" and rows == "audience rows",
        # A full vocabulary holds only the most frequent of very many values.
        plausible=len(vocabulary.values) < MAX_VOCABULARY,
    )
