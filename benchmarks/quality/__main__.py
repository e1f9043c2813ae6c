"""Compare CameNN's quality with baselines, ablations and controls.

    python -m benchmarks.quality --work DIR --image_weights FILE --text_encoder DIR [--real DIR --image_root DIR]
                                [--log_a DIR --log_b DIR]

The comparison is made in cities with known truth and on a real log.

Models are trained in processes of one thread each, `--jobs` at a time. Finished results are kept in
`--results` and reused, so the command may be ended at any time (its jobs end with it) and repeated.
Tables and plots go to WORK/quality.md and quality.png and, with --docs, into
docs/results/quality.md.

`--summary` prints one JSON line of the results' main figures. `--quick` is one seed, a small city
(and the real log where it is given), one JSON line with `beats_lightgbm`, and exit code 1 if a claim
does not hold. Needs the extra `baselines`.
"""

import argparse
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import asdict
from functools import partial
from pathlib import Path

from benchmarks.quality.claims import quick_claims
from benchmarks.quality.job import Job, log
from benchmarks.quality.plan import PARTS, list_jobs
from benchmarks.quality.publish import DOCS, publish
from benchmarks.quality.summary import summarize
from benchmarks.quality.worlds import World
from benchmarks.support.command import names_of, work_directory
from benchmarks.support.processes import Children


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the flags."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality", description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("--work", type=Path, help="directory kept for the next time (default: a temporary one)")
    parser.add_argument("--results", type=Path, help="directory of the results, a file a model (default: WORK/results)")
    parser.add_argument(
        "--image_weights", default="random:0", help="InceptionV4, as for camenn embed (default %(default)s)"
    )
    parser.add_argument("--text_encoder", help="BERT, as for camenn embed (required, but for --summary)")
    parser.add_argument("--real", type=Path, help="data directory of a real log")
    parser.add_argument("--image_root", type=Path, help="where the real log's photos lie")
    for half in "ab":
        parser.add_argument(
            f"--log_{half}",
            type=Path,
            help=f"data directory of the full log's half {half} (python -m examples.complete_journey)",
        )
    parser.add_argument(
        "--parts", type=names_of(PARTS), default=list(PARTS), help=f"of {','.join(PARTS)} (default: all)"
    )
    parser.add_argument(
        "--seeds", type=int, default=5, help="seeds of cities and of the real log (default %(default)s)"
    )
    parser.add_argument(
        "--ablation_seeds", type=int, default=3, help="seeds of ablations and controls (default %(default)s)"
    )
    parser.add_argument(
        "--trials", type=int, default=30, help="random-search trials of a baseline (default %(default)s)"
    )
    parser.add_argument("--epochs", type=int, default=1, help="epochs over a city's log (default %(default)s)")
    parser.add_argument("--real_epochs", type=int, default=1, help="epochs over the real log (default %(default)s)")
    parser.add_argument(
        "--jobs", type=int, default=0, help="models trained at a time, on one thread each; 0 = one a core"
    )
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no model later than this")
    parser.add_argument("--docs", action="store_true", help="put tables and plots into docs/results/quality.md")
    parser.add_argument(
        "--summary",
        action="store_true",
        help="train nothing: print the main figures of --results (default: docs/results/data) as one JSON line",
    )
    parser.add_argument("--quick", action="store_true", help="one seed, a small city, one JSON line")
    return parser


def run_job(job: Job, children: Children) -> str:
    """Run a job in a process of its own.

    Returns a sentence about the outcome.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, "-m", "benchmarks.quality.job", json.dumps(asdict(job))]
    return "failed" if children.run(command, environment) else "done"


def prepare_world(world: World, children: Children) -> str:
    """Prepare a log in a process of its own.

    Returns a sentence about the outcome.
    """
    command = [sys.executable, "-m", "benchmarks.quality.worlds", json.dumps(asdict(world))]
    return "failed" if children.run(command) else "done"


def run_jobs(jobs: list[Job], at_a_time: int, deadline: float) -> list[str]:
    """Run the jobs that are not done, in their order.

    Each runs after its log's preparation and the tuning it builds on. Returns the names of failed
    jobs. Nothing is started after `deadline`, a time of `time.monotonic()`.

    A log is prepared while the models of the previous one are trained, so that no core of a small
    machine is idle.
    """
    with ThreadPoolExecutor(at_a_time) as pool, Children() as children:
        begun: dict[str, Future[str]] = {}

        def task(work: Callable[[], str], needs: list[Future[str]]) -> str:
            # Its prerequisites were submitted before it, so they are done or running in another thread.
            if any(need.result() != "done" for need in needs):
                return "left out, as its prerequisite failed"
            return work() if time.monotonic() < deadline else "left for the next time"

        def submit(name: str, work: Callable[[], str], needs: Iterable[str] = ()) -> None:
            begun[name] = pool.submit(task, work, [begun[need] for need in needs if need in begun])

        def submit_world(world: World) -> None:
            if f"log {world.name}" not in begun:
                submit(f"log {world.name}", partial(prepare_world, world, children))

        missing = [job for job in jobs if not job.done()]
        groups = [list(group) for _, group in itertools.groupby(missing, key=lambda job: job.world.name)]
        for group, after in itertools.zip_longest(groups, groups[1:]):
            submit_world(group[0].world)
            if after is not None:
                submit_world(after[0].world)
            for job in group:
                needs = [f"log {job.world.name}", *([job.tuned_by] if job.tuned_by else [])]
                submit(job.name, partial(run_job, job, children), needs)
        names = {future: name for name, future in begun.items()}
        for place, future in enumerate(as_completed(names), start=1):
            log(f"{place}/{len(names)} {names[future]}: {future.result()}")
    return [name for name, future in begun.items() if future.result() == "failed"]


def main(argv: list[str] | None = None) -> int:
    """Run all missing jobs and write the tables.

    Returns 1 where a job failed or a claim of --quick does not hold.
    """
    parser = build_parser()
    arguments = parser.parse_args(argv)
    if arguments.summary:
        directory = arguments.results or DOCS / "data"
        print(json.dumps(summarize([json.loads(path.read_text()) for path in sorted(directory.glob("*.json"))])))
        return 0
    if arguments.text_encoder is None:
        parser.error("--text_encoder is required.")
    deadline = time.monotonic() + 60 * arguments.minutes
    with work_directory(arguments.work, "quality") as work:
        arguments.work = work
        jobs = list_jobs(arguments)
        log(f"{len(jobs)} models, {sum(job.done() for job in jobs)} of them done")
        failed = run_jobs(jobs, arguments.jobs or os.cpu_count() or 1, deadline)
        results = [json.loads(job.result().read_text()) for job in jobs if job.done()]
        if failed:
            log(f"failed: {', '.join(failed)}")
            return 1
        if arguments.quick:
            found, broken = quick_claims(results)
            print(json.dumps(found), flush=True)
            for claim in broken:
                log(f"does not hold: {claim}")
            return 1 if broken else 0
        publish(results, work, docs=arguments.docs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
