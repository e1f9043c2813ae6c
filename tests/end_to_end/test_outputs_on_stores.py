"""What surrounds the stages, on gs:// and s3://.

Outputs are made on a local disk and copied. Then report, fsck, runs, publish, rollback and a night
work on the copy.
"""

import datetime
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import pyarrow.dataset as ds
import pyarrow.fs
import pytest
from fsspec.implementations.arrow import ArrowFSWrapper

from camenn_model.integrity import DamagedError
from pipelines.cli import main
from pipelines.io import clock, files, objects
from pipelines.nightly import night as nightly
from pipelines.nightly.retraining import Decision
from pipelines.runs import readers_path
from pipelines.runs.context import Request, open_run
from pipelines.runs.manifest import Manifest, read_latest, read_run
from pipelines.runs.night_record import DONE, StageRecord, read_nights
from pipelines.runs.publication import check_whole, publish
from pipelines.runs.store import list_parts
from pipelines.stages import OUTPUT_FOLDERS
from tests.support.documents import edit_document
from tests.support.object_stores import ENDPOINTS, LocalStores
from tests.support.small_city import catalog_table, write_store
from tests.support.work_directory import make_work

pytestmark = [pytest.mark.slow, pytest.mark.objects]
FIRST, SECOND = "20240311T020000-bbbbbb", "20240312T020000-bbbbbb"
BOTH = pytest.mark.parametrize("scheme", ["gs", "s3"])


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_work(tmp_path_factory.mktemp("city"))


def copy(source: Path, place: str) -> str:
    """Put the files of a directory below a place. A tool that copies files leaves links out."""
    for path in sorted(path for path in source.rglob("*") if path.is_file() and not path.is_symlink()):
        objects.put(f"{place}/{path.relative_to(source)}", path.read_bytes())
    return place


@pytest.fixture
def outputs(work: Path, stores: LocalStores, request: pytest.FixtureRequest, scheme: str) -> str:
    """A copy of the working directory on an object store, for one test."""
    return copy(work, f"{scheme}://camenn/{request.node.originalname}/work")


