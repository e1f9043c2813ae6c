"""Users' files: blank texts, texts that are not UTF-8, hidden, damaged and missing files, columns of one name."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.embed.resolve import CleanRows
from pipelines.inputs.catalog import read_catalog
from pipelines.inputs.logs import CleanEvents, read_times
from pipelines.inputs.users_and_stores import read_timezones, read_users
from pipelines.io import files, rejects
from pipelines.io.clock import latest_time
from pipelines.io.files import list_parquet
from pipelines.io.tables import Slice, Source, list_slices, read_slice
from pipelines.score.audience import find_candidates, read_audience, read_candidates
from pipelines.score.snapshot import read_log
from pipelines.shards.final_days import sample_days
from pipelines.shards.log_cache import hash_row_groups
from schemas.audience import AUDIENCE, CANDIDATES
from schemas.catalog import CATALOG
from schemas.contract import Contract, conform
from schemas.errors import InputError
from schemas.events import CLICKS, ORDERS
from schemas.users import STORES, USERS
from tests.pipelines.inputs.test_bad_tables import Data, put
from tests.pipelines.shards.test_examples import a_click, an_order
from tests.support.small_city import START, catalog_table, event_table, write_files

BLANK = ("", " ", "\t\n", "\u00a0", "\u3000 ")
LATIN = "Jos\u00e9".encode("latin-1")

TABLES: dict[str, tuple[Contract, Callable[[], pa.Table]]] = {
    "catalog": (CATALOG, catalog_table),
    "clicks": (CLICKS, lambda: event_table([a_click(n, START + n) for n in range(5)], CLICKS)),
    "orders": (ORDERS, lambda: event_table([an_order(n, START + n) for n in range(5)], ORDERS)),
    "users": (USERS, lambda: pa.table({"user_id": list("abcde"), "town": ["x"] * 5})),
    "stores": (STORES, lambda: pa.table({"store_id": list("abcde"), "timezone": ["UTC"] * 5})),
    "audience": (
        AUDIENCE,
        lambda: pa.table(
            {"audience_id": list("abcde"), "user_id": list("uvwxy"), "store_id": ["s"] * 5, "hour": [1] * 5}
        ),
    ),
    "candidates": (CANDIDATES, lambda: pa.table({"audience_id": list("abcde"), "item_id": list("vwxyz")})),
}


def bytes_as(kind: pa.DataType, values: list[bytes | None]) -> pa.Array:
    """Texts with unchecked bytes, which a careless writer passes as strings."""
    small = pa.array(values, pa.binary())
    texts = pa.Array.from_buffers(pa.string(), len(values), small.buffers())
    if pa.types.is_dictionary(kind):
        return pa.DictionaryArray.from_arrays(pa.array(range(len(values)), pa.int8()), texts.cast(kind.value_type))
    return texts.cast(kind)


def latin(table: pa.Table, name: str, row: int, kind: pa.DataType | None = None) -> pa.Table:
    """`table` with a Latin-1 text in one row of a column."""
    kind = kind or pa.string()
    column = table[name] if name in table.column_names else pa.chunked_array([["x"] * table.num_rows])
    values = [None if value is None else str(value).encode() for value in column.to_pylist()]
    values[row] = LATIN
    return put(table, name, bytes_as(kind, values))


def clean(contract: Contract, path: Path, table: pa.Table) -> tuple[pa.Table, list[dict[str, Any]]]:
    """(rows that a log's or the catalog's cleaning keeps, its rejects), as the jobs of shards and embed run it."""
    write_files(path, contract.name, table)
    where = list_slices(Source.find(str(path), contract))[0]
    step = CleanRows() if contract is CATALOG else CleanEvents("shards", contract, latest_time())
    found = list(step.process((where, read_slice(where, contract))))
    rejects = [one.value for one in found[1:] if one.tag == "rejects"]
    return found[0], [row for piece in rejects for row in piece.to_pylist()]


# --- blank texts


@pytest.mark.parametrize(
    ("name", "column"),
    [
        (name, column.name)
        for name in ("catalog", "clicks", "orders")
        for column in TABLES[name][0].columns
        if column.type == pa.string() and not (column.nullable or column.optional)
    ],
)
def test_a_row_with_a_blank_id_is_a_reject_like_one_with_null(tmp_path: Path, name: str, column: str) -> None:
    contract, make = TABLES[name]
    table = make()
    values = table[column].to_pylist()
    values[1], values[3] = "", " \t"
    kept, rejects = clean(contract, tmp_path, put(table, column, pa.array(values)))
    assert kept.num_rows == 3
    assert {row["reason"] for row in rejects} == {f"null_{column}"}
    for reject, row in zip(rejects, (1, 3), strict=True):
        assert f"row {row}: column '{column}' is null or blank." in reject["detail"]
    assert all(f"{name}.parquet: row" in row["detail"] for row in rejects)
    assert all(row["key"].startswith(f"{name}:") and not row["key"].endswith(":") for row in rejects)


def test_blank_texts_of_the_catalog_are_missing_ones_and_others_stay_as_they_are(tmp_path: Path) -> None:
    """A listing of the store '' would be in no store's scores, those of the brand '' would share their counts."""
    table = catalog_table()
    for name in ("store_id", "product_key", "brand", "subcategory", "category", "image_uri"):
        table = put(table, name, pa.array(["", " s ", "s", "\u3000", None]))
    write_files(tmp_path, "catalog", table)
    rows, rejects, _ = read_catalog("shards", Source.find(str(tmp_path), CATALOG))
    assert rejects.num_rows == 0
    for name in ("store_id", "product_key", "brand", "subcategory", "category", "image_uri"):
        assert rows[name].to_pylist() == [None, " s ", "s", None, None]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int8(), pa.large_string())])
