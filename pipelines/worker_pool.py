"""`python -m pipelines.worker_pool`: SDK workers for runners that ask for them (environment type EXTERNAL), as separate processes.

Beam's own `apache_beam.runners.worker.worker_pool_main` listens on every interface, starts PATH's `python`, and never reads what its workers print, so
that one which prints much hangs. This one listens on loopback unless told otherwise, starts its own interpreter, and gives each worker a log file.
"""

import argparse
import logging
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import grpc
from apache_beam.portability.api import beam_fn_api_pb2, beam_fn_api_pb2_grpc
from apache_beam.runners.worker.worker_pool_main import kill_process_gracefully
from apache_beam.utils import thread_pool_executor

from pipelines.package import package_fingerprint

_LOG = logging.getLogger(__name__)
_WORKER = """
import logging, sys
logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
from apache_beam.runners.worker.sdk_worker import SdkHarness
SdkHarness(sys.argv[1], worker_id=sys.argv[2], data_buffer_time_limit_ms=-1).run()
"""


class WorkerPool(beam_fn_api_pb2_grpc.BeamFnExternalWorkerPoolServicer):
    """Starts a Python process for each worker that a runner asks for, and ends it when the runner is done with it."""

    def __init__(self, logs: Path) -> None:
        self.logs = logs
        self.workers: dict[str, subprocess.Popen[bytes]] = {}
        self.lock = threading.Lock()

    def StartWorker(self, request: Any, context: Any) -> Any:
        """Beam's call: one more worker."""
        try:
            with self.lock:
                number = len(list(self.logs.glob("worker-*.log"))) + 1
                log = self.logs / f"worker-{number}.log"
                log.touch()
            with log.open("wb") as sink:
                worker = subprocess.Popen(
                    [sys.executable, "-c", _WORKER, request.control_endpoint.url, request.worker_id],
                    stdout=sink,
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                )
        except OSError as error:
            return beam_fn_api_pb2.StartWorkerResponse(error=f"the worker pool cannot start a worker: {error}")
        self.workers[request.worker_id] = worker
        _LOG.warning("worker %s is process %d, log %s", request.worker_id, worker.pid, log)
        return beam_fn_api_pb2.StartWorkerResponse()

    def StopWorker(self, request: Any, context: Any) -> Any:
        """Beam's call: that worker is not needed any more."""
        worker = self.workers.pop(request.worker_id, None)
        if worker is not None:
            kill_process_gracefully(worker)
            _LOG.warning("worker %s ended", request.worker_id)
        return beam_fn_api_pb2.StopWorkerResponse()

    def stop_all(self) -> None:
        """End every worker that is left."""
        while self.workers:
            kill_process_gracefully(self.workers.popitem()[1])


def build_parser() -> argparse.ArgumentParser:
    """The flags of the worker pool."""
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.worker_pool", description=(__doc__ or "").split("\n\n")[0], allow_abbrev=False
    )
    parser.add_argument("--port", type=int, default=50_000, help="port to listen on (default %(default)s)")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; on a cluster, the node's own, inside a network that only the cluster reaches (default %(default)s)",
    )
    parser.add_argument("--logs", default="worker-logs", help="directory of the workers' logs (default %(default)s)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Serve until a signal ends it."""
    arguments = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", stream=sys.stderr)
    logs = Path(arguments.logs).absolute()
    logs.mkdir(parents=True, exist_ok=True)
    server = grpc.server(
        thread_pool_executor.shared_unbounded_instance(),
        options=[
            ("grpc.http2.max_pings_without_data", 0),
            ("grpc.http2.max_ping_strikes", 0),
            ("grpc.so_reuseport", 0),
        ],
    )
    pool = WorkerPool(logs)
    beam_fn_api_pb2_grpc.add_BeamFnExternalWorkerPoolServicer_to_server(pool, server)
    try:
        server.add_insecure_port(f"{arguments.host}:{arguments.port}")
    except RuntimeError:
        print(
            f"worker pool: {arguments.host}:{arguments.port} is in use. Stop what listens there, or give another --port.",
            file=sys.stderr,
        )
        return 2
    server.start()
    _LOG.warning(
        "process %d listens on %s:%d with camenn package %s",
        os.getpid(),
        arguments.host,
        arguments.port,
        package_fingerprint(),
    )
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    ended.wait()
    server.stop(0)
    pool.stop_all()
    return 0


if __name__ == "__main__":
    sys.exit(main())
