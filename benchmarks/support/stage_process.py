"""One timed run of one stage, in its own process.

    python -m benchmarks.support.stage_process JOB

JOB is a JSON job. The last line of stdout is the result.

The seconds are the stage's own, from its first read of the tables to its publication. This
process's start and imports are excluded, those of worker processes included. The plain loop's
seconds exclude building Beam's pipeline.
"""

import hashlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.support import loop_runner
from camenn_model.data.contents import Contents
from camenn_model.integrity import file_sha256
from pipelines.io import cache, files
from pipelines.io.tables import FileRecord
from pipelines.runner.exit_codes import run_main
from pipelines.runs.manifest import Manifest, add_files, new_run, read_latest
from pipelines.runs.publication import publish
from schemas.training import EXAMPLE_ORDER, EXAMPLES

CONTENTS_AT_A_TIME = 1_024
STAGES = ("embed", "shards", "score")
PLAIN = "plain"
SORTED_BY = {
    "items": ["item_id"],
    "users": ["user_id"],
    "image_embeddings": ["image_key"],
    "title_embeddings": ["title_key"],
    "examples": list(EXAMPLE_ORDER),
    "scores": ["audience_id", "rank"],
    "listing_quality": ["item_id"],
}
"""Compared tables of the outputs, and the sort order of their rows."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run of a stage.

    `work` is the prepared city, with data/, and store/, shards/ and model/ where the stage needs
    them. `out` is an empty directory.
    """

    stage: str
    work: str
    out: str
    beam_flags: tuple[str, ...]
    image_shape: Sequence[int]
    text_shape: Sequence[int]
    seed: int = 0
    rebuild: bool = False
    """True where `shards` rebuilds final days"""
    digests: bool = True
    """False where nothing but the stage itself may read its output"""


def run_stage(job: Job) -> dict[str, Any]:
    """Run the stage and return its closing table.

    Only the stage's own imports are made, as memory is measured too.
    """
    flags = list(job.beam_flags)
    data, store, model = (files.join(job.work, name) for name in ("data", "store", "model"))
    if job.stage == "embed":
        from benchmarks.support.stub_encoders import stub_handler, stub_specs
        from pipelines.embed import options as embed_options
        from pipelines.embed import stage as embed_stage

        image, text = stub_specs(job.image_shape, job.text_shape)
        options = embed_options.EmbedOptions(
            data=data, store=job.out, image_root=data, allow_absolute=False, image=image, text=text, max_reject_rate=0.0
        )
        return embed_stage.run(options, flags, make_handler=stub_handler)
    if job.stage == "shards":
        from pipelines.shards import options as shards_options
        from pipelines.shards import stage as shards_stage

        return shards_stage.run(
            shards_options.ShardOptions(
                data=data,
                store=store,
                out=job.out,
                attribution_hours=24.0,
                history=20,
                as_of=None,
                timezone="UTC",
                test_share=0.2,
                max_reject_rate=0.0,
            ),
            flags,
            rebuild=job.rebuild,
        )
    if job.stage == "score":
        from pipelines.score import stage as score_stage
        from pipelines.score.inputs import ScoreOptions

        return score_stage.run(
            ScoreOptions(
                data=data,
                store=store,
                model=model,
                out=job.out,
                score_date=None,
                top_k=100,
                audience="auto",
                timezone="UTC",
                max_reject_rate=0.0,
            ),
            flags,
        )
    if job.stage == "model":
        return write_untrained_model(files.join(job.work, "shards"), job.out, job.seed)
    raise ValueError(f"no stage '{job.stage}'")


def write_untrained_model(shards: str, out: str, seed: int) -> dict[str, Any]:
    """Publish an untrained model of the default profile.

    Its weights are initial ones. It is as fast as a trained one, but its predictions are
    meaningless.
    """
    import torch

    from camenn_model.calibration import PlattScaling
    from camenn_model.model.camenn import CameNN
    from camenn_model.tensors import save_tensors
    from camenn_model.training.corpus import TrainOptions, open_corpus
    from camenn_model.training.pretraining import fit_inputs

    corpus = open_corpus(TrainOptions(shards=shards, out=out))
    torch.manual_seed(seed)
    model = CameNN(corpus.config)
    fit_inputs(model, corpus.table, seed, penalty=corpus.space.agreement.penalty)
    run, directory = new_run(out)
    given = corpus.shards.manifest["options"]
    meta = {
        "model": json.loads(corpus.config.to_json()),
        "encoders": given["encoders"],
        "attribution_hours": given["attribution_hours"],
    }
    save_tensors(Path(directory) / "model.safetensors", dict(model.state_dict()))
    for name, text in (
        ("config", json.dumps(meta)),
        ("calibration", PlattScaling().to_json()),
        ("metrics", "{}"),
    ):
        (Path(directory) / f"{name}.json").write_text(text)
    corpus.space.write(Path(directory))
    manifest = Manifest(stage="train", run=run)
    names = sorted(path.name for path in Path(directory).iterdir() if not path.name.startswith("."))
    records = [
        FileRecord(name, str(path), 0, path.stat().st_size, sha256=file_sha256(path))
        for name, path in ((name, Path(directory) / name) for name in names)
    ]
    add_files(manifest, dict.fromkeys(names, ""), records)
    publish(out, manifest)
    return {"rows_out": 0}


