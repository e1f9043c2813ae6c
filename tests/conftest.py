"""Settings of Hypothesis, the order of the tests, and object stores for those that need them.

CI repeats the same cases, so that only the change under test can make it fail. Other runs draw new
ones.
"""

import os
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from tests.support.object_stores import LocalStores

settings.register_profile("ci", derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put files with the most long tests first.

    Started last, one of them would keep one worker busy when all others have nothing left.
    """
    long = Counter(item.path for item in items if item.get_closest_marker("slow") or item.get_closest_marker("flink"))
    items.sort(key=lambda item: -long[item.path])


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[LocalStores]":
    """Both object stores, of a file's tests alone."""
    # Their clients are large: only these tests pay for them.
    from tests.support.object_stores import running_stores

    with running_stores(tmp_path_factory.mktemp("stores")) as running:
        yield running
