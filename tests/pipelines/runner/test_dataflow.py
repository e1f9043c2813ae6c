"""Jobs for Dataflow, built by the real DataflowRunner.

They are not submitted: the tests inspect what they require of workers, step by step. No account, no
network.
"""

import copy
import shutil
import socket
import sys
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from apache_beam.portability import common_urns
from apache_beam.portability.api import beam_runner_api_pb2
from apache_beam.runners.portability.fn_api_runner import translations

from pipelines import cli
from pipelines.embed import command as embed_command
from pipelines.embed import stage as embed_stage
from pipelines.embed.options import EmbedOptions
from pipelines.runner.exit_codes import DryRun
from pipelines.runs.manifest import read_latest
from schemas.errors import InputError
from tests.support.dataflow_jobs import MAINS, PROJECT, documented_command, write_city

apiclient = pytest.importorskip(
    "apache_beam.runners.dataflow.internal.apiclient", reason="apache_beam[gcp] is not installed"
)

L4 = "type:nvidia-l4;count:1;machine_type:g2-standard-8;install-nvidia-driver"
DRY = [
    "--runner=DataflowRunner",
    "--project=my-project",
    "--region=europe-west4",
    "--temp_location=gs://my-bucket/tmp",
    "--dry_run=True",
]
GPU = ["--device=cuda", "--precision=bf16"]
ACCELERATOR = "beam:resources:accelerator:v1"
ENCODER_STEPS = [
    "SkipCommitted/ParDo(SkipCommitted)",
    "Encode/BatchElements/ParDo(_GlobalWindowsBatchingDoFn)",
    "Encode/BeamML_RunInference",
    "Commit/ParDo(CommitChunk)",
]


@dataclass
class City:
    """The inputs of the three stages."""

    root: Path
    jobs: dict[tuple[str, ...], Any] = field(default_factory=dict)
    """Jobs that were built already, by their flags: one takes some seconds"""

    @property
    def embed(self) -> list[str]:
        """The flags that embed requires."""
        encoders = ["--image_weights=random:0", f"--text_encoder={self.root / 'bert'}"]
        return [f"--data={self.root / 'data'}", f"--store={self.root / 'dry' / 'embed'}", *encoders]


@pytest.fixture(scope="module")
def city(tmp_path_factory: pytest.TempPathFactory) -> City:
    root = tmp_path_factory.mktemp("dataflow")
    write_city(root, root / "bert")
    return City(root)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """A look-up of an account, a bucket or a metadata server fails the test immediately."""

    def refuse(*address: Any, **_: Any) -> Any:
        raise AssertionError(f"the network was asked for {address}")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


def documented(city: City, stage: str) -> list[str]:
    """The command of docs/guides/dataflow.md with the city's directories and encoders."""
    places = {"DATA": city.root / "data", "PHOTOS": city.root / "data", "WORK": city.root}
    # The outputs of a dry run are separate from the other tests' inputs.
    return documented_command(stage, places, city.root / "bert", city.root / "dry" / stage)


def build(city: City, stage: str, flags: list[str] | None = None) -> Any:
    """The job that DataflowRunner would submit: of these flags, or of the documented command."""
    flags = documented(city, stage) if flags is None else flags
    key = (stage, *flags)
    if key not in city.jobs:
        with pytest.raises(DryRun) as built:
            MAINS[stage](flags)
        city.jobs[key] = built.value.job
    return city.jobs[key]


def describe(job: Any) -> Any:
    """The job's environment as it would go to the service: worker pool, experiments, options."""
    return apiclient.Environment([], job.options, "8", "gs://my-bucket/pipeline.pb", proto_pipeline=job.proto_pipeline)


def hints(job: Any) -> dict[str, str]:
    """{step: accelerator} of the steps that user code runs in."""
    components = job.proto_pipeline.components
    found = {}
    for transform in components.transforms.values():
        if transform.spec.urn == common_urns.primitives.PAR_DO.urn:
            environment = components.environments[transform.environment_id]
            found[transform.unique_name] = environment.resource_hints.get(ACCELERATOR, b"").decode()
    return found


def encoder_steps() -> dict[str, list[str]]:
    return {
        encoder: [f"Embed/{encoder}/EncodeChunks/{step}" for step in ENCODER_STEPS]
        for encoder in ("EncodeImages", "EncodeTitles")
    }


def test_embed_asks_for_the_accelerator_where_it_encodes_and_nowhere_else(city: City) -> None:
    found = hints(build(city, "embed"))
    assert {name for name, hint in found.items() if hint} == {n for names in encoder_steps().values() for n in names}
    assert set(found.values()) == {"", L4}


