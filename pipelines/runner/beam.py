"""Open Beam pipelines.

The module chooses the runner, its options and its number of workers.
"""

import contextlib
import importlib
import os
from collections.abc import Iterator
from typing import Any

import apache_beam as beam
from apache_beam.options.pipeline_options import GoogleCloudOptions, PipelineOptions, StandardOptions
from apache_beam.options.pipeline_options_validator import PipelineOptionsValidator

from pipelines.runner.exit_codes import DryRun
from pipelines.runner.flink_jar import check_jar
from pipelines.runner.loopback import is_loopback, keep_servers_local
from pipelines.runner.worker_version import guard
from schemas.errors import InputError

WORKERS_KEPT_MS = 20_000
"""How long Flink keeps idle SDK workers of a job. Shorter than its restart delay should be: a
restarted job must not find its dead workers."""
LOCAL_RUNNERS = ("FnApiRunner",)
DATAFLOW_RUNNERS = ("dataflow", "dataflowrunner")
FLINK_RUNNERS = ("flink", "flinkrunner")
DIRECT_RUNNERS = ("direct", "directrunner", "switchingdirectrunner")
"""Names of the runner that tries Prism, a downloaded binary, before FnApiRunner"""
OPEN_RUNNERS = ("prism", "prismrunner", "spark", "sparkrunner", "kafkastreams", "kafkastreamsrunner")
"""Runners for which Beam starts a server of its own that listens on every interface and cannot be
configured otherwise"""
JAVA_OPENS = tuple(
    f"--add-opens=java.base/{package}=ALL-UNNAMED"
    for package in (
        "java.io",
        "java.lang",
        "java.lang.invoke",
        "java.lang.reflect",
        "java.math",
        "java.net",
        "java.nio",
        "java.text",
        "java.time",
        "java.util",
        "java.util.concurrent",
        "java.util.concurrent.atomic",
        "java.util.concurrent.locks",
        "sun.net.util",
        "sun.nio.ch",
    )
)
"""What Flink's and Kryo's reflection needs from Java 17. Java 11 takes the flags as well."""


def check_runner(beam_flags: list[str]) -> None:
    """Refuse flags that the runner would refuse late.

    This is done before any work is. Flags that the runner would guess or ignore are refused too.

    Raises:
        InputError: Dataflow lacks a flag or Google's libraries, a dry run is requested of another
            runner, or the runner's ports would be open to other machines.
    """
    parsed = pipeline_options(beam_flags)
    options = parsed.get_all_options()
    _check_ports(options)
    if not is_dataflow(beam_flags):
        if options["dry_run"]:
            raise InputError(
                f"--dry_run: {options['runner']} would run the job all the same; only "
                "DataflowRunner builds without running. Leave it out."
            )
        return
    missing = [f"--{name}" for name in ("project", "region") if not options[name]]
    check, places = PipelineOptionsValidator(parsed, None), parsed.view_as(GoogleCloudOptions)
    if all(check.validate_gcs_path(places, name) for name in ("temp_location", "staging_location")):
        # Beam would make a bucket of its own accord, and look for an account to do so.
        missing.append("--temp_location gs://BUCKET/DIRECTORY")
    if missing:
        raise InputError(f"--runner {options['runner']} needs {', '.join(missing)}. See docs/guides/dataflow.md.")
    try:
        importlib.import_module("apache_beam.runners.dataflow.internal.apiclient")
    except ImportError as error:
        raise InputError(
            f"--runner {options['runner']}: Google's client libraries are not installed "
            f"({error}). Install them: pip install 'camenn[gcp]' -c constraints.txt"
        ) from error


def _check_ports(options: dict[str, Any]) -> None:
    runner, place = str(options["runner"]), str(options["environment_config"] or "")
    if runner.rpartition(".")[2].lower() in OPEN_RUNNERS:
        raise InputError(
            f"--runner {runner}: Beam would start its job server for it, which listens on every interface. "
            "Start one that does not, and pass --runner PortableRunner --job_endpoint localhost:PORT."
        )
    if runner.lower() in FLINK_RUNNERS and not options["job_endpoint"] and not options["flink_submit_uber_jar"]:
        jar = options["flink_job_server_jar"]
        if not jar:
            raise InputError(
                f"--runner {runner} needs --flink_job_server_jar JAR, made to listen on "
                "loopback by: python -m pipelines.runner.flink_jar JAR. See docs/guides/flink.md."
            )
        check_jar(jar)
    embedded = options["job_endpoint"] == "embed" and options["environment_type"] == "EXTERNAL"
    if embedded and not is_loopback(place.rpartition(":")[0]):
        raise InputError(
            f"--environment_config {place}: with --job_endpoint embed, workers are this "
            "machine's: Beam's servers listen on loopback. Give localhost:PORT."
        )


