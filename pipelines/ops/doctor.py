"""Check this machine: `camenn doctor`.

It reports what this machine has, what is missing, and what to do about each. It downloads nothing.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from packaging.requirements import Requirement

from camenn_model.encoders.machine import has_compiler, resolve_device_precision
from camenn_model.encoders.spec import ImageSpec, TextSpec
from pipelines.runner.console import NO_ROWS
from pipelines.runner.exit_codes import run_main
from pipelines.runner.flags import add_encoder_flags, add_json_flag, new_parser
from schemas.errors import InputError

COMMAND = "doctor"
OK, WARN, FAIL = "ok", "warn", "fail"

LEAST_PYTHON = (3, 11)
LEAST_DISK, LEAST_MEMORY = 10 * 10**9, 8 * 10**9
"""bytes. Below them a demo still runs, a catalog of a city does not."""

OPTIONAL = {
    "demo": "the text encoder of the offline demo",
    "baselines": "LightGBM in the report's table of metrics",
    "aws": "s3:// paths",
    "gcp": "gs:// paths and Dataflow",
}
"""Extras of the package that change what a user can do, and what each is for."""

CPU_FLAGS = ("amx_bf16", "avx512_bf16", "avx512f", "avx2")
JAR_CACHES = (Path("~/.cache/camenn/flink"), Path("~/.apache_beam/cache/jars"))
"""Where scripts/flink_local.sh and Beam itself keep Flink's job server."""
JAR_PATTERN = "*flink*job-server*.jar"


@dataclass(frozen=True, kw_only=True)
class Check:
    """One line of the check.

    It has the name of the check, its status, what was found, and the remedy ('' = none).
    """

    name: str
    status: str
    found: str
    remedy: str = ""
    essential: bool = False


def check_python() -> Check:
    """Check this Python against the least that is supported."""
    enough = sys.version_info[:2] >= LEAST_PYTHON
    least = ".".join(map(str, LEAST_PYTHON))
    return Check(
        name="python",
        status=OK if enough else FAIL,
        found=f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        remedy="" if enough else f"Install Python {least} or later.",
        essential=True,
    )


def installed_version(name: str) -> str | None:
    """Return the version of an installed distribution.

    It is None where there is none.
    """
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_packages(requirements: list[str] | None = None) -> list[Check]:
    """Check required packages and useful extras.

    Versions are compared with the lower bounds of setup.py.

    Args:
        requirements: requirement lines as package metadata has them. None = those of the installed
            `camenn`.
    """
    if requirements is None:
        try:
            requirements = importlib.metadata.requires("camenn") or []
        except importlib.metadata.PackageNotFoundError:
            return [
                Check(
                    name="camenn",
                    status=FAIL,
                    found="not installed",
                    remedy="Run `pip install -e .` in the project.",
                    essential=True,
                )
            ]
    found = []
    for line in requirements:
        requirement = Requirement(line)
        extra = next(
            (
                name
                for name in OPTIONAL
                if requirement.marker
                and requirement.marker.evaluate({"extra": name})
                and not requirement.marker.evaluate({"extra": ""})
            ),
            None,
        )
        if requirement.marker and extra is None and not requirement.marker.evaluate({"extra": ""}):
            continue
        found.append(_check_extra(requirement, extra) if extra else _check_required(requirement))
    return found


def _check_required(requirement: Requirement) -> Check:
    version = installed_version(requirement.name)
    if version is not None and requirement.specifier.contains(version, prereleases=True):
        return Check(name=requirement.name, status=OK, found=f"{version} ({requirement.specifier})", essential=True)
    return Check(
        name=requirement.name,
        status=FAIL,
        found=f"{version or 'not installed'} (needs {requirement.specifier})",
        remedy=f"pip install '{requirement.name}{requirement.specifier}'",
        essential=True,
    )


def _check_extra(requirement: Requirement, extra: str) -> Check:
    name = "google-cloud-storage" if extra == "gcp" else requirement.name
    version = installed_version(name)
    if version is not None and (extra == "gcp" or requirement.specifier.contains(version, prereleases=True)):
        return Check(name=name, status=OK, found=f"{version}, for {OPTIONAL[extra]}")
    return Check(
        name=name,
        status=WARN,
        found=f"{version or 'not installed'}: needed for {OPTIONAL[extra]} only",
        remedy=f"pip install 'camenn[{extra}]'",
    )