def test_encoder_steps_are_fused_into_one_stage(city: City) -> None:
    """A chunk is decoded, encoded and committed in one go.

    Beam's own fusion shows it, which separates steps of two environments as Dataflow does.
    """
    pipeline = copy.deepcopy(build(city, "embed").proto_pipeline)
    assert isinstance(pipeline, beam_runner_api_pb2.Pipeline)
    _, stages = translations.create_and_optimize_stages(
        pipeline,
        [translations.annotate_downstream_side_inputs, translations.greedily_fuse],
        known_runner_urns=frozenset([common_urns.primitives.FLATTEN.urn, common_urns.primitives.GROUP_BY_KEY.urn]),
    )
    fused = [
        [t.unique_name for t in stage.transforms if t.spec.urn == common_urns.primitives.PAR_DO.urn] for stage in stages
    ]
    for steps in encoder_steps().values():
        assert [stage for stage in fused if set(stage) & set(steps)] == [steps]


@pytest.mark.parametrize("stage", MAINS)
def test_without_an_accelerator_all_steps_share_one_environment(city: City, stage: str) -> None:
    job = build(city, stage, [*city.embed, *GPU, *DRY] if stage == "embed" else None)
    assert len(job.proto_pipeline.components.environments) == 1
    assert not any(hints(job).values())


STEPS = {
    "embed": "Embed Finish",
    "shards": "Shards Finish",
    "score": "Score Finish",
}
STEPS_INSIDE = {
    "Shards": "Examples ContentJobs SpreadJobs CopyContents SubmittersFiles SubmittersCounts AllFiles AllCounts",
    "Score": (
        "Tiles SpreadTiles ScoreTile ByChunk RankChunk WriteScores "
        "WholeCatalog JudgeListings WriteQuality SubmittersFiles SubmittersCounts AllFiles"
    ),
    "Embed": (
        "ReadCatalog Clean NoPreviousItems ByItem Resolve MergeRejects "
        "EncodeImages EncodeTitles WriteItems WriteRejects WriteUnread MergeFiles MergeCounts"
    ),
    "Shards/Examples": (
        "ReadClicks CleanClicks ReadOrders CleanOrders ByUser DescribeUsers ByItem "
        "DescribeItems Join PackCounts Pack ByDay WriteDays MergeRejects WriteRejects MergeFiles MergeCounts"
    ),
    "Finish": "KeyCounts SumCounts Once WriteFinished",
}


@pytest.mark.parametrize("stage", MAINS)
def test_steps_have_the_names_that_the_job_page_shows(city: City, stage: str) -> None:
    pipeline = build(city, stage).proto_pipeline
    root = set(pipeline.root_transform_ids)
    names = {t.unique_name for place, t in pipeline.components.transforms.items() if place not in root}
    top = {name.split("/")[0] for name in names}
    assert top == set(STEPS[stage].split())
    for parent in names & set(STEPS_INSIDE):
        inside = {name.removeprefix(f"{parent}/").split("/")[0] for name in names if name.startswith(f"{parent}/")}
        assert inside == set(STEPS_INSIDE[parent].split())


@pytest.mark.parametrize("stage", MAINS)
def test_documented_flags_reach_the_job(city: City, stage: str) -> None:
    environment = describe(build(city, stage)).proto
    (pool,) = environment.worker_pools
    image = "my-registry/my-project/camenn-worker:1"
    # Two environments of one image for embed: the service gives GPUs to workers of the second alone.
    environments = 2 if stage == "embed" else 1
    assert [harness.container_image for harness in pool.sdk_harness_container_images] == [image] * environments
    assert (pool.disk_size_gb, pool.autoscaling_settings.max_num_workers) == (50, 8)
    assert "storage.googleapis.com/my-bucket/tmp/" in environment.temp_storage_prefix
    options = environment.sdk_pipeline_options["options"]
    assert (options["project"], options["region"]) == ("my-project", "europe-west4")
    assert options["staging_location"].startswith("gs://my-bucket/staging/")
    machines = {"embed": "n1-standard-2", "shards": "n1-highmem-4", "score": "n1-highmem-2"}
    assert pool.machine_type == machines[stage]
    # One process for all threads of a worker, hence one model of each kind on its GPU, and one copy of the embeddings.
    assert ("no_use_multiple_sdk_containers" in environment.experiments) == (stage != "shards")
    assert ("use_multiple_sdk_containers" in environment.experiments) == (stage == "shards")
    assert pool.num_threads_per_worker == {"embed": 2, "shards": 0, "score": 2}[stage]


