"""Split off unusable rows, each with its reason."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.io.tables import Slice, describe_not_utf8, show_text
from schemas.contract import Column, Contract, find_not_utf8
from schemas.reasons import Reason
from schemas.rejects import REJECTS


def make_rejects(stage: str, keys: list[str], reason: Reason, details: list[str]) -> pa.Table:
    """Make a rejects (or defects) table of one reason."""
    return pa.table(
        {"stage": [stage] * len(keys), "key": keys, "reason": [reason.value] * len(keys), "detail": details},
        schema=REJECTS.schema,
    )


@dataclass(frozen=True)
class Fault:
    """A fault that makes rows of a table unusable.

    `rows`: bool [n]. `describe`: text of one of them, with column, value and remedy.
    """

    reason: Reason
    rows: np.ndarray
    describe: Callable[[int], str]


def find_unusable(table: pa.Table, contract: Contract) -> list[Fault]:
    """Return a fault for each column with unusable values.

    They are texts that are not UTF-8, or required values that are missing.
    """
    faults = []
    for column in contract.columns:
        wrong = find_not_utf8(table[column.name])
        if wrong is not None:
            faults.append(
                Fault(Reason.NOT_UTF8, wrong.to_numpy(zero_copy_only=False), _tell_not_utf8(table, column.name))
            )
    return faults + [
        Fault(Reason.null(column.name), pc.is_null(table[column.name]).to_numpy(), _tell_null(column))
        for column in contract.columns
        if not (column.nullable or column.optional) and table[column.name].null_count
    ]


def _tell_not_utf8(table: pa.Table, column: str) -> Callable[[int], str]:
    return lambda row: describe_not_utf8(column, table[column][row])


def _tell_null(column: Column) -> Callable[[int], str]:
    return lambda row: f"column '{column.name}' is null or blank. Give it a value ({column.doc}) or leave the row out."


def keep_usable(table: pa.Table, contract: Contract) -> pa.Table:
    """Return the rows in which `find_unusable` finds nothing."""
    bad = np.zeros(table.num_rows, dtype=bool)
    for fault in find_unusable(table, contract):
        bad |= fault.rows
    return table.filter(pa.array(~bad)) if bad.any() else table


def drop_faults(
    stage: str, where: Slice, table: pa.Table, contract: Contract, faults: Iterable[Fault]
) -> tuple[pa.Table, pa.Table]:
    """Split off unusable rows, each under its first fault.

    Returns (rows to keep, rejects). A reject names file, row, column and remedy.
    """
    bad = np.zeros(table.num_rows, dtype=bool)
    rejects = [REJECTS.schema.empty_table()]
    for fault in faults:
        rows = np.flatnonzero(fault.rows & ~bad)
        bad |= fault.rows
        keys, details = [], []
        for row in map(int, rows):
            values = [table[name][row] for name in contract.key]
            known = "/".join(show_text(value) for value in values if value.is_valid)
            keys.append(f"{contract.name}:{known or f'row {where.first_row + row} of {where.file}'}")
            details.append(f"{where.file}: row {where.first_row + row}: {fault.describe(row)}")
        rejects.append(make_rejects(stage, keys, fault.reason, details))
    return (table.filter(pa.array(~bad)) if bad.any() else table), pa.concat_tables(rejects)


def drop_unusable(stage: str, where: Slice, table: pa.Table, contract: Contract) -> tuple[pa.Table, pa.Table]:
    """Split off rows with missing or undecodable values.

    They lack a required value or have a text that is not UTF-8, see `drop_faults`.
    """
    return drop_faults(stage, where, table, contract, find_unusable(table, contract))
