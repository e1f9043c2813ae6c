"""Two writers at once, on gs://, s3:// and a local disk: no publication is lost, and none goes backwards."""

import datetime
import json
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipelines import cli
from pipelines.io import files, lease, object_client, objects
from pipelines.io.lease import InUseError, LostLeaseError
from pipelines.io.tables import FileRecord
from pipelines.runs import garbage, publication
from pipelines.runs.context import Outcome, Request, RunContext, open_run
from pipelines.runs.manifest import Manifest, add_files, new_run, read_latest, read_run, write_manifest
from pipelines.runs.publication import AnotherPublishedError, Position, point_to, publications, publish
from pipelines.runs.store import commit_part, drop_replaced, list_parts, merge_parts
from pipelines.train import workplace
from schemas.embeddings import image_embeddings
from schemas.manifest import LATEST_FIELDS
from tests.support.object_stores import LocalStores

PAIRS = 25


@pytest.fixture(params=["gs", "s3"])
def root(request: pytest.FixtureRequest, stores: LocalStores, monkeypatch: pytest.MonkeyPatch) -> str:
    """An output of this test's own."""
    monkeypatch.setattr(object_client, "FIRST_WAIT", 0.01)
    return f"{request.param}://camenn/{uuid.uuid4().hex}"


def run_of(root: str, run: str) -> Manifest:
    """A finished run, which is not published."""
    manifest = Manifest(stage="score", run=run)
    write_manifest(root, manifest)
    return manifest


def shown(root: str) -> str | None:
    latest = read_latest(root)
    return None if latest is None else latest.run


def history(root: str) -> list[str]:
    return [entry["run"] for entry in publications(root)]


def number(root: str) -> int:
    return int(files.read_document(files.join(root, "latest.json"), LATEST_FIELDS, "")["number"])


@pytest.mark.objects
def test_of_two_writers_one_publishes(root: str) -> None:
    """Fifty pairs: with the lease, and without one, as if both held it."""
    together = threading.Barrier(2)
    won: list[str] = []

    def write(name: str) -> None:
        for turn in range(PAIRS):
            run = f"{name}{turn:03}"
            together.wait(20)
            try:
                with files.single_writer(root) as writer:
                    together.wait(20)
                    publish(root, Manifest(stage="score", run=run), writer=writer)
                    won.append(run)
            except InUseError:
                together.wait(20)

    written = threading.Event()

    def watch() -> list[int]:
        """What readers see meanwhile."""
        seen = []
        while not written.is_set():
            if read_latest(root) is not None:
                seen.append(number(root))
        return seen

    with ThreadPoolExecutor(3) as pool:
        reader = pool.submit(watch)
        list(pool.map(write, "ab"))
        written.set()
        seen = reader.result()
    assert len(set(seen)) > 3 and seen == sorted(seen)
    assert len(won) == PAIRS and {int(run[1:]) for run in won} == set(range(PAIRS))
    assert history(root) == won and shown(root) == won[-1] and number(root) == PAIRS

    def force(name: str) -> list[str]:
        kept = []
        for turn in range(PAIRS):
            manifest = Manifest(stage="score", run=f"forced-{name}{turn:03}")
            position = Position.of(root)
            together.wait(20)
            try:
                publish(root, manifest, position)
                kept.append(manifest.run)
            except AnotherPublishedError as error:
                assert f"kept in {root}/runs/{manifest.run}: nothing was lost" in str(error)
            together.wait(20)
        return kept

    with ThreadPoolExecutor(2) as pool:
        forced = sum(pool.map(force, "ab"), [])
    assert len(forced) == PAIRS and sorted(run[-3:] for run in forced) == [f"{turn:03}" for turn in range(PAIRS)]
    assert sorted(history(root)[PAIRS:]) == sorted(forced)
    assert shown(root) == history(root)[-1] and number(root) == 2 * PAIRS
    publication.check_whole(root, read_run(root, forced[0]))


