"""`kill -9` at any moment, and two runs at once: nothing is lost, little is done twice."""

import multiprocessing
import os
import random
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.torch import save_file

from camenn_model.encoders.inception_v4 import load_inception
from camenn_model.encoders.spec import ImageSpec
from pipelines.runs.manifest import read_latest
from tests.pipelines.embed.test_stage import jpeg, picture, write_catalog
from tests.support import counted_embed

PHOTOS, TITLES, CHUNK, KILLS = 384, 192, 64, 20
KEYS = {"items": "item_id", "image_embeddings": "image_key", "title_embeddings": "title_key"}


# Each run is a fork of a process that has imported everything: imports would take longer than the tested work.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.support.counted_embed", "timm", "transformers", "camenn_model.encoders.bert"])


def start(data: Path, store: Path, log: Path) -> BaseProcess:
    """`camenn embed` in a process of its own; its output goes to LOG.err."""
    weights = str(data / "weights.safetensors")
    arguments = (str(data), str(store), str(log), str(CHUNK), weights)
    process = FORKS.Process(target=counted_embed.run_quietly, args=(f"{log}.err", *arguments), daemon=True)
    process.start()
    return process


def ended(process: BaseProcess, log: Path, timeout: float = 600) -> str:
    """Wait for the end of a run that must succeed."""
    process.join(timeout)
    said = Path(f"{log}.err").read_text()
    assert process.exitcode == 0, said[-2000:]
    return said


def wait_for_moment(child: BaseProcess, log: Path, moments: random.Random, kills: int) -> None:
    """Wait until a random moment, or the run's end.

    The moment is one of the first seconds, or some chunks later, as a busy machine's seconds are
    unreliable.
    """
    if kills == KILLS:
        child.join()
    elif kills % 5 == 0:
        child.join(moments.uniform(0.05, 5.0))
    else:
        due = sum(encodes(log).values()) + moments.randrange(1, 5 * CHUNK)
        while child.exitcode is None and sum(encodes(log).values()) < due:
            child.join(0.02)
        child.join(moments.uniform(0.0, 0.5))


def kill(process: BaseProcess, number: int) -> None:
    assert process.pid is not None
    os.kill(process.pid, number)


def published(store: Path) -> dict[str, pa.Table]:
    """Every published table, sorted by key, without what a run writes of itself."""
    manifest = read_latest(str(store))
    assert manifest is not None
    return {
        name: pa.concat_tables([pq.ParquetFile(path).read() for path in manifest.paths(name)])
        .replace_schema_metadata(None)
        .sort_by(key)
        for name, key in KEYS.items()
    }


def encodes(log: Path) -> dict[str, int]:
    counts = {"images": 0, "titles": 0}
    for line in log.read_text().splitlines() if log.exists() else []:
        kind, contents = line.split()
        counts[kind] += int(contents)
    return counts


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = tmp_path_factory.mktemp("kills")
    rows: list[dict[str, Any]] = []
    for number in range(PHOTOS):
        (data / f"{number}.jpg").write_bytes(jpeg(picture(number, (60, 60))))
        rows.append({"item_id": f"i{number}", "title": f"apples {number % TITLES}", "image_uri": f"{number}.jpg"})
    # Read from a file: every process would draw random ones again.
    spec = ImageSpec.resolve("random:0", grid=1, patch_size=75, device="cpu", precision="auto")
    save_file(dict(load_inception(spec).state_dict()), data / "weights.safetensors")
    # Two listings of one photo, whose bytes lie in two files.
    (data / "twin.jpg").write_bytes((data / "0.jpg").read_bytes())
    rows.append({"item_id": "twin", "title": "apples 0", "image_uri": "twin.jpg"})
    write_catalog(data, rows)
    return data


@pytest.mark.slow
def test_kill_9_at_twenty_random_moments(data: Path, tmp_path: Path) -> None:
    ended(start(data, tmp_path / "whole", tmp_path / "whole.log"), tmp_path / "whole.log")
    expected = published(tmp_path / "whole")
    assert encodes(tmp_path / "whole.log") == {"images": PHOTOS, "titles": TITLES}
    moments = random.Random(0)
    kills = rounds = midway = 0
    while kills < KILLS:
        # A run that outlives its moment ends the round: the next one begins with an empty store.
        store, log, rounds, killed = tmp_path / f"store{rounds}", tmp_path / f"{rounds}.log", rounds + 1, 0
        while True:
            child = start(data, store, log)
            wait_for_moment(child, log, moments, kills)
            if child.exitcode is None:
                kill(child, signal.SIGKILL)
                child.join()
                assert child.exitcode == -signal.SIGKILL
                kills, killed = kills + 1, killed + 1
                midway += 0 < sum(encodes(log).values()) < PHOTOS + TITLES
                continue
            ended(child, log)
            break
        found = published(store)
        for name, table in expected.items():
            assert found[name].equals(table), name
        done = encodes(log)
        # A kill loses the chunk that is being encoded and the one that is being written meanwhile.
        assert done["images"] <= PHOTOS + 2 * CHUNK * killed and done["titles"] <= TITLES + 2 * CHUNK * killed, (
            done,
            killed,
        )
    # Otherwise all moments were before or after the encoding, and nothing was tested.
    assert midway >= KILLS // 4, midway


def test_a_second_run_into_one_store_stops_and_the_first_goes_on(data: Path, tmp_path: Path) -> None:
    log = tmp_path / "first.log"
    first = start(data, tmp_path / "store", log)
    while not log.exists():
        assert first.is_alive(), Path(f"{log}.err").read_text()[-2000:]
        time.sleep(0.05)
    # Held still, so that it cannot end before the second one asks.
    kill(first, signal.SIGSTOP)
    try:
        second = start(data, tmp_path / "store", tmp_path / "second.log")
        second.join(300)
        assert second.exitcode == 1
    finally:
        kill(first, signal.SIGCONT)
    said = (tmp_path / "second.log.err").read_text()
    assert "another camenn process is writing there. Wait for it to end" in said
    ended(first, log)
    assert not (tmp_path / "second.log").exists()
    assert published(tmp_path / "store")["items"].num_rows == PHOTOS + 1
