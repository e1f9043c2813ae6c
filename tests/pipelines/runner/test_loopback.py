"""Beam's servers listen on loopback only, for this user only, and not at all where that is impossible."""

import os
import socket
import struct
import subprocess
import sys
import time
import zipfile
from concurrent import futures
from pathlib import Path
from typing import Any

import apache_beam as beam
import grpc
import pytest
from apache_beam.runners.portability.fn_api_runner import worker_handlers

from pipelines.runner import flink_jar, loopback
from pipelines.runner.beam import check_runner, open_pipeline, pipeline_options
from pipelines.runner.loopback import is_loopback, local_server, peer_users, read_address
from schemas.errors import InputError
from tests.support.listeners import beyond_loopback, listeners, run_all

LINUX = pytest.mark.skipif(not Path(loopback.TABLES[0]).exists(), reason="the system has no table of connections")
NOBODY = 65_534
PROCESSES = ["--direct_num_workers=1", "--direct_running_mode=multi_processing"]
THREADS = ["--direct_num_workers=2", "--direct_running_mode=multi_threading"]
EMBEDDED = ["--runner=PortableRunner", "--job_endpoint=embed", "--environment_type=LOOPBACK"]


def double(number: int) -> int:
    # Long enough to be seen.
    time.sleep(0.05)
    return 2 * number


def count_up(flags: list[str], out: Path) -> list[str]:
    with open_pipeline(flags) as pipeline:
        numbers = pipeline | beam.Create(list(range(4))) | beam.Reshuffle() | beam.Map(double) | beam.Map(str)
        _ = numbers | beam.io.WriteToText(str(out))
    return sorted(line for path in out.parent.glob(f"{out.name}*") for line in path.read_text().splitlines())


@LINUX
@pytest.mark.parametrize(
    ("flags", "ports"), [(PROCESSES, 5), (THREADS, 4), (EMBEDDED, 5)], ids=["processes", "threads", "embedded"]
)
def test_beam_listens_on_loopback_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], ports: int
) -> None:
    # A machine's name on the network is no name of its loopback.
    monkeypatch.setattr(socket, "getfqdn", lambda: "machine.invalid")
    with listeners(os.getpid()) as found:
        assert count_up(flags, tmp_path / "numbers") == ["0", "2", "4", "6"]
    assert len({port for _, port in found}) == ports
    assert not beyond_loopback(found)


@LINUX
@pytest.mark.slow
def test_no_command_listens_beyond_loopback(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_all(tmp_path) == 0
    said = capfd.readouterr().out
    assert "BEYOND" not in said and "listened on 127.0.0.1" in said


@pytest.mark.parametrize("change", ["own", "asynchronous", "unknown"])
def test_a_beam_that_cannot_be_kept_local_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    if change == "own":
        monkeypatch.setattr(worker_handlers, "new_server", loopback._new_server, raising=False)
    elif change == "unknown":
        monkeypatch.delattr(worker_handlers.ExternalWorkerHandler, "host_from_worker")
    else:
        # It would be made when the first worker is requested.
        monkeypatch.setattr(worker_handlers.grpc, "server", lambda *_, **__: grpc.aio.server())
        monkeypatch.setattr(loopback, "local_server", grpc.server)
    with (
        listeners(os.getpid()) as found,
        pytest.raises(InputError, match="cannot be kept to this machine .* constraints.txt"),
    ):
        count_up(THREADS, tmp_path / "numbers")
    assert not found


def test_a_server_is_opened_on_loopback_whatever_it_asks_for() -> None:
    for asked in ("[::]:0", "0.0.0.0:0", "localhost:0", "127.0.0.1:0"):
        server = local_server(futures.ThreadPoolExecutor(1))
        with listeners(os.getpid()) as found:
            port = server.add_insecure_port(asked)
            server.start()
            time.sleep(0.2)
        server.stop(0)
        if found:
            hosts = {address for address, _ in found}
            assert {number for _, number in found} == {port} and not beyond_loopback(found)
            both = {host.strip("[]") for host in loopback.loopback_addresses()}
            assert hosts == ({"127.0.0.1"} if asked.startswith("127") else both)
    with pytest.raises(InputError, match="would listen on 192.0.2.1:0"):
        local_server(futures.ThreadPoolExecutor(1)).add_insecure_port("192.0.2.1:0")


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("localhost", True),
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("[::1]", True),
        ("::ffff:127.0.0.1", True),
        ("", False),
        ("0.0.0.0", False),
        ("[::]", False),
        ("10.0.0.1", False),
        ("localhost.example", False),
    ],
)
def test_is_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


