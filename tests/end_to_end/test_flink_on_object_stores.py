"""Flink's workers and the submitter share no directory: everything goes through an object store."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines import cli
from pipelines.io import objects
from tests.support.flink_cluster import ElsewhereCluster
from tests.support.object_stores import LocalStores
from tests.support.published_rows import assert_same, assert_scores_close
from tests.support.tiny_encoders import write_text_model, write_timm_model

pytestmark = [pytest.mark.slow, pytest.mark.flink, pytest.mark.objects]
PLACE = "s3://camenn/elsewhere"


class Night:
    """A tiny city's commands, with every path below one place."""

    def __init__(self, place: str, encoders: list[str]) -> None:
        self.place, self.encoders = place, encoders

    def commands(self) -> Iterator[list[str]]:
        data, store, shards, model, scores = (
            f"{self.place}/{name}" for name in ("data", "store", "shards", "model", "scores")
        )
        yield ["embed", "--data", data, "--image_root", data, "--store", store, *self.encoders]
        yield ["shards", "--data", data, "--store", store, "--out", shards]
        yield ["train", "--shards", shards, "--out", model]
        yield ["score", "--data", data, "--store", store, "--model", model, "--shards", shards, "--out", scores]

    def run(self, beam: list[str]) -> None:
        for argv in self.commands():
            assert cli.main([*argv, *([] if argv[0] == "train" else beam)]) == 0


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of all that the submitter has: data, outputs and its copies of objects."""
    return tmp_path_factory.mktemp("submitter")


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags of small encoders, whose files workers have as well, as they have them in their image."""
    root = tmp_path_factory.mktemp("image")
    small = ["--grid", "2", "--max_tokens", "16", "--precision", "fp32"]
    found = ["--image_weights", str(write_timm_model(root / "resnet", "resnet18"))]
    return [*found, "--text_encoder", str(write_text_model(root / "xlm", "xlm-roberta")), *small]


@pytest.fixture(scope="module")
def cluster(stores: LocalStores, home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ElsewhereCluster]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CAMENN_CACHE", str(home / "cache"))
        cluster = ElsewhereCluster(tmp_path_factory.mktemp("flink"), hidden=[home])
        try:
            cluster.up()
            yield cluster
        finally:
            cluster.script("down")


def test_nothing_is_shared(home: Path, encoders: list[str], cluster: ElsewhereCluster) -> None:
    here = Night(str(home), encoders)
    assert cli.main(["simulate", "--out", str(home / "data"), "--preset", "tiny"]) == 0
    here.run([])
    for path in sorted(path for path in (home / "data").rglob("*") if path.is_file()):
        objects.put(f"{PLACE}/data/{path.relative_to(home / 'data')}", path.read_bytes())

    Night(PLACE, encoders).run(cluster.flags(2))

    seen = Path(f"/proc/{cluster.process('workers')}/root{home}")
    assert {path.name for path in seen.iterdir()} <= {"cache"}, "the workers see the submitter's files"
    assert {path.name for path in home.iterdir()} >= {"data", "store", "shards", "model", "scores", "cache"}
    assert any((seen / "cache").rglob("*.arrow")), "workers that score have copies of their own"
    for name in ("store", "shards"):
        assert_same(f"{PLACE}/{name}", home / name)
    assert_scores_close(f"{PLACE}/scores", home / "scores")
