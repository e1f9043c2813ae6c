"""Start Beam's SDK workers as separate processes.

    python -m pipelines.runner.worker_pool

They are for runners that ask for them (environment type EXTERNAL).

Beam's own `apache_beam.runners.worker.worker_pool_main` listens on every interface, starts PATH's
`python`, and never reads what its workers print, so that one which prints much hangs. This one
listens on loopback by default, starts its own interpreter, and gives each worker a log file.

A worker runs whatever code its runner sends, as the user who started the pool: whoever may request
a worker can act as that user. On Linux the pool answers no other user of its machine. It cannot
distinguish the users of other machines, which reach it with --host only.
"""

import argparse
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from apache_beam.portability.api import beam_fn_api_pb2, beam_fn_api_pb2_grpc
from apache_beam.runners.worker.worker_pool_main import kill_process_gracefully
from apache_beam.utils import thread_pool_executor

from pipelines.runner.loopback import HOST, SameUser, is_loopback, local_server
from pipelines.runner.worker_version import package_fingerprint

_LOG = logging.getLogger(__name__)
_LOOK_EVERY_S = 5.0
_OPTIONS = [
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.so_reuseport", 0),
]
_WORKER = """
import logging, sys
logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
from apache_beam.runners.worker.sdk_worker import SdkHarness
SdkHarness(sys.argv[1], worker_id=sys.argv[2], data_buffer_time_limit_ms=-1).run()
"""


@dataclass(frozen=True)
class _Worker:
    """One worker process and its runner's address.

    The address is that of the runner process that it serves.
    """

    name: str
    process: subprocess.Popen[bytes]
    host: str
    port: int

    def is_wanted(self) -> bool:
        """Return whether the runner's server still listens."""
        try:
            socket.create_connection((self.host, self.port), timeout=5).close()
        except OSError:
            return False
        return True


class WorkerPool(beam_fn_api_pb2_grpc.BeamFnExternalWorkerPoolServicer):
    """A service that starts and ends workers for runners.

    It starts a Python process for each worker that a runner requests, and ends it when the runner
    is done with it.

    Several TaskManagers of one machine share a pool, and each numbers its workers from 1-1 on: the
    name in a `StopWorker` request does not identify one worker. So a worker is ended when the
    server that it was started for is gone, which happens in every case.
    """

    def __init__(self, logs: Path) -> None:
        self.logs = logs
        self.workers: list[_Worker] = []
        self.lock = threading.Lock()
        self.ended = threading.Event()
        threading.Thread(target=self._look_after, daemon=True).start()

    def StartWorker(self, request: Any, context: Any) -> Any:
        """Answer Beam's call for one more worker."""
        host, _, port = request.control_endpoint.url.rpartition(":")
        try:
            with self.lock:
                log = self.logs / f"worker-{len(list(self.logs.glob('worker-*.log'))) + 1}.log"
                with log.open("wb") as sink:
                    process = subprocess.Popen(
                        [
                            sys.executable,
                            "-X",
                            "faulthandler",
                            "-c",
                            _WORKER,
                            request.control_endpoint.url,
                            request.worker_id,
                        ],
                        stdout=sink,
                        stderr=subprocess.STDOUT,
                        stdin=subprocess.DEVNULL,
                    )
                self.workers.append(_Worker(request.worker_id, process, host.strip("[]"), int(port)))
        except (OSError, ValueError) as error:
            return beam_fn_api_pb2.StartWorkerResponse(error=f"the worker pool cannot start a worker: {error}")
        _LOG.warning(
            "worker %s at %s: process %d, log %s", request.worker_id, request.control_endpoint.url, process.pid, log
        )
        return beam_fn_api_pb2.StartWorkerResponse()

    def StopWorker(self, request: Any, context: Any) -> Any:
        """Answer Beam's call to stop a worker.

        It does nothing, as the name is ambiguous: see the class.
        """
        return beam_fn_api_pb2.StopWorkerResponse()

    def _look_after(self) -> None:
        missed: set[_Worker] = set()
        while not self.ended.wait(_LOOK_EVERY_S):
            for worker in list(self.workers):
                code = worker.process.poll()
                if code is None and worker.is_wanted():
                    missed.discard(worker)
                    continue
                if code is None and worker not in missed:
                    # Usually the worker notices by itself, and ends.
                    missed.add(worker)
                    continue
                if code is None:
                    kill_process_gracefully(worker.process)
                with self.lock:
                    self.workers.remove(worker)
                missed.discard(worker)
                _LOG.warning(
                    "worker %s, process %d, ended with code %s",
                    worker.name,
                    worker.process.pid,
                    worker.process.returncode,
                )

    def stop_all(self) -> None:
        """End every worker that is left."""
        self.ended.set()
        with self.lock:
            for worker in self.workers:
                kill_process_gracefully(worker.process)


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the worker pool's flags."""
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.runner.worker_pool", description=(__doc__ or "").split("\n\n")[0], allow_abbrev=False
    )
    parser.add_argument("--port", type=int, default=50_000, help="port to listen on (default %(default)s)")
    parser.add_argument(
        "--host",
        default=HOST,
        help="address to listen on; another than loopback serves whoever reaches it: only inside "
        "a network that the cluster alone reaches (default %(default)s)",
    )
    parser.add_argument("--logs", default="worker-logs", help="directory of the workers' logs (default %(default)s)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Serve until a signal ends it."""
    arguments = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", stream=sys.stderr, force=True)
    logs = Path(arguments.logs).absolute()
    logs.mkdir(parents=True, exist_ok=True)
    threads = thread_pool_executor.shared_unbounded_instance()
    server: Any
    if is_loopback(arguments.host):
        server = local_server(threads, options=_OPTIONS)
    else:
        _LOG.warning("%s is no loopback address: whoever reaches it can run code as this user", arguments.host)
        server = grpc.server(threads, interceptors=(SameUser({arguments.port}, remote=True),), options=_OPTIONS)
    pool = WorkerPool(logs)
    beam_fn_api_pb2_grpc.add_BeamFnExternalWorkerPoolServicer_to_server(pool, server)
    try:
        server.add_insecure_port(f"{arguments.host}:{arguments.port}")
    except RuntimeError:
        print(
            f"worker pool: {arguments.host}:{arguments.port} is in use. Stop what listens "
            "there, or give another --port.",
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
