"""Find the tables that `shards` and `score` read."""

from dataclasses import dataclass

import pyarrow as pa

from pipelines.inputs.users_and_stores import read_timezones, read_users
from pipelines.io.tables import Source
from schemas.catalog import CATALOG
from schemas.events import CLICKS, ORDERS


@dataclass(frozen=True, kw_only=True)
class DataTables:
    """The tables of a data directory.

    Catalog and logs are found but not read. The small tables are read and checked.
    """

    catalog: Source
    clicks: Source
    orders: Source
    users: pa.Table
    """Empty where there is no such table"""
    timezones: dict[str, str]
    """IANA zone by store_id"""
    sources: dict[str, Source]
    """Those that are there, by name"""

    @classmethod
    def find(cls, data: str, timezone: str) -> "DataTables":
        """Find the tables in a data directory.

        Args:
            data: the directory.
            timezone: IANA zone of stores that have none.

        Raises:
            InputError: a table that is needed is missing, or one cannot be used.
        """
        catalog, clicks, orders = (Source.find(data, contract) for contract in (CATALOG, CLICKS, ORDERS))
        users, users_source = read_users(data)
        timezones, stores_source = read_timezones(data, timezone)
        sources = {"catalog": catalog, "clicks": clicks, "orders": orders}
        sources |= {"users": users_source} if users_source is not None else {}
        sources |= {"stores": stores_source} if stores_source is not None else {}
        return cls(catalog=catalog, clicks=clicks, orders=orders, users=users, timezones=timezones, sources=sources)
