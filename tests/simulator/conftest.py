"""One tiny city, made once, read by every test of the simulator."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from simulator.catalog import Catalog, make_catalog
from simulator.classes import make_classes
from simulator.config import PRESETS, CityConfig
from simulator.generate import CitySummary, generate_city


class City(NamedTuple):
    """A made city: where it is, its configuration, its summary, and its catalog as arrays."""

    path: Path
    config: CityConfig
    summary: CitySummary
    catalog: Catalog


@pytest.fixture(scope="session")
def city(tmp_path_factory: pytest.TempPathFactory) -> Iterator[City]:
    """The tiny preset."""
    config = PRESETS["tiny"]
    path = tmp_path_factory.mktemp("city") / "data"
    summary, made = generate_city(path, config)
    assert made
    yield City(path, config, summary, make_catalog(make_classes(config), config))
