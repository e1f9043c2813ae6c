"""Compare a worker's installation with the submitter's.

An installation is identified by a fingerprint. A worker whose camenn differs from the submitter's
must refuse the job rather than return other results.
"""

import functools
import hashlib
import importlib.metadata
import platform
import socket
from pathlib import Path
from typing import Any

import apache_beam as beam
from apache_beam.pipeline import AppliedPTransform, PipelineVisitor

import pipelines
from schemas.errors import InputError

_PACKAGES = ("schemas", "camenn_model", "pipelines")
_LIBRARIES = ("apache-beam", "torch", "transformers", "timm", "pyarrow", "pandas", "numpy")


def library_versions() -> dict[str, str]:
    """Return the versions that results depend on.

    The part after `+` is dropped, which only distinguishes a library's builds (CPU, CUDA).
    """
    found = {"python": ".".join(platform.python_version_tuple()[:2])}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name).split("+")[0]
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


@functools.cache
def package_fingerprint() -> str:
    """Hash this installation's own source and `library_versions`.

    The hash has 12 hex digits.
    """
    digest = hashlib.sha256()
    root = Path(pipelines.__file__).resolve().parents[1]
    for package in _PACKAGES:
        sources = sorted((root / package).rglob("*.py"))
        if not sources:
            raise RuntimeError(f"{root / package}: no source is there, so workers' versions cannot be compared")
        for path in sources:
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    for name, version in library_versions().items():
        digest.update(f"{name}={version}\n".encode())
    return digest.hexdigest()[:12]


def check_package(submitted: str) -> None:
    """Check this process's installation against the submitter's.

    Raises:
        InputError: they differ. It names the host and what to do.
    """
    mine = package_fingerprint()
    if mine != submitted:
        versions = ", ".join(f"{name} {version}" for name, version in library_versions().items())
        raise InputError(
            f"worker on {socket.gethostname()} has camenn package {mine} ({versions}), the "
            f"job was submitted with {submitted}. "
            "Install the same camenn and constraints.txt on every worker (or build the "
            "worker image again), and restart the workers."
        )


class _Guarded:
    """A stand-in for a DoFn's `setup` and `start_bundle`.

    The check runs before the first, and the second raises its error.

    Until a bundle starts, the worker has not opened its data channel, and Flink waits three minutes
    for that before it receives any error.
    """

    def __init__(self, fn: beam.DoFn) -> None:
        self.fn = fn
        self.submitted = package_fingerprint()
        self.error: Exception | None = None

    def setup(self) -> None:
        try:
            check_package(self.submitted)
            type(self.fn).setup(self.fn)
        except Exception as error:
            self.error = error

    def start_bundle(self) -> Any:
        if self.error is not None:
            raise self.error
        return type(self.fn).start_bundle(self.fn)


class _Guard(PipelineVisitor):
    def visit_transform(self, transform_node: AppliedPTransform) -> None:
        transform = transform_node.transform
        if isinstance(transform, beam.ParDo):
            guarded = _Guarded(transform.fn)
            vars(transform.fn).update(setup=guarded.setup, start_bundle=guarded.start_bundle)


def guard(pipeline: beam.Pipeline) -> None:
    """Make every DoFn of a built pipeline check its worker.

    Before any other work on a worker, it checks that the worker's package equals this process's.
    """
    pipeline.visit(_Guard())
