"""Contracts of tables, and checks of files against them.

A `Contract` is a named pyarrow schema with its key and its optional columns. `conform` casts what
can be cast without loss (integer ids to strings, zoned times to UTC, int32 to int64, float32 to
float64, ...), numbers to float32 where the model reads no more, and raises `InputError`, naming
file, column and remedy, for anything else. A blank text (empty, or only white space) counts as
missing, in every column of a contract. Other texts stay unchanged, including white space around
them.
"""

import hashlib
from collections import Counter
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from schemas.errors import InputError

TIMESTAMP = pa.timestamp("us")
"""Every time in every table: microseconds, UTC, written without a zone."""
SCHEMA_VERSION = 1
"""Raised by one whenever a published table changes incompatibly for old readers. Written into every manifest."""


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of a contract.

    It has a type, whether rows may lack a value, whether files may lack the column, and its meaning
    with unit.
    """

    name: str
    type: pa.DataType
    doc: str
    nullable: bool = False
    optional: bool = False


@dataclass(frozen=True, kw_only=True)
class Contract:
    """The contract of a table.

    It has columns, the key that identifies a row, and whether further columns are read.
    """

    name: str
    doc: str
    columns: tuple[Column, ...]
    key: tuple[str, ...]
    extra_columns: bool = False

    @property
    def schema(self) -> pa.Schema:
        """Return the pyarrow schema of every column.

        Optional ones are included, with nullability.
        """
        return pa.schema([pa.field(c.name, c.type, nullable=c.nullable or c.optional) for c in self.columns])

    @property
    def names(self) -> list[str]:
        """Return the column names in schema order."""
        return [c.name for c in self.columns]

    def fingerprint(self) -> str:
        """Return a fingerprint of the columns.

        It is the first 16 hex digits of the sha256 of names, types and nullability: contracts with
        equal fingerprints can read each other's files.
        """
        text = "\n".join(f"{f.name}:{f.type}:{f.nullable}" for f in self.schema)
        return hashlib.sha256(f"{self.name}\n{text}".encode()).hexdigest()[:16]


def cast_without_loss(array: pa.ChunkedArray, target: pa.DataType) -> pa.ChunkedArray:
    """Cast to `target` if no value changes.

    Strings are never parsed into numbers or times, floats never become ids, and zoned times become
    UTC.

    Raises:
        pa.ArrowInvalid, pa.ArrowNotImplementedError: a value would change.
    """
    array = without_dictionary(array)
    source = array.type
    if source == target or pa.types.is_null(source):
        return array.cast(target)
    widenings = {
        "string": is_text(source) or pa.types.is_integer(source),
        "large_string": is_text(source) or pa.types.is_integer(source),
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
        # The stored instant is UTC already. Dropping the zone keeps the instant.
        array = array.cast(pa.timestamp(source.unit, tz="UTC")).cast(pa.timestamp(source.unit))
    if (pa.types.is_floating(source) or pa.types.is_integer(source)) and str(target) == "float":
        # The model reads float32: numbers of every type are rounded to it, rather than rejected for their last digits.
        return array.cast(target, safe=False)
    return array.cast(target)


def is_text(kind: pa.DataType) -> bool:
    """Return whether a type is one of Arrow's strings."""
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def without_dictionary(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return a column's values themselves where it is dictionary-encoded."""
    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column


def find_not_utf8(column: pa.ChunkedArray) -> pa.BooleanArray | None:
    """Find the rows whose text is not UTF-8, bool [n].

    Arrow writes and reads such texts unchanged and fails, without naming a row, where the first of
    them becomes a Python string. None where there are none, or where the column is no text.
    """
    column = without_dictionary(column)
    if not is_text(column.type):
        return None
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        return pa.array([not _is_utf8(value) for value in column.cast(pa.large_binary()).to_pylist()], pa.bool_())
    return None


def _is_utf8(value: bytes | None) -> bool:
    try:
        if value is not None:
            value.decode()
    except UnicodeDecodeError:
        return False
    return True


def blank_to_null(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return a string column with null for blank texts.

    These are empty or only white space.
    """
    try:
        blank = pc.utf8_is_space(column)
    except pa.ArrowInvalid:
        blank = pc.utf8_is_space(pc.if_else(find_not_utf8(column), "?", column))
    blank = pc.or_(blank, pc.equal(pc.binary_length(column), 0))
    return pc.if_else(blank, pa.scalar(None, column.type), column) if pc.any(blank).as_py() else column


def conform(table: pa.Table, contract: Contract, file: str) -> pa.Table:
    """Return `table` with the contract's columns and types.

    Columns are in the contract's order. Optional columns that the file lacks are null.

    Nulls in required columns are left in place, and so are texts that are not UTF-8: the stages
    turn such rows into rejects. Blank texts become null. Columns beyond the contract are dropped
    unless `contract.extra_columns`, in which case they follow unchanged.

    Raises:
        InputError: two columns share a name, a required one is missing, or a column's type does not
            widen losslessly to the contract's.
    """
    repeated = [name for name, count in Counter(table.column_names).items() if count > 1]
    if repeated:
        raise InputError(
            f"{file}: column '{repeated[0]}' of table '{contract.name}' is there more than once. "
            "Keep one of them, or give the others their own names."
        )
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
                f"{file}: column '{column.name}' of table '{contract.name}' is missing (found: "
                f"{', '.join(table.column_names)}). "
                f"Add it as {column.type}: {column.doc}"
            )
        source = table[column.name]
        try:
            values = cast_without_loss(source, column.type)
            arrays.append(blank_to_null(values) if is_text(column.type) else values)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise InputError(
                f"{file}: column '{column.name}' of table '{contract.name}' has type "
                f"{source.type}, which cannot become "
                f"{column.type} without loss ({error}). Write it as {column.type}: {column.doc}"
            ) from error
    if contract.extra_columns:
        for name in table.column_names:
            if name not in contract.names:
                arrays.append(table[name])
                fields.append(pa.field(name, table[name].type))
    return pa.table(arrays, schema=pa.schema(fields))


def check_output(table: pa.Table, contract: Contract) -> pa.Table:
    """Check that an output table meets its contract exactly.

    It is called before writing. The table must have the same columns, the same types, and no nulls
    in required columns.

    Raises:
        InputError: naming the table, the column and the first offending key (a bug in a stage, not in
            the user's data).
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
    """Make a string column.

    Ids: integers are widened to strings.
    """
    return Column(name=name, type=pa.string(), doc=doc, nullable=nullable, optional=optional)