def closing_table(capfd: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> dict[str, Any]:
    capfd.readouterr()
    assert main([*arguments, "--json"]) == code
    found: dict[str, Any] = json.loads(capfd.readouterr().out.strip().splitlines()[-1])
    return found


def change(path: str, data: bytes) -> None:
    assert objects.exists(path)
    objects.put(path, data)


# --- report


@pytest.fixture(scope="module")
def local_report(work: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The page of the local working directory; every page of this module has its date."""
    out = tmp_path_factory.mktemp("local")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clock, "utc_now", lambda: datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC))
        assert main(["report", "--run", str(work), "--out", str(out)]) == 0
        yield (out / "index.html").read_text()


@BOTH
def test_the_report_is_that_of_a_local_disk(
    work: Path,
    stores: LocalStores,
    scheme: str,
    local_report: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    place = f"{scheme}://camenn/report"
    photos = copy(work.parent / "data", f"{place}/data")
    remote = copy(work, f"{place}/work")
    (manifest,) = (work / "store" / "runs").glob("*/manifest.json")
    (tmp_path / "manifest.json").write_bytes(manifest.read_bytes())
    edit_document(tmp_path / "manifest.json", lambda value: value["options"].update(image_root=photos))
    change(f"{remote}/{manifest.relative_to(work)}", (tmp_path / "manifest.json").read_bytes())

    # Beside its sources, or on the other store.
    out = {"gs": [], "s3": ["--out", "gs://camenn/elsewhere"]}[scheme]
    stores.proxies[scheme].clear()
    there = closing_table(capfd, "report", "--run", remote, *out)
    assert len(stores.proxies[scheme].requests) < 150
    (page,) = objects.read(f"{out[-1] if out else f'{remote}/report'}/index.html")
    assert page.decode().replace(remote, str(work)).replace(photos, str(work.parent / "data")) == local_report
    assert (there["photos"], there["photos_not_shown"]) == (12, 1)
    assert main(["report", "--run", f"{place}/wrong"]) == 2
    assert f"--run {place}/wrong: no such directory" in capfd.readouterr().err


@BOTH
def test_photos_of_a_store_that_fails_are_left_out(
    work: Path, stores: LocalStores, scheme: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from pipelines.report.photos import Photos

    photos = Photos(f"{scheme}://no-such-bucket/photos", allow_absolute=False)
    photos.read_ahead(["1.jpg", None, "", "2.jpg"])
    assert {photo.reason for photo in photos.made.values()} == {"photo store cannot be read"}
    assert set(photos.made) == {"1.jpg", "2.jpg"}
    assert photos.find("3.jpg").reason == "photo store cannot be read"


# --- fsck


@BOTH
def test_fsck_reads_every_object(
    outputs: str, stores: LocalStores, scheme: str, work: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = closing_table(capfd, "fsck", "--work", outputs)
    local = closing_table(capfd, "fsck", "--work", str(work))
    assert whole["damaged"] == whole["damaged_of_earlier_runs"] == 0
    assert {name: whole[name] for name in ("outputs", "files", "without_checksum")} == {
        name: local[name] for name in ("outputs", "files", "without_checksum")
    }
    manifest = read_latest(f"{outputs}/scores")
    assert manifest is not None
    path = manifest.listed("scores")[0]
    with files.open_read(path) as handle:
        data = bytearray(handle.read())
    data[len(data) // 2] ^= 1
    for harmed, said in ((bytes(data), "SHA-256 differs"), (bytes(data[:-1]), "were written"), (None, "is gone")):
        if harmed is None:
            objects.delete([path])
        else:
            change(path, harmed)
        assert closing_table(capfd, "fsck", "--out", f"{outputs}/scores", code=2)["damaged"] == 1
        main(["fsck", "--out", f"{outputs}/scores"])
        told = capfd.readouterr().err
        assert path in told and said in told and "camenn score --rerun" in told
    change(f"{outputs}/nights/00000001/record.json", b"{}x")
    assert closing_table(capfd, "fsck", "--work", outputs, code=2)["damaged"] == 2
    assert main(["fsck", "--work", f"{outputs}/nowhere"]) == 2
    assert "no output of camenn is in it" in capfd.readouterr().err


@BOTH
def test_fsck_repairs(outputs: str, stores: LocalStores, scheme: str, tmp_path: Path) -> None:
    root = f"{outputs}/scores"
    # The pointer, and the newest run with it: readers then see the run of before.
    change(f"{root}/latest.json", b"")
    change(f"{root}/runs/{SECOND}/manifest.json", b"{")
    assert main(["fsck", "--out", root, "--repair"]) == 2
    latest = read_latest(root)
    assert latest is not None and latest.run == FIRST
    assert readers_path.run_at(f"{root}/published/scores") == FIRST
    assert objects.exists(f"{root}/latest.json.damaged") and not objects.exists(f"{root}/runs/{SECOND}/manifest.json")
    assert main(["fsck", "--out", root]) == 0

    # A part of the store is set aside with its marker.
    write_store(tmp_path / "store", catalog_table())
    store = copy(tmp_path / "store", f"{outputs}/embeddings")
    (kind,) = {found.path.split("/")[-2] for found in files.match(f"{store}/images", "*/*.json")}
    before = list_parts(f"{store}/images/{kind}")
    change(before[0].path, bytes(before[0].bytes))
    assert main(["fsck", "--out", store, "--repair"]) == 2
    assert list_parts(f"{store}/images/{kind}") == before[1:] and len(before) > 1
    with files.open_read(f"{before[0].path}.damaged") as handle:
        assert handle.read() == bytes(before[0].bytes)
    assert not objects.exists(before[0].path)


# --- sizes


@BOTH
def test_sizes_are_compared_with_one_listing(outputs: str, stores: LocalStores, scheme: str) -> None:
    root, proxy = f"{outputs}/scores", stores.proxies[scheme]
    manifest = read_run(root, SECOND)
    proxy.clear()
    for _ in range(2):
        for table in manifest.tables:
            assert manifest.paths(table)
    # Of a whole run, and once a process.
    assert proxy.methods == ["GET"]
    proxy.clear()
    check_whole(root, manifest)
    assert proxy.methods == ["GET"]
    first = read_run(root, FIRST)
    path = first.listed("scores")[0]
    change(path, b"short")
    with pytest.raises(DamagedError, match=f"{path}: has 5 bytes, .* were written. Run `camenn score --rerun`"):
        first.check("scores")
    with pytest.raises(DamagedError, match=f"Run {FIRST} of {root} is not whole"):
        check_whole(root, first)
    objects.delete([path])
    with pytest.raises(DamagedError, match=f"{path}: this file is gone"):
        check_whole(root, first)
    assert main(["rollback", "--out", root]) == 2


# --- the path for readers


def arrow_files(stores: LocalStores, scheme: str) -> pyarrow.fs.FileSystem:
    """The file system that pyarrow itself has for a scheme: the proxy does not know how its gs client asks."""
    host = stores.direct[ENDPOINTS[scheme]].removeprefix("http://")
    if scheme == "gs":
        return pyarrow.fs.GcsFileSystem(anonymous=True, endpoint_override=host, scheme="http")
    return pyarrow.fs.S3FileSystem(endpoint_override=host, scheme="http", region="us-east-1")


def read_all_ways(stores: LocalStores, path: str) -> pd.DataFrame:
    """Read a table as pandas, pyarrow and DuckDB do, which must agree."""
    system, name = arrow_files(stores, path.partition("://")[0]), path.partition("://")[2]
    frame = pd.read_parquet(name, filesystem=system)
    dataset = ds.dataset(name, filesystem=system).to_table().to_pandas()
    wrapped = ArrowFSWrapper(system)
    with duckdb.connect() as connection:
        # Its own httpfs is tried below.
        connection.register_filesystem(wrapped)
        duck = connection.sql(f"SELECT * FROM read_parquet('{wrapped.protocol}://{name}/*.parquet')").df()
    assert len(frame) == len(dataset) == len(duck) > 0
    pd.testing.assert_frame_equal(dataset, frame)
    pd.testing.assert_frame_equal(duck, frame, check_dtype=False, check_categorical=False)
    return frame


HTTPFS = ("duckdb==1.5.5", "duckdb-extensions==1.5.5", "duckdb-extension-httpfs==1.5.5")
"""The latest DuckDB whose extension is a package too: others fetch it from a server of DuckDB's own."""


@pytest.fixture(scope="module")
def httpfs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a Python with DuckDB and its extension for object stores."""
    place = tmp_path_factory.mktemp("duckdb") / "env"
    subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
    install = [str(place / "bin" / "pip"), "install", "--quiet", "--disable-pip-version-check", *HTTPFS]
    subprocess.run([*install, "pandas", "pyarrow"], check=True, timeout=300)
    return place / "bin" / "python"


@pytest.mark.parametrize("scheme", ["s3"])
def test_duckdb_opens_the_path_by_itself(
    outputs: str, stores: LocalStores, work: Path, httpfs: Path, tmp_path: Path
) -> None:
    """Through its own extension, which speaks to S3 only (and to gs with S3's words, which the emulator lacks)."""
    assert main(["publish", f"{outputs}/scores/runs/{FIRST}"]) == 0
    keys = stores.direct
    query = f"SELECT * FROM read_parquet('{outputs}/scores/published/scores/*.parquet')"
    program = f"""
import duckdb
from duckdb_extensions import import_extension

import_extension("httpfs")
connection = duckdb.connect()
connection.execute("LOAD httpfs")
connection.execute(
    "CREATE SECRET (TYPE s3, KEY_ID '{keys["AWS_ACCESS_KEY_ID"]}', SECRET '{keys["AWS_SECRET_ACCESS_KEY"]}', "
    "REGION 'us-east-1', ENDPOINT '{stores.proxies["s3"].url.removeprefix("http://")}', USE_SSL false, "
    "URL_STYLE 'path')"
)
connection.sql(\"\"\"{query}\"\"\").df().to_parquet({str(tmp_path / "found.parquet")!r})
"""
    done = subprocess.run([str(httpfs), "-c", program], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    expected = pd.read_parquet(work / "scores" / "runs" / FIRST / "scores")
    found = pd.read_parquet(tmp_path / "found.parquet")
    pd.testing.assert_frame_equal(found, expected, check_dtype=False, check_categorical=False)


@BOTH
def test_readers_open_one_path(
    outputs: str,
    stores: LocalStores,
    scheme: str,
    work: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    root = f"{outputs}/scores"
    runs = {run: pd.read_parquet(work / "scores" / "runs" / run / "scores") for run in (FIRST, SECOND)}
    assert not runs[FIRST].equals(runs[SECOND])
    path = f"{root}/published/scores"
    for command, run in (
        (["rollback", "--out", root], FIRST),
        (["publish", f"{root}/runs/{SECOND}"], SECOND),
        (["rollback", "--out", root], FIRST),
    ):
        assert main(command) == 0
        pd.testing.assert_frame_equal(read_all_ways(stores, path), runs[run])
        assert closing_table(capfd, "runs", "--out", root)["score"]["readers"]["scores"] == path
    quality = pd.read_parquet(work / "scores" / "runs" / FIRST / "listing_quality")
    assert len(read_all_ways(stores, f"{root}/published/listing_quality")) == len(quality)

    # It is not written again, and what copied links left is removed.
    manifest = read_run(root, FIRST)
    written = objects.stat(f"{path}/scores.parquet").token
    assert readers_path.update(root, manifest) == []
    objects.put(f"{path}/score_date=2024-03-12/part-0.parquet", b"a copy")
    objects.put(f"{path}/mine.txt", b"of others")
    assert readers_path.update(root, manifest) == [path]
    assert [found.path.rpartition("/")[2] for found in files.match(path, "**")] == ["mine.txt", "scores.parquet"]
    objects.delete([f"{path}/mine.txt"])
    assert scheme == "s3" or objects.stat(f"{path}/scores.parquet").token != written

    # A publication that was cut off before it: the next run finishes it, and a damaged copy is made again.
    with monkeypatch.context() as patch:
        patch.setattr(readers_path, "update", lambda root, manifest: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            main(["publish", f"{root}/runs/{SECOND}"])
    pd.testing.assert_frame_equal(read_all_ways(stores, path), runs[FIRST])
    assert main(["fsck", "--out", root]) == 2
    for harm in (None, b"PAR1"):
        if harm is not None:
            change(f"{path}/scores.parquet", harm)
        with open_run(Request(stage="score", out=root, inputs={}, options={}), started=0.0):
            pd.testing.assert_frame_equal(read_all_ways(stores, path), runs[SECOND])
    assert main(["fsck", "--out", root]) == 0
    assert main(["gc", "--out", root]) == 0


# --- a night


@BOTH
def test_a_night_leaves_its_record(
    stores: LocalStores, scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = f"{scheme}://camenn/nights/work"

    def run_stage(self: nightly._Nightly, record: StageRecord) -> None:
        record.status, record.run = DONE, f"r{self.night.number}"
        if record.stage in OUTPUT_FOLDERS:
            publish(self.config.output(OUTPUT_FOLDERS[record.stage]), Manifest(stage=record.stage, run=record.run))
        if record.stage == "score":
            # What was written so far is there already.
            seen = read_nights(work)[-1]
            assert [stage["stage"] for stage in seen["stages"]] == ["embed", "shards", "train", "score"]
            assert objects.read(f"{self.night.directory}/log.txt")[0].decode().count("begins") == 5

    monkeypatch.setattr(nightly._Nightly, "run_stage", run_stage)
    monkeypatch.setattr(nightly, "decide", lambda config: Decision(True, "so it is"))
    config = tmp_path / "city.toml"
    config.write_text(f'data = "{scheme}://camenn/nights/data"\nwork = "{work}"\n')
    for _ in range(2):
        assert main(["nightly", "--config", str(config)]) == 0
    records = read_nights(work)
    assert [record["number"] for record in records] == [1, 2]
    assert [record["exit_code"] for record in records] == [0, 0] and records[1]["published"]["run"] == "r2"
    (log,) = objects.read(f"{work}/nights/00000002/log.txt")
    lines = log.decode().splitlines()
    assert "night 2 begins" in lines[0] and "ends with exit code 0" in lines[-1]
    assert all("nightly: " in line for line in lines)
    names = {found.path.rpartition("/")[2] for found in files.match(f"{work}/nights", "**")}
    assert names == {"record.json", "log.txt"}
    assert not (tmp_path / f"{scheme}:").exists() and not Path(f"{scheme}:").exists()
