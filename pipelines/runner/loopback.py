"""Keep Beam's own servers to this machine and user.

FnApiRunner with several workers, and runners whose workers are this machine's, open gRPC ports for
the workers. Beam binds them to every interface and authenticates nobody, though whoever connects
may read the job's data and any file of the user. Here they listen on loopback, and answer the user
alone.
"""

import contextlib
import importlib
import ipaddress
import logging
import os
import socket
import sys
import urllib.parse
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import grpc

from schemas.errors import InputError

_LOG = logging.getLogger(__name__)

HOST = "localhost"
"""Address to which workers connect. It may mean either of `loopback_addresses`, so servers listen on both."""

EVERYWHERE = ("", "*", "0.0.0.0", "[::]")

TABLES = ("/proc/net/tcp", "/proc/net/tcp6")
"""Linux's tables of connections, each with the user whose socket it is."""

ESTABLISHED = "01"

_WORKER_HANDLERS = "apache_beam.runners.portability.fn_api_runner.worker_handlers"

_TRIES = 8

_KINDS = {
    (False, False): grpc.unary_unary_rpc_method_handler,
    (False, True): grpc.unary_stream_rpc_method_handler,
    (True, False): grpc.stream_unary_rpc_method_handler,
    (True, True): grpc.stream_stream_rpc_method_handler,
}
"""(requests stream, responses stream) → what makes a handler of that kind."""

_new_server = grpc.server
_new_async_server = grpc.aio.server


def is_loopback(host: str) -> bool:
    """Return whether a host is this machine alone.

    An IPv6 address may have `[...]` around it or not.
    """
    if host == HOST:
        return True
    try:
        address = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)


def read_address(entry: str) -> tuple[str, int]:
    """Read address and port of an entry of `TABLES`.

    An entry is such as `0100007F:1F90`. IPv4 within IPv6 is given as IPv4.
    """
    host, port = entry.split(":")
    packed = bytes.fromhex(host)
    # The kernel prints words of four bytes in the machine's own order.
    words = (packed[start : start + 4] for start in range(0, len(packed), 4))
    address = ipaddress.ip_address(b"".join(word[::-1] if sys.byteorder == "little" else word for word in words))
    return str(getattr(address, "ipv4_mapped", None) or address), int(port, 16)


def peer_users(peer: str, ports: Iterable[int], tables: Iterable[str] = TABLES) -> set[int] | None:
    """Find the users at the other end of a connection.

    They own the sockets that are connected from `peer` to one of `ports`.

    Args:
        peer: gRPC's name of the other end, such as `ipv4:127.0.0.1:4711`.
        ports: one of them is at this end.
        tables: files to read, as `TABLES`.

    Returns:
        User ids, none where the other end is not on this machine. None where the system has no
        `TABLES`.
    """
    lines: list[str] = []
    for table in tables:
        # A machine without IPv6 has one table.
        with contextlib.suppress(OSError):
            lines += Path(table).read_text().splitlines()[1:]
    if not lines:
        return None
    kind, _, address = urllib.parse.unquote(peer).partition(":")
    host, _, port = address.rpartition(":")
    if kind not in ("ipv4", "ipv6"):
        return set()
    end = ipaddress.ip_address(host.strip("[]").partition("%")[0])
    wanted = str(getattr(end, "ipv4_mapped", None) or end), int(port)
    users = set()
    for line in lines:
        _, local, remote, state, _, _, _, user, *_ = line.split()
        # A socket that the other end closed while its call was in flight has no owner: the kernel shows it as root's.
        if state == ESTABLISHED and read_address(local) == wanted and read_address(remote)[1] in ports:
            users.add(int(user))
    return users


def served_users() -> set[int]:
    """Return the users who may connect.

    They are this user, and root, who has every right anyway.
    """
    return {os.getuid(), 0}