def test_conform_finds_every_blank(kind: pa.DataType) -> None:
    users = pa.table({"user_id": pa.array([*BLANK, None, "a", " a ", "\u200b", "0"], pa.string()).cast(kind)})
    found = conform(users, USERS, "users.parquet")["user_id"]
    assert found.to_pylist() == [None] * 6 + ["a", " a ", "\u200b", "0"]


def test_conform_finds_blanks_beside_texts_that_are_not_utf8() -> None:
    users = pa.table({"user_id": bytes_as(pa.string(), [b"\xff", b"", b"\xe9 ", b" ", b"a"])})
    assert conform(users, USERS, "users.parquet")["user_id"].is_null().to_pylist() == [False, True, False, True, False]


def test_score_reads_a_log_without_its_blank_users(tmp_path: Path) -> None:
    clicks = TABLES["clicks"][1]()
    write_files(tmp_path, "clicks", put(clicks, "user_id", pa.array(["u0", "", "u1", " ", "u0"])))
    log, rejects, counts = read_log("score", Source.find(str(tmp_path), CLICKS))
    assert sorted(log.texts["user_id"].to_pylist()) == ["u0", "u1"]
    assert len(log.events) == 3 and sum(table.num_rows for table in rejects) == 2
    assert [count.rows for count in counts if count.where == "rejected"] == [2]


@pytest.mark.parametrize(
    ("name", "column", "read"),
    [
        ("users", "user_id", read_users),
        ("stores", "store_id", lambda data: read_timezones(data, "UTC")),
        ("audience", "audience_id", read_audience),
        ("audience", "store_id", read_audience),
    ],
)
def test_a_blank_id_of_a_small_table_ends_the_run(
    tmp_path: Path, name: str, column: str, read: Callable[[str], Any]
) -> None:
    table = TABLES[name][1]()
    write_files(tmp_path, name, put(table, column, pa.array(["a", "b", "  ", "d", "e"])))
    words = rf"{name}.parquet: row 2: column '{column}' of table '{name}' is null or blank. Give it a value"
    with pytest.raises(InputError, match=words):
        read(str(tmp_path))


def test_a_blank_user_of_the_audience_is_anybody_and_a_blank_candidate_nobody(tmp_path: Path) -> None:
    write_files(tmp_path, "audience", put(TABLES["audience"][1](), "user_id", pa.array(["", "u", " ", None, "v"])))
    found = read_audience(str(tmp_path))
    assert found is not None and found[0]["user_id"].to_pylist() == [None, "u", None, None, "v"]
    write_files(tmp_path, "candidates", pa.table({"audience_id": ["a", "", "b"], "item_id": ["v", "v", " "]}))
    ids = pa.chunked_array([["a", "b"]])
    candidates = read_candidates(Source.find(str(tmp_path), CANDIDATES), ids, pa.chunked_array([["v"]]))
    assert candidates is not None and candidates.unknown == 2
    assert candidates.pairs.tolist() == [[0, 0]]