def read_whole(path: str, columns: list[str] | None = None) -> pa.Table:
    """Read a Parquet file, or some columns of it."""
    with files.open_read(path) as handle:
        return pq.ParquetFile(handle).read(columns=columns)


def digest(manifest: Manifest) -> str:
    """Hash the rows of a run's tables, in fixed order.

    The rows are taken in an order of their own. The 16 hex digits are equal for equal rows, in
    whichever files they lie. Contents are those that the items refer to.
    """
    found = hashlib.sha256()
    _hash_contents(found, manifest)
    for name, order in SORTED_BY.items():
        paths = manifest.paths(name)
        if not paths:
            continue
        # Days are read one after another: all examples at once might not fit into memory.
        groups: dict[str, list[str]] = {}
        for record in manifest.records(name):
            groups.setdefault(f"{Path(record.path).parent.name} {record.split}", []).append(record.path)
        for folder, members in sorted(groups.items()) if name == "examples" else [("", paths)]:
            table = pa.concat_tables([read_whole(path) for path in sorted(members)])
            table = table.sort_by([(column, "ascending") for column in order]).replace_schema_metadata(None)
            found.update(f"{name} {folder} {table.num_rows}\n".encode())
            for column in table.combine_chunks().columns:
                _hash_values(found, column)
    return found.hexdigest()[:16]


def _hash_contents(found: Any, manifest: Manifest) -> None:
    """Feed keys and embeddings to the hash.

    They are hashed in order of keys, in blocks.
    """
    for kind in ("image", "title"):
        paths = manifest.paths(f"contents_{kind}s")
        if not paths:
            continue
        items = pa.concat_tables([read_whole(path, [f"{kind}_key"]) for path in manifest.paths("items")])
        root = paths[0].partition("/contents/")[0]
        copies = cache.local_copies(root, manifest.records(f"contents_{kind}s"), "")
        contents = Contents(copies, f"{kind}_key", wanted=items[f"{kind}_key"], keep=False)
        found.update(f"contents_{kind}s {len(contents)} {contents.shape}\n".encode())
        for start in range(0, len(contents), CONTENTS_AT_A_TIME):
            rows = np.arange(start, min(start + CONTENTS_AT_A_TIME, len(contents)))
            found.update("\n".join(contents.keys.take(pa.array(rows)).to_pylist()).encode())
            found.update(contents.gather(rows).tobytes())


def digest_examples(days: dict[str, list[str]]) -> str:
    """Hash the rows of some days' example files.

    `days` is {name of a day: paths}. The 16 hex digits are equal for equal rows, whichever program
    wrote them.
    """
    found = hashlib.sha256()
    schema = pa.schema([pa.field(field.name, field.type) for field in EXAMPLES.schema])
    for day, paths in sorted(days.items()):
        tables = [read_whole(path, schema.names).replace_schema_metadata(None) for path in paths]
        table = pa.concat_tables([table.cast(schema) for table in tables])
        table = table.sort_by([(column, "ascending") for column in SORTED_BY["examples"]])
        found.update(f"{day} {table.num_rows}\n".encode())
        for column in table.combine_chunks().columns:
            _hash_values(found, column)
    return found.hexdigest()[:16]


def _hash_values(found: Any, column: pa.ChunkedArray) -> None:
    """Feed values, lengths and nulls to the hash.

    The layout of their buffers does not matter.
    """
    array = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    table = pa.table({"": array})
    sink = pa.BufferOutputStream()
    # Parquet keeps values, but not the bytes under nulls.
    pq.write_table(table, sink, compression="none", use_dictionary=False, write_statistics=False, store_schema=False)
    found.update(sink.getvalue())


def main(argv: list[str] | None = None) -> int:
    """Run the job of the first argument.

    Its result is printed as one JSON line.
    """
    job = Job(**json.loads((sys.argv[1:] if argv is None else argv)[0]))
    loop_runner.building_seconds = 0.0
    started, worked = time.monotonic(), time.process_time()
    summary = run_stage(job)
    worked = time.process_time() - worked
    # Building the pipeline is part of Beam's overhead. A plain program has none.
    seconds = time.monotonic() - started - loop_runner.building_seconds
    manifest = read_latest(job.out)
    assert manifest is not None
    rows = {name: manifest.rows(name) for name in SORTED_BY if manifest.paths(name)}
    days: dict[str, list[str]] = {}
    for path in manifest.paths("examples"):
        days.setdefault(Path(path).parent.name, []).append(path)
    print(
        json.dumps(
            {
                "seconds": seconds,
                "cpu_seconds": worked - loop_runner.building_seconds,
                "rows": rows,
                "digest": digest(manifest) if job.digests else None,
                "digest_examples": digest_examples(days) if job.digests else None,
                "pairs": summary.get("pairs"),
                "bytes": sum(f["bytes"] for table in manifest.tables.values() for f in table["files"]),
            }
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
