"""Nights with every path on gs:// and on s3://: the rows of a local disk, whatever happens to requests."""

import datetime
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from benchmarks.support.counting_proxy import CountingProxy
from pipelines import cli
from pipelines.io import files, object_client, objects
from pipelines.runs import garbage
from pipelines.runs.manifest import read_latest
from pipelines.runs.night_record import read_nights
from pipelines.runs.publication import publications
from tests.support.object_stores import LocalStores
from tests.support.published_rows import assert_same, assert_scores_close, latest
from tests.support.tiny_encoders import write_text_model, write_timm_model

pytestmark = [pytest.mark.slow, pytest.mark.objects]

OUTPUTS = ("store", "shards", "model", "scores")
NEW_LISTINGS = 7
FAULTS: tuple[int | str, ...] = (503, 429, 500, "reset", "short", "lost")
Run = Callable[..., dict[str, Any]]


class City:
    """A tiny city as of two nights, on a local disk, and what its two nights made of it there."""

    def __init__(self, root: Path) -> None:
        self.root = root
        assert cli.main(["simulate", "--out", str(root / "two"), "--preset", "tiny"]) == 0
        shutil.copytree(root / "two", root / "one")
        self._go_back()
        encoders = {"image_weights": write_timm_model(root / "resnet", "resnet18")}
        encoders["text_encoder"] = write_text_model(root / "xlm", "xlm-roberta")
        self.encoders = "".join(f'{name} = "{path}"\n' for name, path in encoders.items())

    def _go_back(self) -> None:
        """Take the last day's events and some listings, which nobody had clicked yet, from the first night."""
        clicks, orders = (pq.read_table(self.root / "one" / f"{name}.parquet") for name in ("clicks", "orders"))
        end = pc.max(clicks["clicked_at"]).as_py() - datetime.timedelta(days=1)
        catalog = pq.read_table(self.root / "one" / "catalog.parquet")
        for name, table, time in (("clicks", clicks, "clicked_at"), ("orders", orders, "ordered_at")):
            kept = table.filter(pc.less(table[time], pa.scalar(end, table.schema.field(time).type)))
            assert 0 < kept.num_rows < table.num_rows
            pq.write_table(kept, self.root / "one" / f"{name}.parquet")
        pq.write_table(catalog.slice(NEW_LISTINGS), self.root / "one" / "catalog.parquet")

    def config(self, place: str) -> Path:
        """Write the config of nights at a place."""
        path = self.root / f"{place.replace(':', '').replace('/', '-')}.toml"
        path.write_text(
            f'data = "{place}/data"\nwork = "{place}/work"\nbeam = ["--direct_num_workers=1"]\n'
            "[retrain]\nevery_days = 0.5\nchallenge = false\n"
            f'[embed]\nimage_root = "{place}/data"\ngrid = 2\nmax_tokens = 16\nprecision = "fp32"\n{self.encoders}'
        )
        return path

    def bring(self, night: str, place: str) -> None:
        """Put the tables and photos as of a night to a place."""
        for path in sorted(path for path in (self.root / night).rglob("*") if path.is_file()):
            inner = str(path.relative_to(self.root / night))
            if night == "one" or path.suffix == ".parquet":
                with files.atomic_write(files.join(place, "data", *inner.split("/"))) as sink:
                    sink.write(path.read_bytes())


@pytest.fixture(scope="module")
def city(tmp_path_factory: pytest.TempPathFactory) -> City:
    return City(tmp_path_factory.mktemp("city"))


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    def run(*argv: str) -> dict[str, Any]:
        """Run a command to its end, and return its closing table."""
        code = cli.main([*argv, "--json"])
        out, errors = capfd.readouterr()
        assert code == 0, errors
        return dict(json.loads(out.strip().splitlines()[-1]))

    return run


@pytest.fixture(scope="module")
def local(city: City) -> list[str]:
    """Run both nights on a local disk, and return the work directories as they were after each."""
    place, kept = str(city.root / "local"), []
    for night in ("one", "two"):
        city.bring(night, place)
        assert cli.main(["nightly", "--config", str(city.config(place))]) == 0
        kept.append(str(city.root / f"after-{night}"))
        shutil.copytree(f"{place}/work", kept[-1], symlinks=True)
    return kept


