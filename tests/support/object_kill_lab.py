"""Kill commands between two requests to an object store.

Readers must see the old run or the new one, whole. No publication may be lost, and what a killed
command left is found by `camenn gc`.

    eval "$(scripts/object_store_local.sh env)"
    python -m tests.support.object_kill_lab --place s3://camenn/lab --points 25 [--only score,publish]

A command runs in a forked child, in which every request that changes the store is counted twice,
before it is sent and after it was answered. It runs to its end once, and then once for each chosen
point, at which the child is killed by SIGKILL. The place is not put back in between: what was left
behind stays there, as after real crashes.
"""

import argparse
import datetime
import importlib
import json
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines import cli
from pipelines.io import files, objects
from pipelines.runs import garbage
from pipelines.runs.manifest import Manifest, published_files, read_latest, read_run
from pipelines.runs.publication import check_whole, publications
from schemas.manifest import LATEST, MANIFEST, PUBLISHED, RUNS
from tests.support.kill_lab import MODULES
from tests.support.published_rows import published
from tests.support.tiny_encoders import write_text_model, write_timm_model

CHANGING = ("put", "delete", "upload")


class CountedUpload:
    """An upload whose requests are counted."""

    def __init__(self, upload: Any, step: Callable[[str], None]) -> None:
        self._upload, self._step = upload, step
        self.threads = upload.threads

    def add(self, number: int, part: bytes) -> None:
        self._step("part")
        self._upload.add(number, part)
        self._step("part")

    def finish(self) -> None:
        self._step("finish")
        self._upload.finish()
        self._step("finish")

    def abort(self) -> None:
        self._upload.abort()


class CountedClient:
    """A client that counts what changes the store, and kills this process at one of these points."""

    def __init__(self, client: Any, log: int, stop: int) -> None:
        self._client, self._log, self._stop = client, log, stop
        self.count = 0

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._client, name)
        if name not in CHANGING:
            return real

        def call(*arguments: Any) -> Any:
            self.step(name)
            answer = real(*arguments)
            self.step(name)
            return CountedUpload(answer, self.step) if name == "upload" else answer

        return call

    def step(self, what: str) -> None:
        """Count a point, and record it."""
        self.count += 1
        if self.count == self._stop:
            os.kill(os.getpid(), signal.SIGKILL)
        os.write(self._log, f"{what}\n".encode())


def run_child(argv: list[str], stop: int = 0, before: Callable[[], None] = lambda: None) -> tuple[int, int, str]:
    """Run a command in a forked child.

    Returns its exit code or minus the signal, the points that it passed, and what it printed.
    """
    with tempfile.TemporaryDirectory() as scratch:
        log, said = Path(scratch) / "log", Path(scratch) / "said"
        pid = os.fork()
        if pid == 0:
            code = 99
            try:
                output = os.open(said, os.O_WRONLY | os.O_CREAT)
                os.dup2(output, 1)
                os.dup2(output, 2)
                handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                real = objects._client
                clients: dict[str, Any] = {}

                def client(scheme: str) -> Any:
                    if scheme not in clients:
                        clients[scheme] = CountedClient(real(scheme), handle, stop)
                    return clients[scheme]

                objects._client = client
                before()
                code = cli.main(argv)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        passed = len(log.read_text().splitlines()) if log.exists() else 0
        return code, passed, said.read_text() if said.exists() else ""


def must(argv: list[str], before: Callable[[], None] = lambda: None) -> int:
    """Run a command to its end, and return its points."""
    code, passed, said = run_child(argv, before=before)
    assert code == 0, f"{' '.join(argv)} ended with {code}:\n{said[-3000:]}"
    return passed


def no_age() -> None:
    """Let gc take what was written just now."""
    garbage.YOUNG = datetime.timedelta(seconds=-5)