def test_on_a_local_disk_one_publishes_too(tmp_path: Path) -> None:
    """Where a lock does not hold, as on some network file systems."""
    together = threading.Barrier(8)
    root = str(tmp_path)

    def force(name: str) -> list[str]:
        kept = []
        for turn in range(20):
            manifest = run_of(root, f"{name}{turn:03}")
            position = Position.of(root)
            together.wait(20)
            try:
                files.create_document(files.join(root, "published", f"{position.number + 1:08d}.json"), {"run": name})
                kept.append(manifest.run)
            except FileExistsError:
                pass
            together.wait(20)
        return kept

    with ThreadPoolExecutor(8) as pool:
        kept = sum(pool.map(force, "abcdefgh"), [])
    assert sorted(run[1:] for run in kept) == [f"{turn:03}" for turn in range(20)]
    assert not list(tmp_path.rglob("*.tmp"))
    position = Position.of(root)
    point_to(root, run_of(root, "first"), position)
    with pytest.raises(AnotherPublishedError, match=r"another run \(first\) was published meanwhile"):
        point_to(root, run_of(root, "second"), position)
    assert shown(root) == "first"


def test_without_hard_links_nothing_is_replaced_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.link", refuse)
    files.create_document(f"{tmp_path}/a.json", {"a": 1})
    with pytest.raises(FileExistsError):
        files.create_document(f"{tmp_path}/a.json", {"a": 2})
    assert files.read_document(f"{tmp_path}/a.json", {"a"}, "") == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def begin(root: str) -> RunContext:
    """Open a run as if no other process could hold the output."""
    with open_run(Request(stage="score", out=root, inputs={}, options={}), started=time.monotonic()) as context:
        return context