def assert_night(found: str, expected: str) -> None:
    """Compare what all outputs hold: embeddings, examples and the model to the bit."""
    for name in ("store", "shards"):
        assert_same(f"{found}/{name}", f"{expected}/{name}")
    assert_scores_close(f"{found}/scores", f"{expected}/scores")
    summaries = [latest(f"{work}/scores").summary["model_version"] for work in (found, expected)]
    assert summaries[0] == summaries[1]


def files_below(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_two_nights(
    city: City,
    local: list[str],
    stores: LocalStores,
    scheme: str,
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    place, proxy = f"{scheme}://camenn/nights", stores.proxies[scheme]
    cache, elsewhere = tmp_path / "cache", tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setenv("CAMENN_CACHE", str(cache))
    monkeypatch.chdir(elsewhere)
    work, config = f"{place}/work", str(city.config(place))
    for night, expected in zip(("one", "two"), local, strict=True):
        city.bring(night, place)
        summary = run("nightly", "--config", config)
        assert summary["stages"] == dict.fromkeys(("embed", "shards", "train", "score", "report", "gc"), "done")
        assert_night(work, expected)
    # No local path but the cache was written to.
    assert files_below(tmp_path) == [name for name in files_below(tmp_path) if name.startswith("cache/")]
    assert [record["exit_code"] for record in read_nights(work)] == [0, 0]
    pages = [objects.read(f"{work}/report/index.html")[0], Path(local[1], "report", "index.html").read_bytes()]
    assert all(page.rstrip().endswith(b"</html>") for page in pages)
    assert pages[0].count(b"data:image") == pages[1].count(b"data:image") > 10

    # A night in which nothing changed, and no copy is missing.
    proxy.clear()
    sockets = proxy.sockets
    stages = run("nightly", "--config", config)["stages"]
    assert stages["shards"] == stages["score"] == "unchanged" and stages["train"] == "not due"
    assert proxy.bytes_out < 2_000_000
    assert proxy.sockets - sockets <= object_client.SOCKETS

    scores = f"{work}/scores"
    first, second = (entry["run"] for entry in publications(scores))
    assert run("publish", f"{scores}/runs/{first}")["published"]
    assert latest(scores).run == first
    assert run("rollback", "--out", scores)["run"] == second
    assert run("runs", "--out", scores)["score"]["run"] == second
    assert [entry["run"] for entry in publications(scores)] == [first, second, first, second]

    monkeypatch.setattr(garbage, "YOUNG", datetime.timedelta(seconds=-5))
    assert run("gc", "--out", scores, "--keep", "1")["files_removed"] > 0
    left = {
        found.path.removeprefix(f"{scores}/runs/").partition("/")[0]
        for found in objects.match(scores, "runs/**.parquet")
    }
    assert left == {second}
    assert_night(work, local[1])


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_thirty_faults(
    city: City, local: list[str], stores: LocalStores, scheme: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Throttling, errors, resets, cut bodies and lost answers at random requests of every stage."""
    monkeypatch.setattr(object_client, "FIRST_WAIT", 0.01)
    place, proxy = f"{scheme}://camenn/faults", stores.proxies[scheme]
    city.bring("one", place)
    config = str(city.config(place))
    draw = random.Random(31)
    proxy.clear()
    numbers = sorted(draw.sample(range(20, 450), 30))
    proxy.spoil_at({number: FAULTS[place % len(FAULTS)] for place, number in enumerate(numbers)})
    summary = run("nightly", "--config", config)
    assert proxy.waiting == 0, f"{len(proxy.requests)} requests only"
    assert summary["exit_code"] == 0
    assert_night(f"{place}/work", local[0])
    for name in OUTPUTS:
        assert len(publications(f"{place}/work/{name}")) == 1
        assert read_latest(f"{place}/work/{name}") is not None


def test_an_object_that_stays_away_ends_the_command(
    city: City, stores: LocalStores, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store that refuses for good is told in one line, and nothing is published."""
    monkeypatch.setattr(object_client, "FIRST_WAIT", 0.001)
    proxy: CountingProxy = stores.proxies["s3"]
    city.bring("one", "s3://camenn/refused")
    proxy.spoil_at(dict.fromkeys(range(30, 30 + 4 * object_client.ATTEMPTS), 503))
    code = cli.main(["nightly", "--config", str(city.config("s3://camenn/refused"))])
    errors = capfd.readouterr().err
    proxy.spoil_at({})
    assert code == 2, errors
    assert "the store does not answer" in errors
    assert read_latest("s3://camenn/refused/work/store") is None