@dataclass
class Lab:
    """A tiny city with all outputs below a place of an object store."""

    place: str
    encoders: list[str]
    expected: dict[str, Any] = field(default_factory=dict)
    """Output -> its rows, sorted: those of every run are the same"""

    def at(self, name: str) -> str:
        return f"{self.place}/{name}"

    def command(self, stage: str, store: str = "store") -> list[str]:
        data, shards, model, scores = (self.at(name) for name in ("data", "shards", "model", "scores"))
        return {
            "embed": ["embed", "--data", data, "--image_root", data, "--store", self.at(store), *self.encoders],
            "shards": ["shards", "--data", data, "--store", self.at(store), "--out", shards, "--rebuild"],
            "train": ["train", "--shards", shards, "--out", model, "--rerun", "--no_alignment"],
            "score": [
                *["score", "--data", data, "--store", self.at(store), "--model", model, "--out", scores, "--rerun"]
            ],
            "gc": ["gc", "--out", scores, "--keep", "1"],
            "rollback": ["rollback", "--out", scores],
            "report": ["report", "--run", self.place],
        }[stage]

    def build(self, data: Path) -> None:
        """Make the outputs, with two runs of scores."""
        for path in sorted(path for path in data.rglob("*") if path.is_file()):
            objects.put(f"{self.at('data')}/{path.relative_to(data)}", path.read_bytes())
        for stage in ("embed", "shards", "train", "score", "score"):
            must(self.command(stage))
        for name in ("store", "shards", "scores"):
            self.expected[name] = published(self.at(name))

    def check(self, name: str, history: list[str]) -> str:
        """Check what readers see of an output; returns the published run."""
        root = self.at(name)
        latest = read_latest(root)
        assert latest is not None, "nothing is published any more"
        check_whole(root, latest)
        if name in self.expected:
            found = published(root)
            for table, rows in self.expected[name].items():
                assert found[table].drop_columns(_versions(found[table])).equals(rows.drop_columns(_versions(rows))), (
                    f"{table} of run {latest.run} differs"
                )
        now = [path for _, path in published_files(root)]
        assert now[: len(history)] == history, "a publication is lost"
        assert latest.run in {entry["run"] for entry in publications(root)}, "the published run has no record"
        return latest.run

    def history(self, name: str) -> list[str]:
        return [path for _, path in published_files(self.at(name))]

    def runs(self, name: str) -> list[str]:
        """List the runs that can be published."""
        found = files.match(files.join(self.at(name), RUNS), f"*/{MANIFEST}")
        return sorted(file.path.split("/")[-2] for file in found)


def _versions(table: Any) -> list[str]:
    return [name for name in ("model_version",) if name in table.column_names]


def kill_at(lab: Lab, stage: str, point: int, number: int) -> str:
    """Kill one command at a point, check, and run it again; returns what readers saw in between."""
    out = {"embed": f"store-{number}", "shards": "shards", "train": "model"}.get(stage, "scores")
    if stage == "embed":
        code, _, said = run_child(lab.command("embed", out), point)
        latest = read_latest(lab.at(out))
        state = "old" if latest is None else "new"
        again = lab.command("embed", out)
    else:
        argv = lab.command(stage) if stage != "publish" else ["publish", _other_run(lab)]
        if stage == "rollback":
            must(["publish", _other_run(lab)])
        if stage == "gc":
            # Its garbage is the run before.
            must(lab.command("score"))
        before, history = read_latest(lab.at(out)), lab.history(out)
        assert before is not None
        code, _, said = run_child(argv, point, no_age if stage == "gc" else lambda: None)
        state = "old" if lab.check(out, history) == before.run else "new"
        again = argv
    assert code in (-signal.SIGKILL, 0), f"{stage} at {point} ended with {code}:\n{said[-2000:]}"
    if stage in ("embed", "gc", "report"):
        must(again, no_age if stage == "gc" else lambda: None)
    if stage == "embed":
        lab.expected[out] = lab.expected["store"]
        lab.check(out, [])
        files.delete_directory(lab.at(out))
    return state if code else "missed"


def _other_run(lab: Lab) -> str:
    latest = read_latest(lab.at("scores"))
    assert latest is not None
    others = []
    for run in lab.runs("scores"):
        if run != latest.run:
            manifest = read_run(lab.at("scores"), run)
            if _is_whole(lab.at("scores"), manifest):
                others.append(run)
    return files.join(lab.at("scores"), RUNS, others[-1])


def _is_whole(root: str, manifest: Manifest) -> bool:
    there = {found.path for found in files.find(path for table in manifest.tables for path in manifest.listed(table))}
    return there == {path for table in manifest.tables for path in manifest.listed(table)}