def check_processor(cpuinfo: str | None = None) -> Check:
    """Check the processor.

    Checked are its cores, and the instructions that make bf16 worthwhile. `cpuinfo` is the text of
    /proc/cpuinfo.
    """
    path = Path("/proc/cpuinfo")
    if cpuinfo is None:
        cpuinfo = path.read_text() if path.exists() else ""
    flags = [flag for flag in CPU_FLAGS if flag in set(cpuinfo.split())]
    cores = f"{os.cpu_count()} cores"
    if not cpuinfo:
        return Check(name="processor", status=OK, found=f"{cores}, {platform.machine()} (flags cannot be read here)")
    if "amx_bf16" in flags or "avx512_bf16" in flags:
        return Check(name="processor", status=OK, found=f"{cores}, {', '.join(flags)}: bf16 is native")
    return Check(
        name="processor",
        status=WARN,
        found=f"{cores}, {', '.join(flags) or 'none of the known flags'}: no native bf16",
        remedy="Photos are encoded in fp32, which takes longer; a machine with bf16 gives other "
        "embeddings, so keep to one kind.",
    )


def check_device() -> Check:
    """Check the device that `--device auto` chooses."""
    device, precision = resolve_device_precision("auto", "auto")
    if device == "cpu":
        return Check(name="accelerator", status=OK, found=f"no CUDA device: --device auto is cpu, {precision}")
    import torch

    return Check(
        name="accelerator",
        status=OK,
        found=f"{torch.cuda.device_count()} × {torch.cuda.get_device_name(0)}, {precision}",
    )


def check_compiler() -> Check:
    """Check whether `embed --compile` can compile."""
    if has_compiler():
        return Check(
            name="C++ compiler", status=OK, found="found: camenn embed compiles InceptionV4 where photos are many"
        )
    return Check(
        name="C++ compiler",
        status=WARN,
        found="none: camenn embed takes a tenth longer on a processor",
        remedy="Install g++, or name one in CXX.",
    )


@contextmanager
def hub_offline() -> Iterator[None]:
    """Limit the hub's client to its local cache.

    A check must not fetch gigabytes.
    """
    before = os.environ.get("HF_HUB_OFFLINE")
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["HF_HUB_OFFLINE"]
        else:
            os.environ["HF_HUB_OFFLINE"] = before


def check_encoders(image_weights: str, text_encoder: str, image_model: str | None = None) -> list[Check]:
    """Check that both encoders are available offline.

    This machine must have them without a network.
    """
    defaults = argparse.ArgumentParser()
    add_encoder_flags(defaults)
    grid, patch_size, max_tokens = (defaults.get_default(name) for name in ("grid", "patch_size", "max_tokens"))
    found = []
    with hub_offline():
        try:
            image = ImageSpec.resolve(
                image_weights,
                grid=grid,
                patch_size=patch_size,
                device="auto",
                precision="auto",
                model=image_model,
            )
            untrained = image_weights.startswith("random:")
            remedy = (
                "Random weights only show that everything runs. Give trained ones for real figures."
                if untrained
                else ""
            )
            found.append(
                Check(name="photo encoder", status=WARN if untrained else OK, found=image.describe(), remedy=remedy)
            )
        except InputError as error:
            found.append(_lacking("photo encoder", "--image_weights", image_weights, error))
        try:
            found.append(
                Check(
                    name="title encoder",
                    status=OK,
                    found=TextSpec.resolve(text_encoder, max_tokens=max_tokens, device="auto").describe(),
                )
            )
        except InputError as error:
            found.append(_lacking("title encoder", "--text_encoder", text_encoder, error))
    return found


def _lacking(name: str, flag: str, source: str, error: InputError) -> Check:
    if "from the hub" not in str(error):
        return Check(name=name, status=WARN, found=f"{source}: not usable", remedy=str(error))
    remedy = (
        "`camenn embed` fetches it where the hub can be reached. Elsewhere fetch it on another "
        f"machine and give its local path: {flag} PATH."
    )
    return Check(name=name, status=WARN, found=f"{source}: not on this machine", remedy=remedy)


def check_java() -> Check:
    """Check Java, which Flink's job server needs."""
    program = shutil.which("java")
    need = "needed for --runner FlinkRunner only"
    if program is None:
        return Check(name="java", status=WARN, found=f"not found: {need}", remedy="Install a Java runtime, 11 or 17.")
    answer = subprocess.run([program, "-version"], capture_output=True, text=True, timeout=20, check=False)
    version = re.search(r'version "(\d+)([^"]*)"', answer.stderr + answer.stdout)
    if version is None:
        return Check(
            name="java",
            status=WARN,
            found=f"{program} does not report its version: {need}",
            remedy="Install a Java runtime, 11 or 17.",
        )
    return Check(name="java", status=OK, found=version[1] + version[2])