# --- texts that are not UTF-8

TEXTS = [
    (name, column.name)
    for name in ("catalog", "clicks", "orders")
    for column in TABLES[name][0].columns
    if column.type == pa.string()
]


@pytest.mark.parametrize(("name", "column"), TEXTS)
def test_a_row_with_a_text_that_is_not_utf8_is_a_reject(tmp_path: Path, name: str, column: str) -> None:
    contract, make = TABLES[name]
    kept, rejects = clean(contract, tmp_path, latin(make(), column, 3))
    assert kept.num_rows == 4
    (reject,) = rejects
    assert reject["reason"] == "not_utf8"
    assert f"{name}.parquet: row 3: column '{column}' is not UTF-8: 'Jos\\xe9'. Convert" in reject["detail"]
    # Nothing is left that ends a later stage.
    assert kept.to_pylist()


@pytest.mark.parametrize(
    "kind",
    [
        pa.large_string(),
        pa.string_view(),
        pa.dictionary(pa.int8(), pa.string()),
        pa.dictionary(pa.int8(), pa.large_string()),
    ],
)
def test_every_kind_of_text_is_looked_at(tmp_path: Path, kind: pa.DataType) -> None:
    """Of a dictionary (a category of pandas) Arrow refuses to read any row."""
    kept, (reject,) = clean(CLICKS, tmp_path, latin(TABLES["clicks"][1](), "user_id", 2, kind))
    assert kept["exposure_id"].to_pylist() == ["e0", "e1", "e3", "e4"]
    assert (reject["key"], reject["reason"]) == ("clicks:e2", "not_utf8")


def test_score_and_the_sample_of_days_pass_over_rows_that_are_not_utf8(tmp_path: Path) -> None:
    table = latin(latin(TABLES["clicks"][1](), "user_id", 0), "exposure_id", 1)
    write_files(tmp_path, "clicks", table)
    source = Source.find(str(tmp_path), CLICKS)
    log, rejects, _ = read_log("score", source)
    assert len(log.events) == 3 and sum(piece.num_rows for piece in rejects) == 2
    assert sample_days(CLICKS, list_slices(source), latest_time())
    assert len(hash_row_groups(source)) == 1 and len(read_times(source, latest_time())) == 5
    write_files(tmp_path, "catalog", latin(catalog_table(), "brand", 2))
    rows, bad, counts = read_catalog("shards", Source.find(str(tmp_path), CATALOG))
    assert rows["item_id"].to_pylist() == ["i0", "i1", "i2", "i9"]
    assert bad["key"].to_pylist() == ["catalog:i10"] and counts["rejected"] == 1


@pytest.mark.parametrize(
    ("name", "column", "read"),
    [
        ("users", "user_id", read_users),
        ("users", "town", read_users),
        ("stores", "timezone", lambda data: read_timezones(data, "UTC")),
        ("audience", "user_id", read_audience),
        ("audience", "member", read_audience),
        (
            "candidates",
            "item_id",
            lambda data: read_candidates(
                Source.find(data, CANDIDATES), pa.chunked_array([[""]]), pa.chunked_array([[""]])
            ),
        ),
    ],
)
@pytest.mark.parametrize("kind", [pa.string(), pa.dictionary(pa.int8(), pa.large_string())])
def test_a_small_table_with_a_text_that_is_not_utf8_names_the_row(
    tmp_path: Path, name: str, column: str, read: Callable[[str], Any], kind: pa.DataType
) -> None:
    write_files(tmp_path, name, latin(TABLES[name][1](), column, 4, kind))
    with pytest.raises(
        InputError, match=rf"{name}.parquet: row 4: column '{column}' is not UTF-8: 'Jos\\xe9'. Convert"
    ):
        read(str(tmp_path))


def test_a_latin_title_is_a_reject_of_the_whole_run(tmp_path: Path) -> None:
    data = Data(tmp_path)
    catalog = data.tables["catalog"]
    more = latin(put(catalog.slice(0, 1), "item_id", pa.array(["new"])), "title", 0)
    data.tables["catalog"] = pa.concat_tables([catalog, more.cast(catalog.schema)])
    clicks = data.tables["clicks"]
    data.tables["clicks"] = latin(latin(clicks, "user_id", 5), "session_id", 7)
    assert data.shards("--max_reject_rate", "0.2") == 0
    rejects = {row["key"]: row for row in data.rejects()}
    assert set(rejects) == {"catalog:new", "clicks:e5", "clicks:e7"}
    assert {row["reason"] for row in rejects.values()} == {"not_utf8"}
    assert data.counts("clicks")["rejected"] == 2