@pytest.mark.objects
def test_the_second_of_two_open_runs_is_refused(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = Outcome(records=[], contracts={}, summarise=lambda manifest: {})
    first, second = begin(root), begin(root)
    for context in (first, second):
        # Both were taken over by nobody.
        monkeypatch.setattr(context.writer, "check", lambda: None)
    second.publish(outcome)
    with pytest.raises(AnotherPublishedError, match=rf"another run \({second.name}\) was published meanwhile") as error:
        first.publish(outcome)
    assert f"Run {first.name} is finished" in str(error.value)
    assert history(root) == [second.name] and shown(root) == second.name
    # As the message says.
    assert cli.main(["publish", first.directory]) == 0
    assert history(root) == [second.name, first.name] and shown(root) == first.name


@pytest.mark.objects
def test_a_run_that_lost_its_lease_publishes_nothing(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_run(Request(stage="score", out=root, inputs={}, options={}), started=0.0) as context:
        take_over(root)
        monkeypatch.setattr(lease, "RENEW", 0.0)
        with pytest.raises(LostLeaseError):
            context.publish(Outcome(records=[], contracts={}, summarise=lambda manifest: {}))
    assert history(root) == [] and shown(root) is None


def take_over(root: str) -> None:
    """Take the lease, as another process does after `TTL`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lease, "store_time", lambda path: time.time() + 3600)
        lease._acquire(root)


def stall(root: str, run: str, position: Position) -> Any:
    """Commit a publication, and stall before `latest.json` is written. Returned is what remains to be done."""
    left: list[tuple[Any, ...]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(publication, "_advance", lambda *given: left.append(given))
        point_to(root, run_of(root, run), position)
    return lambda: publication._advance(*left[0])


@pytest.mark.objects
def test_who_stalls_between_both_writes_takes_nothing_back(root: str) -> None:
    publish(root, Manifest(stage="score", run="old"))
    # B publishes before A wakes.
    wake = stall(root, "a", Position.of(root))
    assert shown(root) == "old"
    publish(root, Manifest(stage="score", run="b"))
    with pytest.raises(AnotherPublishedError, match=r"another run \(b\) was published meanwhile"):
        wake()
    assert (history(root), shown(root), number(root)) == (["old", "a", "b"], "b", 3)
    # A wakes while B works, which publishes all the same: its number is higher.
    wake = stall(root, "a2", Position.of(root))
    position = Position.of(root)
    wake()
    assert shown(root) == "a2"
    point_to(root, run_of(root, "b2"), position)
    assert (history(root)[3:], shown(root), number(root)) == (["a2", "b2"], "b2", 5)
    # A is cut off for ever. The next publication takes the next number.
    stall(root, "a3", Position.of(root))
    assert shown(root) == "b2"
    publish(root, Manifest(stage="score", run="b3"))
    assert (history(root)[5:], shown(root), number(root)) == (["a3", "b3"], "b3", 7)


@pytest.mark.objects
def test_a_pointer_that_is_written_again_does_not_let_an_old_one_in(root: str) -> None:
    """A token of s3 is a checksum: without the number, a rollback would bring the token back that A has seen."""
    for run in ("first", "second"):
        publish(root, Manifest(stage="score", run=run))
    before = Position.of(root)
    wake = stall(root, "late", before)
    publish(root, Manifest(stage="score", run="third"))
    publication.republish(f"{root}/runs/second", force=False, reason=None)
    assert shown(root) == "second" and Position.of(root).token != before.token
    with pytest.raises(AnotherPublishedError):
        wake()
    assert (shown(root), number(root)) == ("second", 5)


@pytest.mark.objects
@pytest.mark.parametrize("faults", [("lost",), ("lost", 503, "lost"), ("reset", "lost")])
def test_answers_that_are_lost_publish_once(root: str, stores: LocalStores, faults: tuple[int | str, ...]) -> None:
    proxy = stores.proxies[root.partition("://")[0]]
    publish(root, Manifest(stage="score", run="a"))
    manifest = run_of(root, "b")
    position = Position.of(root)
    proxy.clear()
    # The record, and then the pointer.
    proxy.spoil("POST" if root.startswith("gs") else "PUT", *faults, *faults)
    point_to(root, manifest, position)
    proxy.clear()
    assert (history(root), shown(root), number(root)) == (["a", "b"], "b", 2)


# --- commands


def scores(root: str, run: str) -> FileRecord:
    path = files.join(root, "runs", run, "scores", f"part-{uuid.uuid4().hex}.parquet")
    return FileRecord.of("scores", path, 1, files.write_parquet(path, pa.table({"value": [1]})))


def finished(root: str) -> str:
    run, _ = new_run(root)
    manifest = Manifest(stage="score", run=run)
    add_files(manifest, {"scores": ""}, [scores(root, run)])
    publish(root, manifest)
    return run


def ask(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert cli.main([*words, "--json"]) == 0, capsys.readouterr().err
    return dict(json.loads(capsys.readouterr().out.strip().splitlines()[-1]))


@pytest.mark.objects
def test_publish_rollback_and_runs(root: str, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = finished(root), finished(root)
    assert ask(capsys, "rollback", "--out", root, "--reason", "photos") | {"seconds": 0} == {
        "out": root,
        "run": first,
        "before": second,
        "published": True,
        "seconds": 0,
    }
    assert ask(capsys, "publish", f"{root}/runs/{second}")["before"] == first
    listed = ask(capsys, "runs", "--out", root)["score"]
    assert (listed["run"], listed["directory"]) == (second, f"{root}/runs/{second}")
    assert [entry["run"] for entry in listed["publications"]] == [first, second, first, second]
    with files.single_writer(root):
        for words in (["rollback", "--out", root], ["gc", "--out", root], ["publish", f"{root}/runs/{first}"]):
            assert cli.main(words) == 2
            assert "another camenn process is writing there" in capsys.readouterr().err


@pytest.mark.objects
def test_gc(stores: LocalStores, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """On both stores, for it takes a wait."""
    roots = [f"{scheme}://camenn/{uuid.uuid4().hex}" for scheme in ("gs", "s3")]
    runs = {}
    for root in roots:
        runs[root] = finished(root), finished(root)
        killed, directory = new_run(root)
        objects.put(f"{root}/runs/{killed}/precious.txt", b"not ours")
        scores(root, killed)
    assert all(ask(capsys, "gc", "--out", root, "--keep", "1")["files_found"] == 0 for root in roots)
    time.sleep(3.5)
    monkeypatch.setattr(garbage, "YOUNG", datetime.timedelta(seconds=2))
    for root in roots:
        young, directory = new_run(root)
        scores(root, young)
        names = {found.path for found in files.match(root, "**")}
        # Of the run that is not kept and of the killed one a part and a record each.
        assert ask(capsys, "gc", "--out", root, "--keep", "1", "--dry_run")["files_found"] == 4
        found = ask(capsys, "gc", "--out", root, "--keep", "1")
        assert (found["files_removed"], found["files_not_ours"], found["runs_kept"]) == (4, 1, 1)
        gone = names - {found.path for found in files.match(root, "**")}
        assert len(gone) == 4 and not any(f"/runs/{run}/" in path for path in gone for run in (runs[root][1], young))
        assert f"{root}/runs/{runs[root][0]}/manifest.json" not in gone
        latest = read_latest(root)
        assert latest is not None
        publication.check_whole(root, latest)
        assert ask(capsys, "gc", "--out", root, "--keep", "1")["files_found"] == 0


@pytest.mark.objects
def test_who_lost_the_lease_removes_nothing(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    finished(root)
    old = finished(root)
    monkeypatch.setattr(garbage, "YOUNG", datetime.timedelta(seconds=-3600))
    find = garbage.find_garbage

    def find_slowly(*given: Any, **named: Any) -> Any:
        found = find(*given, **named)
        assert found.files
        take_over(root)
        monkeypatch.setattr(lease, "RENEW", 0.0)
        return found

    monkeypatch.setattr(garbage, "find_garbage", find_slowly)
    names = {found.path for found in files.match(root, "runs/**")}
    with pytest.raises(LostLeaseError):
        garbage.collect(root, 1, None, dry_run=False)
    assert {found.path for found in files.match(root, "runs/**")} == names and shown(root) == old


@pytest.mark.objects
def test_who_lost_the_lease_drops_no_part(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of another writer, which this one had not listed."""
    directory = files.join(root, "images", "0123456789abcdef")
    row = {"embedding": [bytes(16)], "blur": [0.0], "luminance": [0.5], "width": [3], "height": [3]}
    contract = image_embeddings(2, 4)
    with files.single_writer(root) as writer:
        for key in "ab":
            table = pa.table({"image_key": [key], **row}, schema=contract.schema)
            commit_part(directory, contract, (2, 4), uuid.uuid4().hex, table, kernels="k")
        parts = list_parts(directory)
        merged = merge_parts(directory, parts)
        take_over(root)
        monkeypatch.setattr(lease, "RENEW", 0.0)
        with pytest.raises(LostLeaseError):
            drop_replaced([*parts, merged], set, unseen={part.name for part in parts}, writer=writer)
    assert all(files.exists(part.path) for part in parts)


@pytest.mark.objects
def test_a_training_that_lost_the_lease_ends(root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workplace, "UPLOAD_EVERY_S", 0.0)
    remote = f"{root}/checkpoints"
    with files.single_writer(root) as writer:
        ours = workplace.UploadedCheckpoints(tmp_path / "ours", remote, writer)
        ours.path.parent.mkdir()
        ours.path.write_bytes(b"ours")
        ours.saved()
        (uploaded,) = [found.path for found in objects.list_objects(f"{remote}/")]
        take_over(root)
        monkeypatch.setattr(lease, "RENEW", 0.0)
        objects.put(uploaded, b"theirs")
        with pytest.raises(LostLeaseError):
            ours.saved()
        ours.discard()
    assert objects.read(uploaded) == [b"theirs"]