@pytest.mark.skipif(sys.byteorder != "little", reason="the entries below are a little-endian machine's")
@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("0100007F:1F90", ("127.0.0.1", 8080)),
        ("0000000000000000FFFF00000100007F:0016", ("127.0.0.1", 22)),
        ("00000000000000000000000001000000:0050", ("::1", 80)),
        ("B80D01200000000067452301EFCDAB89:FFFF", ("2001:db8::123:4567:89ab:cdef", 65535)),
    ],
)
def test_read_address(entry: str, expected: tuple[str, int]) -> None:
    assert read_address(entry) == expected


CLIENT = """
import encodings.idna, os, socket, sys
os.setuid(int(sys.argv[3]))
s = socket.create_connection((sys.argv[1], int(sys.argv[2])))
{after}
sys.stdin.read()
"""


@LINUX
@pytest.mark.parametrize("after", ["pass", "s.close()"], ids=["open", "closed"])
@pytest.mark.parametrize("user", [os.getuid(), NOBODY])
@pytest.mark.parametrize("host", [address.strip("[]") for address in loopback.loopback_addresses()])
def test_peer_users_tells_whose_a_connection_is(host: str, user: int, after: str) -> None:
    """A connection that its owner closed has no owner: the kernel shows it as root's, who may connect."""
    if user != os.getuid() != 0:
        pytest.skip("only root may start a process of another user")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as server:
        port = server.getsockname()[1]
        command = [sys.executable, "-I", "-S", "-c", CLIENT.format(after=after), host, str(port), str(user)]
        with subprocess.Popen(command, stdin=subprocess.PIPE) as client:
            server.settimeout(30)
            connection, peer = server.accept()
            kind = f"ipv6:%5B{peer[0]}%5D" if ":" in host else f"ipv4:{peer[0]}"
            if after != "pass":
                assert connection.recv(1) == b""
            assert peer_users(f"{kind}:{peer[1]}", {port}) == ({user} if after == "pass" else set())
            assert peer_users(f"{kind}:{peer[1]}", {port + 1}) == set()
            connection.close()
            client.communicate(b"")


def test_peer_users_says_when_it_cannot_know() -> None:
    assert peer_users("ipv4:127.0.0.1:1", {1}, ["/no/such/table"]) is None
    assert peer_users("unix:", {1}, loopback.TABLES) in (None, set())


class Echo(grpc.GenericRpcHandler):  # type: ignore[misc]  # gRPC has no annotations
    """One method of each kind."""

    def service(self, handler_call_details: Any) -> Any:
        return {
            "/e/uu": grpc.unary_unary_rpc_method_handler(lambda request, _: request),
            "/e/us": grpc.unary_stream_rpc_method_handler(lambda request, _: iter([request])),
            "/e/su": grpc.stream_unary_rpc_method_handler(lambda requests, _: next(requests)),
            "/e/ss": grpc.stream_stream_rpc_method_handler(lambda requests, _: requests),
        }.get(handler_call_details.method)


@LINUX
@pytest.mark.parametrize("remote", [False, True])
def test_a_server_answers_its_user_and_no_other(monkeypatch: pytest.MonkeyPatch, remote: bool) -> None:
    """Also where other machines are served: their users cannot be identified, but this machine's can."""
    ports: set[int] = set()
    guard = loopback.SameUser(ports, remote=remote)
    server = loopback._new_server(futures.ThreadPoolExecutor(4), interceptors=[guard])
    server.add_generic_rpc_handlers((Echo(),))
    port = server.add_insecure_port("localhost:0")
    ports.add(port)
    server.start()
    with grpc.insecure_channel(f"localhost:{port}", options=[("grpc.enable_http_proxy", 0)]) as channel:
        calls: list[Any] = [
            lambda: channel.unary_unary("/e/uu")(b"x"),
            lambda: b"".join(channel.unary_stream("/e/us")(b"x")),
            lambda: channel.stream_unary("/e/su")(iter([b"x"])),
            lambda: b"".join(channel.stream_stream("/e/ss")(iter([b"x"]))),
        ]
        assert [call() for call in calls] == [b"x"] * 4
        with pytest.raises(grpc.RpcError, match="UNIMPLEMENTED"):
            channel.unary_unary("/e/none")(b"x")
        monkeypatch.setattr(loopback, "served_users", lambda: {NOBODY})
        for call in calls:
            with pytest.raises(grpc.RpcError) as refused:
                call()
            assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED
    server.stop(0)


