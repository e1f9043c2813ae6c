"""Which sockets a command and what it starts listen on, from Linux's tables of sockets.

    python -m tests.pipelines.listeners camenn score --data DATA ...

runs a command and prints them when it ends, those beyond loopback marked; the exit code is the command's, or 1 where one was marked.
"""

import ipaddress
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipelines.loopback import TABLES, read_address

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
    found, before = {root}, set()
    while found != before:
        before = set(found)
        found |= {process for process, parent in parents.items() if parent in found}
    return found


def listening(processes: set[int]) -> set[Socket]:
    """What some processes listen on."""
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
    """Yield a set that fills with what the process, and those below it, listen on while the block runs; what it had before left out."""
    before, found, ended = listening({process}), set[Socket](), threading.Event()

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


def main(argv: list[str]) -> int:
    """Run a command and print what it listened on."""
    command = subprocess.Popen(argv)
    with listeners(command.pid) as found:
        code = command.wait()
    for address, port in sorted(found):
        print(f"listened on {address} port {port}{' BEYOND LOOPBACK' if beyond_loopback({(address, port)}) else ''}")
    print(f"{len(found)} sockets, {len(beyond_loopback(found))} beyond loopback: {' '.join(argv)[:200]}")
    return code or int(bool(beyond_loopback(found)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
