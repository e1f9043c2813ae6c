"""A proxy that counts requests, and spoils some of them."""

import http.client
import http.server
import os
import re
import socket
import struct
import threading
from dataclasses import dataclass
from typing import Any

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials


@dataclass(frozen=True)
class Request:
    """A request as it was answered: 0 = not at all."""

    method: str
    path: str
    status: int
    bytes_in: int
    bytes_out: int
    range: str = ""


class CountingProxy:
    """Hands requests to a store, and keeps a list of them.

    A fault is a status to answer with (the store sees nothing), or "reset" (the same, by a closed connection), "lost"
    (the store sees the request, the client no answer), or "short" (half of the body).

    With `without_conditions`, the store sees no condition of a write: it writes whatever is there. A request to s3 is
    signed again for that, with the keys of the environment.
    """

    without_conditions = False

    def __init__(self, backend: str) -> None:
        self.backend = backend.removeprefix("http://")
        self.requests: list[Request] = []
        self.sockets = 0
        self._faults: list[tuple[str, int | str]] = []
        self._numbered: dict[int, int | str] = {}
        self._lock = threading.Lock()
        proxy = self

        class Handler(_Handler):
            owner = proxy

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def spoil(self, method: str, *faults: int | str) -> None:
        """Spoil the next requests of a method, one fault each."""
        with self._lock:
            self._faults += [(method, fault) for fault in faults]

    def spoil_at(self, faults: dict[int, int | str]) -> None:
        """Spoil requests by their numbers, 1 = the next one."""
        with self._lock:
            self._numbered = {len(self.requests) + number: fault for number, fault in faults.items()}

    @property
    def waiting(self) -> int:
        """Return the faults that nobody ran into yet."""
        return len(self._faults) + len(self._numbered)

    def clear(self) -> None:
        """Forget all requests.

        Faults that nobody ran into are an error.
        """
        with self._lock:
            assert self._faults == [] and self._numbered == {}
            self.requests.clear()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def next_fault(self, method: str) -> int | str | None:
        with self._lock:
            due = [number for number in self._numbered if number <= len(self.requests) + 1]
            if due:
                return self._numbered.pop(min(due))
            for number, (wanted, fault) in enumerate(self._faults):
                if wanted == method:
                    del self._faults[number]
                    return fault
        return None

    @property
    def methods(self) -> list[str]:
        return [request.method for request in self.requests]

    @property
    def bytes_out(self) -> int:
        return sum(request.bytes_out for request in self.requests)


def unconditional(method: str, path: str, headers: dict[str, str], body: bytes) -> tuple[str, dict[str, str]]:
    """Leave the conditions out of a request.

    Returned are its path and headers.
    """
    path = re.sub(r"[?&]ifGenerationMatch=\d+", "", path)
    kept = {name: value for name, value in headers.items() if name.lower() not in ("if-match", "if-none-match")}
    if len(kept) == len(headers):
        return path, headers
    credentials = Credentials(os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"])
    request = AWSRequest(method, f"http://{headers['Host']}{path}", headers=kept, data=body)
    S3SigV4Auth(credentials, "s3", os.environ.get("AWS_DEFAULT_REGION", "us-east-1")).add_auth(request)
    return path, dict(request.headers.items())


class _Handler(http.server.BaseHTTPRequestHandler):
    owner: CountingProxy
    protocol_version = "HTTP/1.1"
    # Without it, a small answer waits for the client's delayed ACK, 40 ms.
    disable_nagle_algorithm = True
    wbufsize = -1

    def setup(self) -> None:
        super().setup()
        self.owner.sockets += 1
        self.store = http.client.HTTPConnection(self.owner.backend, timeout=120)

    def finish(self) -> None:
        super().finish()
        self.store.close()

    def handle_expect_100(self) -> bool:
        # boto3 waits for it before it sends a body.
        found = super().handle_expect_100()
        self.wfile.flush()
        return found

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            pieces = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(pieces)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _handle(self) -> None:
        body = self._body()
        fault = self.owner.next_fault(self.command)
        if isinstance(fault, int):
            self._answer(fault, [], b"", len(body))
        elif fault == "reset":
            self._reset(len(body))
        else:
            # The host is part of what S3 requests sign.
            hop = ("connection", "transfer-encoding", "content-length", "expect")
            headers = {name: value for name, value in self.headers.items() if name.lower() not in hop}
            if body or self.command in ("PUT", "POST"):
                headers["Content-Length"] = str(len(body))
            path = self.path
            if self.owner.without_conditions:
                path, headers = unconditional(self.command, path, headers, body)
            self.store.request(self.command, path, body or None, headers)
            answer = self.store.getresponse()
            data = answer.read()
            if fault == "lost":
                self._reset(len(body))
            else:
                self._answer(answer.status, answer.getheaders(), data, len(body), short=fault == "short")

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do_PATCH = _handle

    def _answer(
        self, status: int, headers: list[tuple[str, str]], data: bytes, taken: int, short: bool = False
    ) -> None:
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                self.send_header(name, value.replace(f"http://{self.owner.backend}", self.owner.url))
        length = dict(headers).get("Content-Length", "0") if self.command == "HEAD" else str(len(data))
        if status not in (204, 304):
            self.send_header("Content-Length", length)
        sent = data[: len(data) // 2] if short else data
        # Before the client can ask what was counted.
        self._count(status, taken, len(sent))
        self.end_headers()
        self.wfile.write(sent)
        self.wfile.flush()
        if short:
            self.close_connection = True

    def _reset(self, taken: int) -> None:
        self._count(0, taken, 0)
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        # The file objects hold the socket open.
        self.rfile.close()
        self.connection.close()

    def _count(self, status: int, taken: int, sent: int) -> None:
        wanted = self.headers.get("Range", "")
        self.owner.requests.append(Request(self.command, self.path, status, taken, sent, wanted))