# --- hidden files

HIDDEN = ("_temporary/0/a.parquet", ".spark-staging-1/x=1/a.parquet", "_part-9.parquet", ".part-9.parquet")
SHOWN = ("part-0.parquet", "x=1/part-0.parquet", "_x=1/y_=2/part-0.parquet")


@pytest.mark.parametrize("folder", ["clicks", "clicks.parquet"])
@pytest.mark.parametrize("above", ["data", ".hidden/_under/data"])
def test_hidden_names_below_a_table_are_passed_over(tmp_path: Path, folder: str, above: str) -> None:
    root = tmp_path / above / folder
    for name in (*HIDDEN, *SHOWN, "x=1/.b.parquet", "x=1/_tmp/b.parquet", "c.parquet._COPYING_"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(TABLES["clicks"][1](), root / name)
    (root / "_SUCCESS").touch()
    assert list_parquet(str(tmp_path / above / "clicks"), "clicks") == sorted(str(root / name) for name in SHOWN)
    assert Source.find(str(tmp_path / above), CLICKS).rows == 15


def test_hidden_names_of_a_bucket_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    root = "gs://_city/.data/clicks"
    there = [files.Found(f"{root}/{name}", 1, 0.0) for name in (*HIDDEN, *SHOWN)]
    monkeypatch.setattr(files, "find", lambda paths: [])
    monkeypatch.setattr(files, "match", lambda name, pattern: there if name == root else [])
    assert list_parquet(root, "clicks") == sorted(f"{root}/{name}" for name in SHOWN)


def test_a_table_with_nothing_but_hidden_files_is_missing(tmp_path: Path) -> None:
    for name in HIDDEN:
        (tmp_path / "clicks.parquet" / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(TABLES["clicks"][1](), tmp_path / "clicks.parquet" / name)
    words = (
        r"table 'clicks' is missing.*clicks.parquet is a directory without any; names that begin with _ or \. do not"
    )
    with pytest.raises(InputError, match=words):
        Source.find(str(tmp_path), CLICKS)


def test_partitions_behind_symbolic_links_are_read(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "clicks").mkdir()
    pq.write_table(TABLES["clicks"][1](), tmp_path / "elsewhere" / "a.parquet")
    (tmp_path / "clicks" / "day=1").symlink_to(tmp_path / "elsewhere")
    assert Source.find(str(tmp_path), CLICKS).rows == 5
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "clicks")
    with pytest.raises(InputError, match="a symbolic link leads back to"):
        Source.find(str(tmp_path), CLICKS)


# --- files that cannot be read


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200])


def damage(path: Path) -> None:
    """Bytes of the first page, not of the footer."""
    data = bytearray(path.read_bytes())
    data[20:60] = b"\xff" * 40
    path.write_bytes(data)


def empty_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def broken_link(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.parent / "nowhere")


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def encrypted(path: Path) -> None:
    path.write_bytes(b"PARE" + bytes(100) + b"\x10\0\0\0PARE")


SPOILED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut off": (cut, "cannot be read"),
    "empty": (lambda path: path.write_bytes(b""), r"cannot be read \(Parquet file size is 0 bytes\). Write it again"),
    "no Parquet": (lambda path: path.write_text("user_id,town\n"), "cannot be read"),
    "damaged": (damage, "row group 0: column '.*' of table '.*' cannot be read"),
    "encrypted": (encrypted, "cannot be read .*encrypted.* Write it without encryption"),
    "an empty directory": (empty_directory, "is a directory without any"),
    "a broken link": (broken_link, "is a symbolic link to .*nowhere, where nothing is"),
    "a pipe": (pipe, "is no plain file"),
}
READ: dict[str, Callable[[str], Any]] = {
    "catalog": lambda data: read_catalog("shards", Source.find(data, CATALOG)),
    "clicks": lambda data: read_log("score", Source.find(data, CLICKS)),
    "users": read_users,
    "stores": lambda data: read_timezones(data, "UTC"),
    "audience": read_audience,
    "candidates": lambda data: (found := find_candidates(data)) and found.read_all(),
}


