"""`kill -9` at any moment, and two runs at once: nothing is lost, little is done twice."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.torch import save_file

from camenn_model.encoder_spec import ImageSpec
from camenn_model.image_encoder import load_inception
from pipelines.manifest import read_latest
from tests.pipelines.test_embed_catalog import jpeg, picture, write_catalog

PHOTOS, TITLES, CHUNK, KILLS = 768, 300, 64, 20
KEYS = {"items": "item_id", "image_embeddings": "image_key", "title_embeddings": "title_key"}


def start(data: Path, store: Path, log: Path) -> subprocess.Popen[bytes]:
    weights = str(data / "weights.safetensors")
    command = [
        sys.executable, "-m", "tests.pipelines.counted_embed", str(data), str(store), str(log), str(CHUNK), weights
    ]  # fmt: skip
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


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
    # Read from a file: every process would draw random ones anew.
    spec = ImageSpec.resolve("random:0", grid=1, patch_size=75, device="cpu", precision="auto")
    save_file(dict(load_inception(spec).state_dict()), data / "weights.safetensors")
    # Two listings of one photo, whose bytes lie in two files.
    (data / "twin.jpg").write_bytes((data / "0.jpg").read_bytes())
    rows.append({"item_id": "twin", "title": "apples 0", "image_uri": "twin.jpg"})
    write_catalog(data, rows)
    return data


@pytest.mark.slow
def test_kill_9_at_twenty_random_moments(data: Path, tmp_path: Path) -> None:
    started = time.monotonic()
    whole = start(data, tmp_path / "whole", tmp_path / "whole.log")
    assert whole.wait() == 0, whole.stderr and whole.stderr.read().decode()[-2000:]
    seconds = time.monotonic() - started
    expected = published(tmp_path / "whole")
    assert encodes(tmp_path / "whole.log") == {"images": PHOTOS, "titles": TITLES}
    moments = random.Random(0)
    kills = rounds = midway = 0
    while kills < KILLS:
        # A run that outlives its moment ends the round: the next one begins with an empty store.
        store, log, rounds, killed = tmp_path / f"store{rounds}", tmp_path / f"{rounds}.log", rounds + 1, 0
        while True:
            child = start(data, store, log)
            try:
                # In a child's first third it only imports: most moments are after that.
                child.wait(moments.uniform(0.1 if kills % 5 == 0 else 0.35, 1.0) * seconds if kills < KILLS else None)
            except subprocess.TimeoutExpired:
                child.send_signal(signal.SIGKILL)
                child.wait()
                kills, killed = kills + 1, killed + 1
                midway += 0 < sum(encodes(log).values()) < PHOTOS + TITLES
                continue
            assert child.returncode == 0, child.stderr and child.stderr.read().decode()[-2000:]
            break
        found = published(store)
        for name, table in expected.items():
            assert found[name].equals(table), name
        done = encodes(log)
        assert done["images"] <= PHOTOS + CHUNK * killed and done["titles"] <= TITLES + CHUNK * killed, (done, killed)
    # Otherwise the moments were all before or after the encoding, and nothing was shown.
    assert midway >= KILLS // 4, midway


def test_a_second_run_into_one_store_stops_and_the_first_goes_on(data: Path, tmp_path: Path) -> None:
    first = start(data, tmp_path / "store", tmp_path / "first.log")
    while not (tmp_path / "first.log").exists():
        assert first.poll() is None, first.stderr and first.stderr.read().decode()[-2000:]
        time.sleep(0.05)
    # Held still, so that it cannot end before the second one asks.
    first.send_signal(signal.SIGSTOP)
    try:
        _, errors = start(data, tmp_path / "store", tmp_path / "second.log").communicate(timeout=120)
    finally:
        first.send_signal(signal.SIGCONT)
    assert b"another camenn process is writing there. Wait for it to end" in errors
    assert first.wait(timeout=300) == 0
    assert not (tmp_path / "second.log").exists()
    assert published(tmp_path / "store")["items"].num_rows == PHOTOS + 1
