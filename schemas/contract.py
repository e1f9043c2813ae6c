"""What a table promises, and how a file is held to it.

A `Contract` is a named pyarrow schema with its key and its optional columns. `conform` casts what can be cast without loss
(integer ids to strings, zoned times to UTC, int32 to int64, float32 to float64, ...), numbers to float32 where the model reads no more, and raises `InputError`, naming file,
column and remedy, for anything else.
"""

import hashlib
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

TIMESTAMP = pa.timestamp("us")
"""Every time in every table: microseconds, UTC, written without a zone."""

SCHEMA_VERSION = 1
"""Raised when a published table changes in a way that old readers cannot follow; written into every manifest."""


class InputError(ValueError):
    """Input that cannot be used at all. The message names the file, the column, the row's key where there is one, and the remedy."""


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column: its type, whether rows may lack a value, whether files may lack the column, and its meaning with unit."""

    name: str
    type: pa.DataType
    doc: str
    nullable: bool = False
    optional: bool = False


@dataclass(frozen=True, kw_only=True)
class Contract:
    """A table's promise: columns, the key that identifies a row, and whether columns beyond these are read."""

    name: str
    doc: str
    columns: tuple[Column, ...]
    key: tuple[str, ...]
    extra_columns: bool = False

    @property
    def schema(self) -> pa.Schema:
        """pyarrow schema of every column, optional ones included, with nullability."""
        return pa.schema([pa.field(c.name, c.type, nullable=c.nullable or c.optional) for c in self.columns])

    @property
    def names(self) -> list[str]:
        """Column names in schema order."""
        return [c.name for c in self.columns]

    def fingerprint(self) -> str:
        """First 16 hex digits of the sha256 of names, types and nullability: two equal ones can read each other's files."""
        text = "\n".join(f"{f.name}:{f.type}:{f.nullable}" for f in self.schema)
        return hashlib.sha256(f"{self.name}\n{text}".encode()).hexdigest()[:16]


def cast_without_loss(array: pa.ChunkedArray, target: pa.DataType) -> pa.ChunkedArray:
    """Cast to `target` if no value changes; raises pa.ArrowInvalid or pa.ArrowNotImplementedError otherwise.

    Strings are never parsed into numbers or times, floats never become ids, and zoned times become UTC.
    """
    source = array.type
    if pa.types.is_dictionary(source):
        array = array.cast(source.value_type)
        source = array.type
    if source == target or pa.types.is_null(source):
        return array.cast(target)
    string_like = pa.types.is_string(source) or pa.types.is_large_string(source) or pa.types.is_string_view(source)
    widenings = {
        "string": string_like or pa.types.is_integer(source),
        "large_string": string_like or pa.types.is_integer(source),
        "binary": pa.types.is_binary(source) or pa.types.is_large_binary(source) or pa.types.is_binary_view(source),
        "double": pa.types.is_floating(source) or pa.types.is_integer(source),
        "float": pa.types.is_floating(source) or pa.types.is_integer(source),
        "int64": pa.types.is_integer(source) or pa.types.is_floating(source),
        "int32": pa.types.is_integer(source),
    }
    allowed = widenings.get(str(target), False) or (pa.types.is_timestamp(target) and pa.types.is_timestamp(source))
    if not allowed:
        raise pa.ArrowInvalid(f"{source} does not widen to {target}")
    if pa.types.is_timestamp(source) and source.tz is not None:
        # The stored instant is UTC already; dropping the zone keeps the instant.
        array = array.cast(pa.timestamp(source.unit, tz="UTC")).cast(pa.timestamp(source.unit))
    if (pa.types.is_floating(source) or pa.types.is_integer(source)) and str(target) == "float":
        # A float32 is what the model reads; how a price is written must not tell whether its last digits are lost.
        return array.cast(target, safe=False)
    return array.cast(target)


def conform(table: pa.Table, contract: Contract, file: str) -> pa.Table:
    """Return `table` with the contract's columns and types, in order; optional columns that the file lacks are null.

    Nulls in required columns are left in place: the stages turn such rows into rejects. Columns beyond the contract are dropped
    unless `contract.extra_columns`, in which case they follow as they are.

    Raises:
        InputError: a required column is missing, or a column's type does not widen losslessly to the contract's.
    """
    arrays: list[pa.ChunkedArray | pa.Array] = []
    fields: list[pa.Field] = []
    for column in contract.columns:
        # Reading is lenient about nulls so that one bad row is a reject, not the end of the run.
        fields.append(pa.field(column.name, column.type, nullable=True))
        if column.name not in table.column_names:
            if column.optional:
                arrays.append(pa.nulls(table.num_rows, column.type))
                continue
            raise InputError(
                f"{file}: column '{column.name}' of table '{contract.name}' is missing (found: {', '.join(table.column_names)}). "
                f"Add it as {column.type}: {column.doc}"
            )
        source = table[column.name]
        try:
            arrays.append(cast_without_loss(source, column.type))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise InputError(
                f"{file}: column '{column.name}' of table '{contract.name}' has type {source.type}, which cannot become "
                f"{column.type} without loss ({error}). Write it as {column.type}: {column.doc}"
            ) from error
    if contract.extra_columns:
        for name in table.column_names:
            if name not in contract.names:
                arrays.append(table[name])
                fields.append(pa.field(name, table[name].type))
    return pa.table(arrays, schema=pa.schema(fields))


def check_output(table: pa.Table, contract: Contract) -> pa.Table:
    """Hold a table that is about to be written to its contract exactly: same columns, same types, no nulls where none may be.

    Raises:
        InputError: naming the table, the column and the first offending key (a bug in a stage, not in the user's data).
    """
    if table.column_names != contract.names:
        raise InputError(f"table '{contract.name}': columns are {table.column_names}, contract says {contract.names}")
    for column in contract.columns:
        array = table[column.name]
        if array.type != column.type:
            raise InputError(
                f"table '{contract.name}': column '{column.name}' is {array.type}, contract says {column.type}"
            )
        if not (column.nullable or column.optional) and array.null_count:
            row = pc.index(pc.is_null(array), value=True).as_py()
            keys = {name: table[name][row].as_py() for name in contract.key}
            raise InputError(f"table '{contract.name}': null in column '{column.name}' at {keys}")
    return table.cast(contract.schema)


def text_column(name: str, doc: str, *, nullable: bool = False, optional: bool = False) -> Column:
    """A string column (ids: integers are widened to strings)."""
    return Column(name=name, type=pa.string(), doc=doc, nullable=nullable, optional=optional)