@pytest.mark.parametrize("case", SPOILED)
@pytest.mark.parametrize("name", READ)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str, case: str) -> None:
    """Optional tables too: an unreadable table of users must not count as a missing one."""
    write_files(tmp_path, name, TABLES[name][1]())
    spoil, words = SPOILED[case]
    spoil(tmp_path / f"{name}.parquet")
    with pytest.raises(InputError, match=rf"{name}.parquet.*{words}") as caught:
        READ[name](str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_page_that_fails_its_checksum_is_no_data(tmp_path: Path) -> None:
    """One bit of a price: without its checksum the page would be read as it is."""
    path = tmp_path / "catalog.parquet"
    table = put(catalog_table(), "price", pa.array(np.full(5, 2.5), pa.float32()))
    pq.write_table(table, path, write_page_checksum=True, compression="none", use_dictionary=False)
    data = path.read_bytes()
    place = data.index(np.float32(2.5).tobytes() * 5)
    path.write_bytes(data[: place + 3] + bytes([data[place + 3] ^ 1]) + data[place + 4 :])
    with pytest.raises(InputError, match="catalog.parquet: row group 0: column 'price' of table 'catalog' .*checksum"):
        read_slice(Slice(str(path), 0, 0), CATALOG)


def test_a_file_may_go_between_listing_and_reading(tmp_path: Path) -> None:
    write_files(tmp_path, "clicks", TABLES["clicks"][1]())
    source = Source.find(str(tmp_path), CLICKS)
    (tmp_path / "clicks.parquet").unlink()
    for read in (list_slices, hash_row_groups, lambda found: read_times(found, latest_time())):
        with pytest.raises(InputError, match="clicks.parquet: No such file or directory. Check the path"):
            read(source)


def test_a_directory_that_may_not_be_listed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files would be missing silently. (The user who runs the tests may have every right.)"""
    write_files(tmp_path, "clicks", TABLES["clicks"][1](), files=2)
    scan = os.scandir

    def refuse(path: str) -> Any:
        if "deep" in str(path):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    (tmp_path / "clicks" / "deep").mkdir()
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(InputError, match="clicks/deep: Permission denied. Give the user"):
        Source.find(str(tmp_path), CLICKS)


@pytest.mark.skipif(sys.platform == "darwin", reason="its file systems hold no such names")
def test_names_that_are_not_utf8_are_refused(tmp_path: Path) -> None:
    (tmp_path / "clicks").mkdir()
    path = os.fsencode(tmp_path / "clicks") + b"/caf\xe9.parquet"
    plain = tmp_path / "plain.parquet"
    pq.write_table(TABLES["clicks"][1](), plain, store_schema=False)
    os.rename(plain, path)
    with pytest.raises(InputError, match=r"clicks/caf\\xe9.parquet: table 'clicks': the file's path is not UTF-8"):
        Source.find(str(tmp_path), CLICKS)
    with open(path, "rb") as handle:
        data = handle.read()
    os.remove(path)
    (tmp_path / "clicks" / "a.parquet").write_bytes(data.replace(b"position", b"positi\xe9n"))
    with pytest.raises(
        InputError, match=r"clicks/a.parquet: table 'clicks' cannot be read \(a name or text in it is not"
    ):
        Source.find(str(tmp_path), CLICKS)


@pytest.mark.parametrize("name", TABLES)
def test_a_column_that_is_there_twice_is_named(tmp_path: Path, name: str) -> None:
    contract, make = TABLES[name]
    table = make()
    first = table.column_names[0]
    pq.write_table(table.append_column(first, table[first]), tmp_path / f"{name}.parquet")
    words = rf"{name}.parquet: column '{first}' of table '{name}' is there more than once. Keep one of them"
    with pytest.raises(InputError, match=words):
        Source.find(str(tmp_path), contract)
    other = table.append_column(first.upper(), table[first])
    pq.write_table(other, tmp_path / f"{name}.parquet")
    assert Source.find(str(tmp_path), contract).rows == 5


def test_checks_of_texts_leave_good_ones_untouched() -> None:
    """Nothing is copied where nothing is wrong: 2M clicks are ten million texts."""
    table = TABLES["clicks"][1]()
    found = conform(table, CLICKS, "clicks.parquet")
    for name in ("exposure_id", "user_id"):
        assert found[name].chunk(0).buffers()[2].address == table[name].chunk(0).buffers()[2].address
    assert rejects.find_unusable(found, CLICKS) == []