def test_setup_file_stages_every_module_that_the_guard_compares(city: City, tmp_path: Path) -> None:
    """A module that is not staged would make workers refuse every job.

    A worker compares its own package with the submitter's, file by file.
    """
    project = tmp_path / "project"
    packages = ("schemas", "camenn_model", "pipelines", "simulator", "benchmarks")
    for package in packages:
        shutil.copytree(PROJECT / package, project / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(PROJECT / name, project)
    job = build(city, "shards", [*documented(city, "shards"), f"--setup_file={project / 'setup.py'}"])
    (environment,) = job.proto_pipeline.components.environments.values()
    staged = {}
    for dependency in environment.dependencies:
        place = beam_runner_api_pb2.ArtifactFilePayload.FromString(dependency.type_payload)
        role = beam_runner_api_pb2.ArtifactStagingToRolePayload.FromString(dependency.role_payload)
        staged[role.staged_name] = place.path
    with tarfile.open(staged["workflow.tar.gz"]) as archive:
        sources = {name.partition("/")[2]: archive.extractfile(name) for name in archive.getnames() if "." in name}
        for package in ("schemas", "camenn_model", "pipelines"):
            for path in (project / package).rglob("*.py"):
                handle = sources[path.relative_to(project).as_posix()]
                assert handle is not None and handle.read() == path.read_bytes()


@pytest.mark.parametrize("stage", MAINS)
def test_dry_run_says_so_and_publishes_nothing(city: City, stage: str, capfd: pytest.CaptureFixture[str]) -> None:
    flags = documented(city, stage)
    assert cli.main([stage, *flags, "--json"]) == 0
    said = capfd.readouterr()
    assert "built and not submitted" in said.err and not said.out
    assert read_latest(str(city.root / "dry" / stage)) is None


def test_image_is_made_of_what_the_project_is_made_of() -> None:
    lines = (PROJECT / "Dockerfile").read_text().splitlines()
    pins = dict(line.split("==") for line in (PROJECT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert f"ARG BEAM={pins['apache-beam']}" in lines
    copied = [
        name for line in lines if line.startswith("COPY ") and "--from" not in line for name in line.split()[1:-1]
    ]
    packages = {path.parent.name for path in PROJECT.glob("*/__init__.py")} - {"docs", "tests"}
    assert set(copied) == packages | {"setup.py", "pyproject.toml", "constraints.txt"}
    let_through = {line[1:] for line in (PROJECT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert let_through == set(copied)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([*GPU, f"--accelerator={L4}"], "--accelerator .* only DataflowRunner"),
        (
            [*GPU, f"--accelerator={L4}", "--runner=FlinkRunner", "--job_endpoint=localhost:1"],
            "--accelerator .* only DataflowRunner",
        ),
        ([*GPU, "--accelerator=nvidia-l4", *DRY], "--accelerator nvidia-l4: not an accelerator"),
        (["--device=cpu", "--precision=fp32", f"--accelerator={L4}", *DRY], "Give --device cuda"),
        ([f"--accelerator={L4}", *DRY], "--device auto"),
        (["--device=cuda", *DRY], "--precision auto"),
        ([*GPU, "--dry_run=True"], "--dry_run: FnApiRunner would run the job"),
        ([*GPU, "--runner=dataflow"], "needs --project, --region, --temp_location gs://"),
        ([*GPU, *DRY, "--temp_location=/tmp"], "needs --temp_location gs://"),
        ([*GPU, *DRY, "--project=My Project"], "Invalid Project ID"),
    ],
)
def test_flags_that_make_no_sense_are_refused(city: City, flags: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        embed_command.main([*city.embed, *flags])


def catch_embed(monkeypatch: pytest.MonkeyPatch) -> list[EmbedOptions]:
    """The options that the embed stage would run with, as they come."""
    seen: list[EmbedOptions] = []

    def run(options: EmbedOptions, _: Any) -> dict[str, Any]:
        seen.append(options)
        return {"seconds": 0}

    monkeypatch.setattr(embed_stage, "run", run)
    return seen


def test_a_submitter_without_a_gpu_submits_for_workers_with_one(city: City, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_has_cuda", "has_native_bf16"):
        monkeypatch.setattr(f"camenn_model.encoders.machine.{name}", lambda: pytest.fail("this machine was asked"))
    seen = catch_embed(monkeypatch)
    for precision in ("bf16", "fp32"):
        assert embed_command.main([*city.embed, "--device=cuda", f"--precision={precision}", *DRY]) == 0
        spec = seen[-1]
        assert {spec.image.device, spec.text.device} == {"cuda"}
        assert {spec.image.precision, spec.text.precision} == {precision}


def test_the_accelerator_changes_no_embedding(city: City, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = catch_embed(monkeypatch)
    for extra in ([], [f"--accelerator={L4}"]):
        assert embed_command.main([*city.embed, *GPU, *DRY, *extra]) == 0
    plain, asked = seen
    assert (plain.image.fingerprint, plain.text.fingerprint) == (asked.image.fingerprint, asked.text.fingerprint)
    assert embed_stage.content_request(plain, [], []) == embed_stage.content_request(asked, [], [])
    assert embed_stage.describe_options(asked)["accelerator"] == L4


def test_without_googles_libraries_the_message_says_what_to_install(
    city: City, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "apache_beam.runners.dataflow.internal.apiclient", None)
    with pytest.raises(InputError, match=r"client libraries are not installed .* pip install 'camenn\[gcp\]'"):
        embed_command.main([*city.embed, *GPU, *DRY])
