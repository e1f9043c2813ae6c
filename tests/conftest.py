"""Settings of Hypothesis, and the order of the tests.

CI repeats the same cases, so that only the change under test can make it fail. Other runs draw new
ones.
"""

import os
from collections import Counter

import pytest
from hypothesis import settings

settings.register_profile("ci", derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put files with the most long tests first.

    Started last, one of them would keep one worker busy when all others have nothing left.
    """
    long = Counter(item.path for item in items if item.get_closest_marker("slow") or item.get_closest_marker("flink"))
    items.sort(key=lambda item: -long[item.path])