class SameUser(grpc.ServerInterceptor):  # type: ignore[misc]  # gRPC has no annotations
    """An interceptor that refuses this machine's other users.

    It refuses their calls where the system reports the owner of a connection (Linux).

    Args:
        ports: those that the server listens on, including ports added later.
        remote: serve other machines too, whose users cannot be identified.
    """

    def __init__(self, ports: set[int], remote: bool = False) -> None:
        self.ports, self.remote = ports, remote

    def intercept_service(self, continuation: Callable[[Any], Any], handler_call_details: Any) -> Any:
        """Put the check before the call's own handler."""
        handler = continuation(handler_call_details)
        if handler is None:
            return None
        streams = bool(handler.request_streaming), bool(handler.response_streaming)
        name = f"{'stream' if streams[0] else 'unary'}_{'stream' if streams[1] else 'unary'}"
        behaviour = getattr(handler, name)

        def checked(request: Any, context: Any) -> Any:
            self._check(context)
            return behaviour(request, context)

        return _KINDS[streams](checked, handler.request_deserializer, handler.response_serializer)

    def _check(self, context: Any) -> None:
        users = peer_users(context.peer(), self.ports)
        if users is None or (self.remote and not users):
            return
        if not users or not users <= served_users():
            _LOG.warning("refused %s: a connection of user %s", context.peer(), sorted(users) or "unknown")
            context.abort(
                grpc.StatusCode.PERMISSION_DENIED, "this server answers the user who started it, and no other"
            )


def loopback_addresses() -> list[str]:
    """Return the addresses of this machine's loopback.

    They are IPv4, IPv6, or both.
    """
    found = []
    for family, host in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
        with contextlib.suppress(OSError), socket.socket(family) as probe:
            probe.bind((host, 0))
            found.append(f"[{host}]" if ":" in host else host)
    return found


class _LocalServer:
    """A gRPC server whose ports are on loopback.

    The requested address is ignored.
    """

    def __init__(self, server: Any, ports: set[int]) -> None:
        self._server, self._ports = server, ports

    def __getattr__(self, name: str) -> Any:
        return getattr(self._server, name)

    def add_insecure_port(self, address: str) -> int:
        return self._open(address, self._server.add_insecure_port)

    def add_secure_port(self, address: str, server_credentials: Any) -> int:
        return self._open(address, lambda place: self._server.add_secure_port(place, server_credentials))

    def _open(self, address: str, listen: Callable[[str], int]) -> int:
        host, _, wanted = address.rpartition(":")
        if host not in (HOST, *EVERYWHERE) and not is_loopback(host):
            raise InputError(f"apache-beam would listen on {address}: camenn has it listen on loopback only.")
        first, *others = loopback_addresses() if host in (HOST, *EVERYWHERE) else [host]
        for attempt in range(_TRIES):
            port = listen(f"{first}:{wanted}")
            try:
                for other in others:
                    listen(f"{other}:{port}")
            except RuntimeError:
                # A process with the port on the other address would be mistaken for this server.
                if int(wanted) or attempt + 1 == _TRIES:
                    raise
            else:
                break
        self._ports.add(port)
        return port


def local_server(
    thread_pool: Any, handlers: Any = None, interceptors: Any = None, *arguments: Any, **named: Any
) -> _LocalServer:
    """Make a gRPC server on loopback.

    It is made like `grpc.server`, and is for this user alone.
    """
    ports: set[int] = set()
    guards = (SameUser(ports), *(interceptors or ()))
    return _LocalServer(_new_server(thread_pool, handlers, guards, *arguments, **named), ports)


def _refuse_async(*_: Any, **__: Any) -> Any:
    raise _unknown("it opens ports through grpc.aio")


def _unknown(what: str) -> InputError:
    import apache_beam

    return InputError(
        f"apache-beam {apache_beam.__version__}: its servers cannot be kept to this machine ({what}). "
        "Install the version that constraints.txt names, or run with one worker: "
        "--direct_num_workers=1 --direct_running_mode=in_memory"
    )


def keep_servers_local() -> None:
    """Make Beam's gRPC servers listen on loopback.

    Servers that Beam makes in this process from now on listen there and answer this user alone.

    The change outlasts the pipeline: a pipeline that fails leaves threads of Beam's behind, which
    may be about to make one.

    Raises:
        InputError: this Beam version makes them in an unknown way. Nothing was opened.
    """
    handlers = importlib.import_module(_WORKER_HANDLERS)
    external = getattr(handlers, "ExternalWorkerHandler", None)
    if external is None or "host_from_worker" not in vars(external):
        raise _unknown("it passes workers their server's address in another way")
    for name, module in list(sys.modules.items()):
        if name.startswith("apache_beam.") and any(found is _new_server for found in vars(module).values()):
            raise _unknown(f"{name} makes them by itself")
    grpc.server = local_server
    grpc.aio.server = _refuse_async
    # Beam gives a worker on its own machine that machine's network name.
    external.host_from_worker = lambda _: HOST
