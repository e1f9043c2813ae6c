"""Real object stores for the tests: `scripts/object_store_local.sh` with ports and a directory of its own."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from benchmarks.support.counting_proxy import CountingProxy
from tests.support.flink_cluster import free_port

SCRIPT = Path(__file__).parents[2] / "scripts" / "object_store_local.sh"
ENDPOINTS = {"gs": "STORAGE_EMULATOR_HOST", "s3": "AWS_ENDPOINT_URL_S3"}


class LocalStores:
    """fake-gcs-server and SeaweedFS, each behind a proxy."""

    def __init__(self, state: Path) -> None:
        self.proxies: dict[str, CountingProxy] = {}
        self._script = {
            **os.environ,
            "PYTHON": sys.executable,
            "OBJECTS_STATE": str(state),
            "OBJECTS_GS_PORT": str(free_port()),
            "OBJECTS_S3_PORT": str(free_port()),
        }

    def script(self, *arguments: str) -> str:
        done = subprocess.run(
            [str(SCRIPT), *arguments], env=self._script, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def up(self) -> None:
        """Start both.

        Where they cannot be fetched the tests fail: they are pinned packages, like the others.
        """
        self.script("up", "gs")
        for attempt in reversed(range(3)):
            # SeaweedFS listens on the ports next to its own too, and one of them may be taken meanwhile.
            try:
                self.script("up", "s3")
                break
            except AssertionError:
                if not attempt:
                    raise
                self._script |= {"OBJECTS_S3_PORT": str(free_port())}
        exported = [line.removeprefix("export ").split("=", 1) for line in self.script("env").splitlines()]
        self.direct = {pair[0]: pair[1] for pair in exported}
        self.proxies = {scheme: CountingProxy(self.direct[name]) for scheme, name in ENDPOINTS.items()}

    def environment(self) -> dict[str, str]:
        """What to set to come to both through the proxies."""
        return {**self.direct, **{ENDPOINTS[scheme]: proxy.url for scheme, proxy in self.proxies.items()}}

    def down(self) -> None:
        for proxy in self.proxies.values():
            proxy.close()
        self.script("down")


@contextmanager
def running_stores(state: Path) -> Iterator[LocalStores]:
    """Yield both stores, with their environment set in this process."""
    stores = LocalStores(state)
    with pytest.MonkeyPatch.context() as patch:
        try:
            stores.up()
            for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "GOOGLE_APPLICATION_CREDENTIALS"):
                patch.delenv(name, raising=False)
            for name, value in stores.environment().items():
                patch.setenv(name, value)
            yield stores
        finally:
            stores.down()