def check_flink_jar(caches: tuple[Path, ...] = JAR_CACHES) -> Check:
    """Check Flink's job server.

    It is searched where scripts/flink_local.sh or Beam put it.
    """
    jars = [str(path) for cache in caches for path in sorted(cache.expanduser().glob(JAR_PATTERN))]
    if jars:
        return Check(name="flink job server", status=OK, found=", ".join(jars))
    return Check(
        name="flink job server",
        status=WARN,
        found=f"no jar in {' or '.join(map(str, caches))}: needed for --runner FlinkRunner only",
        remedy="`scripts/flink_local.sh fetch` gets one; or pass --flink_job_server_jar PATH. "
        "See docs/guides/flink.md.",
    )


def check_disk(out: str) -> Check:
    """Check the free bytes where output would go.

    A directory that does not exist yet counts as its nearest parent.
    """
    place = Path(out).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    enough = free >= LEAST_DISK
    return Check(
        name="free disk",
        status=OK if enough else WARN,
        found=f"{free / 1e9:,.1f} GB at {place}",
        remedy=""
        if enough
        else "A photo's embedding takes 50 kB (grid 4) to 200 kB (grid 8): make room, or give --out on another disk.",
    )


def check_store(out: str) -> Check:
    """Check an object store: access, conditions, pace.

    An object below `out` is written, read and removed.

    Raises:
        InputError: there is no such bucket, it may not be written, or the store takes a write whose
            condition does not hold.
    """
    from pipelines.io.lease import try_conditions

    seconds = sorted(try_conditions(out))
    return Check(
        name="object store",
        status=OK,
        found=f"{out}: conditional writes hold; {1000 * seconds[len(seconds) // 2]:,.0f} ms a request "
        f"(median of {len(seconds)}, the slowest {1000 * seconds[-1]:,.0f})",
    )


def check_memory(limit: Path = Path("/sys/fs/cgroup/memory.max")) -> Check:
    """Check the memory.

    It is that of the machine, or of the container that this process lives in, whichever is less.
    """
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if limit.exists() and limit.read_text().strip().isdigit():
        total = min(total, int(limit.read_text()))
    enough = total >= LEAST_MEMORY
    return Check(
        name="memory",
        status=OK if enough else WARN,
        found=f"{total / 1e9:,.1f} GB",
        remedy="" if enough else "Keep to the profile `small`, and to few workers.",
    )


def examine(image_weights: str, text_encoder: str, out: str, image_model: str | None = None) -> list[Check]:
    """Make all checks, in the order they are shown."""
    # A store that cannot be used is refused before anything else is looked at.
    place = check_store(out) if "://" in out else check_disk(out)
    machine = [check_processor(), check_device(), check_compiler(), check_memory(), place]
    return [
        check_python(),
        *check_packages(),
        *machine,
        *check_encoders(image_weights, text_encoder, image_model),
        check_java(),
        check_flink_jar(),
    ]


def exit_code(checks: list[Check]) -> int:
    """Return 1 where something essential fails, else 0."""
    return int(any(check.essential and check.status == FAIL for check in checks))


def show(checks: list[Check], out: str, seconds: float, *, as_json: bool) -> None:
    """Print a line for each check.

    What to do is below it, and a last line sums up. With `as_json`, one JSON object is printed.
    """
    counts = {status: sum(check.status == status for check in checks) for status in (OK, WARN, FAIL)}
    if as_json:
        found = {"checks": [asdict(check) for check in checks], **counts, "seconds": round(seconds, 1), "out": out}
        print(json.dumps(NO_ROWS | found, sort_keys=True), flush=True)
        return
    width = max(len(check.name) for check in checks)
    print("\ncamenn doctor")
    for check in checks:
        print(f"  {check.status:<4}  {check.name:<{width}}  {check.found}")
        if check.remedy:
            print(f"  {'':<4}  {'':<{width}}  → {check.remedy}")
    print(f"\n  {counts[OK]} ok, {counts[WARN]} to look at, {counts[FAIL]} failed\n", flush=True)


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of `camenn doctor`."""
    parser = new_parser(
        COMMAND,
        "Look at this machine: versions, devices, encoder weights, runner jars, memory, "
        "disk; say what to do about each.",
    )
    # Nothing here runs on Beam.
    parser.epilog = None
    add_encoder_flags(parser)
    parser.add_argument(
        "--out",
        default=".",
        help="directory whose disk is looked at, or gs:// or s3:// address that is tried out (default %(default)s)",
    )
    add_json_flag(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Parse, look and print.

    Returned is 1 where something essential fails.
    """
    arguments = build_parser().parse_args(argv)
    started = time.monotonic()
    checks = examine(arguments.image_weights, arguments.text_encoder, arguments.out, arguments.image_model)
    show(checks, arguments.out, time.monotonic() - started, as_json=arguments.json)
    return exit_code(checks)


if __name__ == "__main__":
    sys.exit(run_main(main))