@pytest.mark.parametrize("name", ["DirectRunner", "directrunner", "direct", "SwitchingDirectRunner"])
def test_the_direct_runner_is_fn_api_runner(name: str) -> None:
    assert pipeline_options([f"--runner={name}"]).get_all_options()["runner"] == "FnApiRunner"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--runner=PrismRunner"], "PrismRunner: Beam would start its job server"),
        (["--runner", "spark"], "spark: Beam would start its job server"),
        (["--runner=FlinkRunner"], "needs --flink_job_server_jar .*pipelines.runner.flink_jar"),
        (["--runner=FlinkRunner", "--flink_job_server_jar=/no/such.jar"], "/no/such.jar is not there"),
        (
            [*EMBEDDED[:2], "--environment_type=EXTERNAL", "--environment_config=other:50000"],
            "workers are this machine's",
        ),
    ],
)
def test_runners_that_would_be_open_to_other_machines_are_refused(flags: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_runner(flags)


def test_runners_whose_servers_are_elsewhere_are_not_refused() -> None:
    check_runner(["--runner=FlinkRunner", "--job_endpoint=localhost:8099"])
    check_runner([*EMBEDDED[:2], "--environment_type=EXTERNAL", "--environment_config=localhost:50000"])


def class_file(forward: bool = True) -> bytes:
    """The relevant parts of Beam's class: its constant pool, a long in it, and the call."""
    texts = [
        "java/net/InetSocketAddress",
        "getPort",
        "()I",
        "x/NettyServerBuilder",
        "forPort",
        "(I)Lx/NettyServerBuilder;",
    ]
    pool = b"".join(struct.pack(">BH", 1, len(text)) + text.encode() for text in texts)
    pool += struct.pack(">Bq", 5, -1)  # 7, 8
    pool += struct.pack(">BHBH", 7, 1, 7, 4)  # 9, 10: classes
    pool += struct.pack(">BHHBHH", 12, 2, 3, 12, 5, 6)  # 11, 12: names and types
    pool += struct.pack(">BHHBHH", 10, 9, 11, 10, 10, 12)  # 13, 14: methods
    code = b"\x2b\xb6\0\x0d\xb8\0\x0e" if forward else b"\x1b\xb8\0\x0e"
    return struct.pack(">IIH", 0xCAFEBABE, 55, 15) + pool + b"before" + code + b"after"


def test_a_jar_is_made_to_listen_on_loopback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jar = tmp_path / "job-server.jar"
    with zipfile.ZipFile(jar, "w") as archive:
        archive.writestr("a", "1")
        archive.writestr(flink_jar.CLASS, class_file())
        archive.writestr("b", "2")
    flags = ["--runner=FlinkRunner", f"--flink_job_server_jar={jar}"]
    with pytest.raises(InputError, match="listen on every interface .*python -m pipelines.runner.flink_jar"):
        check_runner(flags)
    assert flink_jar.main([str(jar)]) == 0
    with zipfile.ZipFile(jar) as archive:
        assert archive.testzip() is None
        assert sorted(archive.namelist()) == sorted(["a", "b", flink_jar.CLASS])
        patched = archive.read(flink_jar.CLASS)
    assert patched.endswith(b"before\x2b\0\0\0\xb8\0\x0eafter")
    # Numbers 15 and 16 are new; 12, the call's name and type, is made of them.
    assert struct.unpack(">H", patched[8:10]) == (17,)
    assert struct.pack(">BHHBHH", 12, 2, 3, 12, 15, 16) in patched
    assert b"forAddress\x01\0\x30(Ljava/net/SocketAddress;)Lx/NettyServerBuilder;before" in patched
    check_runner(flags)
    assert flink_jar.main([str(jar)]) == 0
    assert "listened already" in capsys.readouterr().out


def test_a_jar_of_another_kind_is_left_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jar = tmp_path / "job-server.jar"
    for name, data in (("x", b""), (flink_jar.CLASS, b"\0" * 30), (flink_jar.CLASS, class_file(forward=False))):
        with zipfile.ZipFile(jar, "w") as archive:
            archive.writestr(name, data)
        before = jar.read_bytes()
        assert flink_jar.main([str(jar)]) == 2
        assert "cannot be made to listen on loopback" in capsys.readouterr().err
        assert jar.read_bytes() == before and list(tmp_path.iterdir()) == [jar]
    with pytest.raises(InputError, match="every interface"):
        check_runner(["--runner=FlinkRunner", f"--flink_job_server_jar={jar}"])
