"""Quality, proven: CameNN against baselines, ablations and controls, in cities with known truth and on a real log.

    python -m benchmarks.quality --work DIR --image_weights FILE --text_encoder DIR [--real DIR --image_root DIR]

Models are trained in processes of one thread each, `--jobs` at a time; what is done is kept in `--results` and not done again, so the command may be
ended at any time and repeated. Tables go to WORK/quality.md and, with --docs, into docs/results.md. `--quick`: one seed, a small city (and the real log where
it is given), one JSON line with `beats_lightgbm`; exit code 1 if a claim does not hold. Needs the extra `baselines`.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor, as_completed, wait
from dataclasses import asdict
from pathlib import Path

from benchmarks.command import names_of, work_directory
from benchmarks.quality.claims import quick_claims, write_tables
from benchmarks.quality.job import Job, say
from benchmarks.quality.plan import PARTS, list_jobs


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality", description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("--work", type=Path, help="directory kept for the next time (default: a temporary one)")
    parser.add_argument("--results", type=Path, help="directory of the results, a file a model (default: WORK/results)")
    parser.add_argument(
        "--image_weights", default="random:0", help="InceptionV4, as for camenn embed (default %(default)s)"
    )
    parser.add_argument("--text_encoder", required=True, help="BERT, as for camenn embed")
    parser.add_argument("--real", type=Path, help="data directory of a real log")
    parser.add_argument("--image_root", type=Path, help="where the real log's photos lie")
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
    parser.add_argument("--epochs", type=int, default=1, help="passes over a city's log (default %(default)s)")
    parser.add_argument("--real_epochs", type=int, default=1, help="passes over the real log (default %(default)s)")
    parser.add_argument(
        "--jobs", type=int, default=0, help="models trained at a time, on one thread each; 0 = one a core"
    )
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no model later than this")
    parser.add_argument("--docs", action="store_true", help="put the tables into docs/results.md")
    parser.add_argument("--quick", action="store_true", help="one seed, a small city, one JSON line")
    return parser


def run_job(job: Job, deadline: float) -> str:
    """Run a job in a process of its own, unless it is done or it is late; returns how that went."""
    if job.done():
        return "was done"
    if time.monotonic() > deadline:
        return "left for the next time"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, "-m", "benchmarks.quality.job", json.dumps(asdict(job))]
    return "failed" if subprocess.run(command, env=environment, check=False).returncode else "done"


def main(argv: list[str] | None = None) -> int:
    """Run what is missing, write the tables; 1 where a job failed or a claim of --quick does not hold."""
    arguments = build_parser().parse_args(argv)
    deadline = time.monotonic() + 60 * arguments.minutes
    with work_directory(arguments.work, "quality") as work:
        arguments.work = work
        jobs = list_jobs(arguments)
        say(f"{len(jobs)} models, {sum(job.done() for job in jobs)} of them done")
        outcomes: dict[str, str] = {}
        with ThreadPoolExecutor(arguments.jobs or os.cpu_count() or 1) as pool:
            running: dict[Future[str], Job] = {}
            prepared: set[str] = set()
            for _, of_seed in itertools.groupby(jobs, key=lambda job: job.seed):
                # Baselines are tuned on seed 0 first.
                wait(running)
                for job in of_seed:
                    if job.world.name not in prepared and not job.done() and time.monotonic() < deadline:
                        # Encoding takes all cores: it waits for the models that are being trained.
                        wait(running)
                        job.world.prepare()
                        prepared.add(job.world.name)
                    running[pool.submit(run_job, job, deadline)] = job
            for place, future in enumerate(as_completed(running), start=1):
                job = running[future]
                outcomes[job.name] = future.result()
                say(f"{place}/{len(jobs)} {job.name}: {outcomes[job.name]}")
        results = [json.loads(job.result().read_text()) for job in jobs if job.done()]
        failed = [name for name, outcome in outcomes.items() if outcome == "failed"]
        if failed:
            say(f"failed: {', '.join(failed)}")
            return 1
        if arguments.quick:
            found, broken = quick_claims(results)
            print(json.dumps(found), flush=True)
            for claim in broken:
                say(f"does not hold: {claim}")
            return 1 if broken else 0
        write_tables(results, work, docs=arguments.docs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
