"""Make the servers of Beam's Flink jar listen on loopback.

    python -m pipelines.runner.flink_jar JAR

The servers of Beam's job server for Flink then listen on loopback, rather than on every interface.

Beam's `ServerFactory` takes the address to listen on, loopback's, and gives gRPC its port alone:
`NettyServerBuilder.forPort(address.getPort())`. No option changes that, so the call is changed in
the jar: `NettyServerBuilder.forAddress(address)`. The same class serves in a TaskManager that has
the jar in its `lib/`.
"""

import argparse
import os
import shutil
import struct
import sys
import uuid
import zipfile
from dataclasses import dataclass

from schemas.errors import InputError

CLASS = "org/apache/beam/sdk/fn/server/ServerFactory$InetSocketAddressServerFactory.class"

_UTF8, _METHOD, _NAME_AND_TYPE = 1, 10, 12
_SIZES = {3: 4, 4: 4, 5: 8, 6: 8, 7: 2, 8: 2, 9: 4, 10: 4, 11: 4, 12: 4, 15: 3, 16: 2, 17: 4, 18: 4, 19: 2, 20: 2}
"""Tag of an entry of the constant pool → its bytes after the tag. Utf8 has its own length (Java
Virtual Machine Specification, 4.4)."""

_ALOAD_1, _INVOKEVIRTUAL, _INVOKESTATIC, _NOP = b"\x2b", b"\xb6", b"\xb8", b"\0"


@dataclass
class _Pool:
    """The constant pool of a class.

    Number of an entry → its tag, where it begins, and its bytes after the tag.
    """

    entries: dict[int, tuple[int, int, bytes]]
    count: int
    end: int

    def text(self, number: int) -> str:
        return self.entries[number][2][2:].decode(errors="replace")

    def methods(self, owner: str, name: str) -> list[int]:
        """List method references to `owner.name`.

        `owner` is without its package.
        """
        found = []
        for number, (tag, _, data) in self.entries.items():
            if tag == _METHOD:
                of, what = struct.unpack(">HH", data)
                class_name = self.text(struct.unpack(">H", self.entries[of][2])[0])
                if class_name.rpartition("/")[2] == owner and self.name_and_type(what)[0] == name:
                    found.append(number)
        return found

    def name_and_type(self, number: int) -> tuple[str, str]:
        name, kind = struct.unpack(">HH", self.entries[number][2])
        return self.text(name), self.text(kind)


def _read_pool(data: bytes) -> _Pool:
    magic, _, count = struct.unpack_from(">IIH", data)
    if magic != 0xCAFEBABE:
        raise ValueError("no class file")
    entries, at, number = {}, 10, 1
    while number < count:
        tag = data[at]
        size = 2 + struct.unpack_from(">H", data, at + 1)[0] if tag == _UTF8 else _SIZES[tag]
        entries[number] = tag, at, data[at + 1 : at + 1 + size]
        at += 1 + size
        # Longs and doubles take two numbers.
        number += 2 if tag in (5, 6) else 1
    return _Pool(entries, count, at)


def listens_on_loopback(data: bytes) -> bool:
    """Return whether a class file passes an address to gRPC.

    The class is `CLASS`. An unpatched one passes a port alone.
    """
    return not _read_pool(data).methods("NettyServerBuilder", "forPort")


def give_address(data: bytes) -> bytes:
    """Rewrite the class file to give gRPC an address.

    Returns the class file of `CLASS` with `forAddress(address)` in place of
    `forPort(address.getPort())`.

    Raises:
        ValueError: it is another class than the one that is known.
    """
    pool = _read_pool(data)
    calls = pool.methods("NettyServerBuilder", "forPort")
    ports = pool.methods("InetSocketAddress", "getPort")
    if len(calls) != 1 or len(ports) != 1:
        raise ValueError("it does not call NettyServerBuilder.forPort and InetSocketAddress.getPort")
    call, port = struct.pack(">H", calls[0]), struct.pack(">H", ports[0])
    # The address is the method's second argument; its port is no longer read.
    before = _ALOAD_1 + _INVOKEVIRTUAL + port + _INVOKESTATIC + call
    after = _ALOAD_1 + _NOP * 3 + _INVOKESTATIC + call
    what = struct.unpack(">H", pool.entries[calls[0]][2][2:])[0]
    kind = pool.name_and_type(what)[1]
    code = data[pool.end :]
    if code.count(before) != 1 or not kind.startswith("(I)"):
        raise ValueError("it calls NettyServerBuilder.forPort in another way")
    # The old texts may have other uses: the new ones come after them.
    texts = [b"forAddress", ("(Ljava/net/SocketAddress;)" + kind[3:]).encode()]
    start = pool.entries[what][1] + 1
    constants = data[10:start] + struct.pack(">HH", pool.count, pool.count + 1) + data[start + 4 : pool.end]
    constants += b"".join(struct.pack(">BH", _UTF8, len(text)) + text for text in texts)
    return data[:8] + struct.pack(">H", pool.count + 2) + constants + code.replace(before, after)


def check_jar(path: str) -> None:
    """Refuse a job server's jar that listens on every interface.

    Raises:
        InputError: its servers do, or the file is not there or no job server's jar.
    """
    try:
        with zipfile.ZipFile(path) as jar:
            local = listens_on_loopback(jar.read(CLASS))
    except FileNotFoundError as error:
        raise InputError(
            f"--flink_job_server_jar {path} is not there. Give the path of Beam's job server jar."
        ) from error
    except (OSError, zipfile.BadZipFile, KeyError, ValueError) as error:
        raise InputError(
            f"--flink_job_server_jar {path} is no job server's jar that is known here ({error})."
        ) from error
    if not local:
        raise InputError(
            f"--flink_job_server_jar {path}: its servers listen on every interface and authenticate nobody. "
            f"Run once: python -m pipelines.runner.flink_jar {path}"
        )


def patch_jar(path: str) -> bool:
    """Change the jar, in one step.

    Returns whether there was anything to change.

    Raises:
        InputError: the file is not a known job server jar. It is left unchanged.
    """
    temporary = f"{path}.{uuid.uuid4().hex}.tmp"
    try:
        with zipfile.ZipFile(path) as jar:
            data = jar.read(CLASS)
        if listens_on_loopback(data):
            return False
        patched = give_address(data)
        shutil.copyfile(path, temporary)
        with zipfile.ZipFile(temporary, "a", zipfile.ZIP_DEFLATED) as jar:
            # The old entry's bytes stay, and the directory at the jar's end names the new one
            # alone: nothing else is recompressed.
            jar.filelist.remove(jar.NameToInfo.pop(CLASS))
            jar.writestr(CLASS, patched)
        os.replace(temporary, path)
    except (OSError, zipfile.BadZipFile, KeyError, ValueError) as error:
        raise InputError(f"{path}: cannot be made to listen on loopback: {error}") from error
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)
    return True


def main(argv: list[str] | None = None) -> int:
    """Fix one jar."""
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.runner.flink_jar", description=(__doc__ or "").split("\n\n")[0], allow_abbrev=False
    )
    parser.add_argument("jar", help="Beam's job server for Flink; changed in place")
    path = parser.parse_args(argv).jar
    try:
        changed = patch_jar(path)
    except InputError as error:
        print(f"flink_jar: error: {error}", file=sys.stderr)
        return 2
    print(f"{path}: {'now listens' if changed else 'listened already'} on loopback")
    return 0


if __name__ == "__main__":
    sys.exit(main())