def leftovers(lab: Lab, name: str) -> list[str]:
    """Collect garbage, and list what nobody refers to and is still there."""
    root = lab.at(name)
    must(["gc", "--out" if name != "store" else "--out", root, "--keep", "1"], no_age)
    latest = read_latest(root)
    assert latest is not None
    kept = {path for table in latest.tables for path in latest.listed(table)}
    own = f"{root}/{RUNS}/{latest.run}/"
    left = []
    for found in objects.list_objects(f"{root}/"):
        path = found.path
        inner = path.removeprefix(f"{root}/")
        documents = inner == LATEST or inner.startswith((f"{PUBLISHED}/", ".")) or path.endswith(f"/{MANIFEST}")
        vouched = path.removesuffix(".json") + ".parquet" in kept or path.removesuffix(".keys.parquet") in kept
        if not (documents or path in kept or path.startswith(own) or vouched or path.endswith("/.camenn")):
            left.append(inner)
    return left


def main(argv: list[str] | None = None) -> int:
    """Parse, kill, report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--place", required=True, help="empty prefix of an object store")
    parser.add_argument("--points", type=int, default=25, help="for each command")
    parser.add_argument("--only", default="embed,shards,train,score,publish,rollback,gc,report")
    arguments = parser.parse_args(argv)
    modules = ("torch", "matplotlib.pyplot", "camenn_model.package", "camenn_model.scoring.scorer", *MODULES)
    tallies: dict[str, dict[str, int]] = {}
    broken: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="camenn-lab-") as scratch:
        os.environ["CAMENN_CACHE"] = f"{scratch}/cache"
        root = Path(scratch)
        encoders = _in_child(lambda: _encoders(root), root)
        for module in modules:
            importlib.import_module(module)
        must(["simulate", "--out", f"{scratch}/data", "--preset", "tiny"])
        lab = Lab(arguments.place.rstrip("/"), encoders)
        lab.build(root / "data")
        for stage in arguments.only.split(","):
            total = _count_points(lab, stage)
            step = max(1.0, total / arguments.points)
            chosen = sorted({1 + int(number * step) for number in range(min(arguments.points, total))})
            tally = tallies.setdefault(stage, {"points": 0, "of": total, "old": 0, "new": 0, "missed": 0, "broken": 0})
            for number, point in enumerate(chosen):
                tally["points"] += 1
                try:
                    tally[kill_at(lab, stage, point, number)] += 1
                except Exception as error:
                    tally["broken"] += 1
                    broken.append({"command": stage, "point": point, "error": f"{type(error).__name__}: {error}"})
            print(f"{stage}: {tally}", file=sys.stderr, flush=True)
        left = {name: leftovers(lab, name) for name in ("store", "shards", "model", "scores")}
        print(f"left after gc: { {name: len(found) for name, found in left.items()} }", file=sys.stderr, flush=True)
    print(json.dumps({"tallies": tallies, "broken": broken, "left": left}))
    return 1 if broken or any(left.values()) else 0


def _count_points(lab: Lab, stage: str) -> int:
    if stage == "embed":
        total = must(lab.command("embed", "store-counted"))
        files.delete_directory(lab.at("store-counted"))
        return total
    if stage == "publish":
        return must(["publish", _other_run(lab)])
    if stage == "gc":
        must(lab.command("score"))
    return must(lab.command(stage), no_age if stage == "gc" else lambda: None)


def _encoders(root: Path) -> list[str]:
    image, text = write_timm_model(root / "resnet", "resnet18"), write_text_model(root / "xlm", "xlm-roberta")
    small = ["--grid", "2", "--max_tokens", "16", "--precision", "fp32", "--direct_num_workers=1"]
    return ["--image_weights", str(image), "--text_encoder", str(text), *small]


def _in_child(work: Callable[[], list[str]], scratch: Path) -> list[str]:
    """Return what some work returns that starts threads: this process forks later."""
    pid = os.fork()
    if pid == 0:
        try:
            (scratch / "answer.json").write_text(json.dumps(work()))
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    return list(json.loads((scratch / "answer.json").read_text()))


if __name__ == "__main__":
    sys.exit(main())