def pipeline_options(beam_flags: list[str]) -> PipelineOptions:
    """Build Beam's options.

    FnApiRunner is used where no runner or DirectRunner is named: DirectRunner may try a downloaded
    binary first, whose results differ.

    Flink's job server gets the `--add-opens` that Java 17 requires, in addition to
    `--job_server_jvm_properties`.
    """
    named = any(flag.split("=")[0] == "--runner" for flag in beam_flags)
    flags = list(beam_flags) if named else ["--runner=FnApiRunner", *beam_flags]
    if PipelineOptions(flags).get_all_options()["runner"] == "FlinkRunner":
        flags += [f"--job_server_jvm_properties={option}" for option in JAVA_OPENS]
        if not any(flag.split("=")[0] == "--environment_cache_millis" for flag in flags):
            # Otherwise Flink ends the workers whenever no stage runs for a moment, and each new one
            # imports and loads its models again.
            flags.append(f"--environment_cache_millis={WORKERS_KEPT_MS}")
    options = PipelineOptions(flags)
    standard = options.view_as(StandardOptions)
    if str(standard.runner).rpartition(".")[2].lower() in DIRECT_RUNNERS:
        standard.runner = "FnApiRunner"
    return options


@contextlib.contextmanager
def open_pipeline(beam_flags: list[str]) -> Iterator[beam.Pipeline]:
    """Yield a pipeline to build, then run it.

    When the block ends without an error, the pipeline runs to its end, on workers with this
    installation's package.

    Raises:
        InputError: Beam refuses its flags.
        DryRun: the job was to be built only.
    """
    options = pipeline_options(beam_flags)
    try:
        pipeline = beam.Pipeline(options=options)
    except ValueError as error:
        # Beam's own check of its flags: its text names each flag and its fault.
        raise InputError(f"Apache Beam refuses its flags: {error}") from error
    yield pipeline
    guard(pipeline)
    keep_servers_local()
    result = pipeline.run()
    if options.get_all_options()["dry_run"]:
        raise DryRun(getattr(result, "job", None))
    result.wait_until_finish()


def is_dataflow(beam_flags: list[str]) -> bool:
    """Return whether the workers are Google Cloud Dataflow's."""
    runner = pipeline_options(beam_flags).get_all_options()["runner"]
    return str(runner).rpartition(".")[2].lower() in DATAFLOW_RUNNERS


def has_process_per_core(beam_flags: list[str]) -> bool:
    """Return whether Dataflow starts a process for each core.

    It is its default. Each is a container of its own, and they share neither disk nor memory.
    """
    experiments = pipeline_options(beam_flags).get_all_options()["experiments"] or []
    return is_dataflow(beam_flags) and "no_use_multiple_sdk_containers" not in experiments


def is_local_run(beam_flags: list[str]) -> bool:
    """Return whether the workers are on this machine."""
    runner = pipeline_options(beam_flags).get_all_options()["runner"]
    return runner is None or runner in LOCAL_RUNNERS


def use_all_cores(beam_flags: list[str]) -> list[str]:
    """Add flags for a process on each core.

    Long work on the local runner uses it. Nothing is added where flags set the number of workers.
    FnApiRunner's own default is one thread.
    """
    cores = os.cpu_count() or 1
    chosen = any(flag.startswith("--direct_") for flag in beam_flags)
    if chosen or cores == 1 or not is_local_run(beam_flags):
        return beam_flags
    return [*beam_flags, f"--direct_num_workers={cores}", "--direct_running_mode=multi_processing"]


def local_workers(beam_flags: list[str]) -> int:
    """Return the number of workers of a local run.

    It is 1 elsewhere.
    """
    if not is_local_run(beam_flags):
        return 1
    return int(pipeline_options(beam_flags).get_all_options()["direct_num_workers"] or os.cpu_count() or 1)


def worker_threads(beam_flags: list[str]) -> int | None:
    """Return how many threads a local worker may use.

    All workers together then use each core once. None = unknown machines, let torch decide.
    """
    if not is_local_run(beam_flags):
        return None
    return max(1, (os.cpu_count() or 1) // local_workers(beam_flags))


def option_classes() -> list[type[PipelineOptions]]:
    """Return the classes of flags that Beam itself declares."""
    found: dict[str, type[PipelineOptions]] = {}
    for options in PipelineOptions.__subclasses__():
        if options.__module__.startswith("apache_beam.options"):
            found[options.__name__] = options
    return list(found.values())
