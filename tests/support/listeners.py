"""Which sockets a command and what it starts listen on, from Linux's tables of sockets.

    python -m tests.support.listeners camenn score --data DATA ...     one command
    python -m tests.support.listeners --all DIRECTORY                 every command, on a tiny city that it makes there

prints them when a command ends, those beyond loopback marked. The exit code is the command's, or 1
where one was marked.
"""

import ipaddress
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipelines.cli import COMMANDS
from pipelines.runner.loopback import TABLES, read_address
from tests.support.encoder_sources import minilm

LISTEN = "0A"
EVERY_S = 0.05

Socket = tuple[str, int]
"""Address and port"""


def process_tree(root: int) -> set[int]:
    """A process and all below it that run now."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The name, in brackets, may hold anything.
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found = {root}
    before: set[int] = set()
    while found != before:
        before = set(found)
        found |= {process for process, parent in parents.items() if parent in found}
    return found


def listening(processes: set[int]) -> set[Socket]:
    """Sockets that some processes listen on."""
    owned = set()
    for process in processes:
        try:
            for descriptor in Path(f"/proc/{process}/fd").iterdir():
                owned.add(os.readlink(descriptor))
        except OSError:
            continue
    found = set()
    for table in TABLES:
        for line in Path(table).read_text().splitlines()[1:] if Path(table).exists() else []:
            _, local, _, state, _, _, _, _, _, inode, *_ = line.split()
            if state == LISTEN and f"socket:[{inode}]" in owned:
                found.add(read_address(local))
    return found


def beyond_loopback(sockets: set[Socket]) -> set[Socket]:
    """Those that other machines may reach."""
    return {socket for socket in sockets if not ipaddress.ip_address(socket[0]).is_loopback}


@contextmanager
def listeners(process: int) -> Iterator[set[Socket]]:
    """Yield a set that fills while the block runs.

    It receives the sockets that the process, and those below it, listen on. Earlier ones are left
    out.
    """
    before, found, ended = listening(process_tree(process)), set[Socket](), threading.Event()

    def look() -> None:
        while not ended.wait(EVERY_S):
            found.update(listening(process_tree(process)) - before)

    looking = threading.Thread(target=look)
    looking.start()
    try:
        yield found
    finally:
        ended.set()
        looking.join()


def every_command(root: Path) -> list[list[str]]:
    """Return all of camenn's commands, in a working order.

    Each reads the outputs of the previous ones. Those that run pipelines have two processes.
    """
    encoders = {"image_weights": "random:0", "text_encoder": minilm(), "grid": "2", "max_tokens": "16"}
    data, places = (
        ["--data", str(root / "data")],
        {name: str(root / name) for name in ("store", "shards", "model", "scores")},
    )
    store, scores = ["--store", places["store"]], places["scores"]
    beam = ["--direct_num_workers=2", "--direct_running_mode=multi_processing"]
    config = root / "city.toml"
    config.parent.mkdir(parents=True, exist_ok=True)
    embed = "".join(f"{name} = {value if value.isdigit() else repr(value)}\n" for name, value in encoders.items())
    lines = [f"data = {str(root / 'data')!r}", f"work = {str(root / 'work')!r}", f"beam = {beam!r}", "[embed]", embed]
    config.write_text("\n".join(lines))
    score = ["score", *data, *store, "--model", places["model"], "--out", scores, *beam, "--rerun"]
    commands = [
        ["simulate", "--out", str(root / "data"), "--preset", "tiny"],
        ["doctor", "--image_weights", "random:0", "--text_encoder", minilm(), "--out", str(root)],
        ["embed", *data, *store, *(f"--{name}={value}" for name, value in encoders.items()), *beam],
        ["shards", *data, *store, "--out", places["shards"], *beam],
        ["train", "--shards", places["shards"], "--out", places["model"]],
        score,
        score,
        ["report", "--run", str(root), "--out", str(root / "report")],
        ["runs", "--work", str(root)],
        ["rollback", "--out", scores],
        ["publish", "LATER", "--reason", "to look at"],
        ["gc", "--out", scores],
        ["fsck", "--work", str(root)],
        ["nightly", "--config", str(config)],
    ]
    assert {command[0] for command in commands} == set(COMMANDS)
    return commands


def run_all(root: Path) -> int:
    """Run every command and print what each listened on."""
    code = 0
    for command in every_command(root):
        if "LATER" in command:
            # What was rolled back.
            command[command.index("LATER")] = str(max((root / "scores" / "runs").iterdir()))
        code = run([sys.executable, "-m", "pipelines.cli", *command]) or code
    return code


def run(argv: list[str]) -> int:
    """Run a command and print what it listened on."""
    command = subprocess.Popen(argv)
    with listeners(command.pid) as found:
        code = command.wait()
    for address, port in sorted(found):
        print(f"listened on {address} port {port}{' BEYOND LOOPBACK' if beyond_loopback({(address, port)}) else ''}")
    beyond = beyond_loopback(found)
    print(f"{len(found)} sockets, {len(beyond)} beyond loopback, exit code {code}: {' '.join(argv)[:160]}", flush=True)
    return code or int(bool(beyond))


def main(argv: list[str]) -> int:
    """One command, or all of them."""
    return run_all(Path(argv[1]).absolute()) if argv[0] == "--all" else run(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
