"""Run `camenn embed`: encode each distinct photo and title once.

Every distinct photo and title of the catalog goes through its encoder.

catalog ──► Clean ──► Resolve (which photo, which title) ──► items/
                          │ wanted keys        ▲ previous items: unchanged photos are not read
                          ▼
              minus committed keys ──► chunks of ≤ 256 ──► RunInference ──► one part + commit marker each

Small parts, of this run and of those before, are merged once all are encoded, by runs that encoded
something. `--plan` ends before RunInference: it counts. A run that lost photos is gated
(pipelines/embed/coverage.py).
"""

import sys
import time
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import apache_beam as beam
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from camenn_model.hashing import stable_hash
from camenn_model.integrity import DamagedError
from pipelines.embed.coverage import PhotoIds, check_image_root, check_photos, first_defect, read_items
from pipelines.embed.handlers import MakeHandler, chunk_handler, measure_pace
from pipelines.embed.options import STAGE, EmbedJob, EmbedOptions, store_place
from pipelines.embed.pipeline import EmbedCatalog, MergeParts
from pipelines.io import files
from pipelines.io.tables import FileRecord, Source
from pipelines.runner.beam import is_local_run, local_workers, open_pipeline, worker_threads
from pipelines.runner.console import watch
from pipelines.runner.exit_codes import GatesFailed
from pipelines.runs.accounting import FinishRun, check_accounting, check_reject_rate, read_finished, read_rejects
from pipelines.runs.manifest import Manifest, add_files, new_run, read_latest, request_fingerprint, write_manifest
from pipelines.runs.outputs import check_output, hold_output
from pipelines.runs.publication import publish, published_manifests
from pipelines.runs.store import IMAGES, TITLES, Part, drop_replaced, list_parts, plan_merges
from schemas.catalog import CATALOG
from schemas.embeddings import EMBEDDED_ITEMS
from schemas.manifest import KEEP
from schemas.rejects import DEFECTS, REJECTS


def failed_photos(parts: list[Part], unread_files: list[str]) -> dict[str, tuple[str, str]]:
    """Return the photos that could not be decoded or read.

    The result is {content key: (reason, detail)} of photos that could not be decoded, or not be
    read tonight.
    """
    failures = {key: (reason, detail) for part in parts for key, reason, detail in part.failures}
    for path in unread_files:
        with files.open_read(path) as handle:
            for row in pq.read_table(handle).to_pylist():
                failures[row["key"]] = (row["reason"], row["detail"])
    return failures


def write_defects(run_directory: str, item_files: list[str], failures: dict[str, tuple[str, str]]) -> list[FileRecord]:
    """Write the run's `defects` table.

    It has the listings whose photo is missing, unreadable or undecodable: one file, ordered by key.
    """
    failed = pa.array(list(failures), pa.string())
    keys: list[str] = []
    reasons: list[str] = []
    details: list[str] = []
    for table in read_items(item_files, ["item_id", "image_uri", "image_key", "image_defect", "image_defect_detail"]):
        bad = pc.or_(pc.is_valid(table["image_defect"]), pc.is_in(table["image_key"], failed))
        rows = (column.to_pylist() for column in table.filter(bad).columns)
        for item, uri, key, defect, detail in zip(*rows, strict=True):
            if key in failures:
                defect, detail = failures[key]
                detail = f"column 'image_uri': '{uri}': {detail}" if uri else f"column 'image_bytes': {detail}"
            keys.append(f"catalog:{item}")
            reasons.append(defect)
            details.append(f"item_id '{item}': {detail}")
    if not keys:
        return []
    defects = pa.table(
        {"stage": [STAGE] * len(keys), "key": keys, "reason": reasons, "detail": details}, schema=DEFECTS.schema
    ).sort_by("key")
    path = files.join(run_directory, "defects", "part-0.parquet")
    return [FileRecord.of("defects", path, defects.num_rows, files.write_parquet(path, defects))]


def content_request(options: EmbedOptions, item_files: list[str], failures: Iterable[str]) -> str:
    """Fingerprint what a reader of the store gets.

    The result has 16 hex digits. It covers each listing's contents, the encoders, and which photos
    have no embedding (content keys).

    Listings come in any order, so their hashes are added up.
    """
    sums = [0, 0]
    for table in read_items(item_files, ["item_id", "title_key", "image_key"]):
        columns = [pc.fill_null(column, "") for column in table.columns]
        for place, salt in enumerate("ab"):
            rows = pc.binary_join_element_wise(pa.scalar(salt), *columns, "\t")
            sums[place] = (sums[place] + int(stable_hash(rows).sum())) % 2**64
    fingerprints = {"image": options.image.fingerprint, "text": options.text.fingerprint}
    digest = "".join(f"{value:016x}" for value in sums)
    return request_fingerprint({"items": digest, **fingerprints}, {"failed": sorted(failures)})


def describe_options(options: EmbedOptions) -> dict[str, Any]:
    """Describe the options for the manifest.

    The encoders come with the fingerprints of their generations.
    """
    record = asdict(options)
    for name, spec in (("image", options.image), ("text", options.text)):
        record[name] |= {"fingerprint": spec.fingerprint, "description": spec.describe()}
    return record


def _items_of(latest: Manifest | None) -> Source | None:
    """Return the published run's items, if they can be read.

    Without them, photos are read again to know them.
    """
    try:
        paths = latest.paths("items") if latest else []
    except DamagedError as error:
        print(f"embed: {error} Until then every photo counts as new.", file=sys.stderr)
        return None
    if not latest or not paths:
        return None
    return Source(contract=EMBEDDED_ITEMS, files=tuple(paths), rows=latest.rows("items"), fingerprint="")


def _run_job(job: EmbedJob, beam_flags: list[str]) -> tuple[list[FileRecord], dict[str, dict[str, int]]]:
    """Run the pipeline to its end.

    Returns the files and counts that it emitted.
    """
    with open_pipeline(beam_flags) as pipeline:
        pipeline | "Embed" >> EmbedCatalog(job) | "Finish" >> FinishRun(job.run_directory)
    records, counts = read_finished(job.run_directory)
    check_accounting(counts)
    return records, counts


def _merge_small(options: EmbedOptions, parts: dict[str, list[Part]], beam_flags: list[str]) -> dict[str, list[Part]]:
    """Merge small parts where there are many.

    This is a job of its own: what is encoded tonight is whole before, and is merged tonight too.
    Returns the parts after it.
    """
    groups = [(store_place(options, kind)[0], group) for kind, found in parts.items() for group in plan_merges(found)]
    if not groups:
        return parts
    with open_pipeline(beam_flags) as pipeline:
        pipeline | "PlanMerges" >> beam.Create(groups) | beam.Reshuffle() | "MergeParts" >> beam.ParDo(MergeParts())
    return _list_parts(options)


def _list_parts(options: EmbedOptions) -> dict[str, list[Part]]:
    """List the committed parts of both kinds' generations."""
    return {kind: list_parts(store_place(options, kind)[0]) for kind in (IMAGES, TITLES)}


def run(options: EmbedOptions, beam_flags: list[str], make_handler: MakeHandler = chunk_handler) -> dict[str, Any]:
    """Run the stage and publish.

    Returns the closing table.
    """
    started = time.monotonic()
    source = Source.find(options.data, CATALOG)
    check_image_root(options, source)
    inputs = {"--data": options.data, "--image_root": options.image_root}
    with hold_output(options.store, "--store", STAGE, inputs):
        latest = read_latest(options.store)
        for kind in (IMAGES, TITLES):
            directory = store_place(options, kind)[0]
            files.make_directory(directory)
            files.mark_own(directory)
        before = {kind: {part.path for part in found} for kind, found in _list_parts(options).items()}
        run_name, run_directory = new_run(options.store)
        with watch("embed", None, "contents", is_local_run(beam_flags)) as progress:
            job = EmbedJob(
                options=options,
                source=source,
                previous=_items_of(latest),
                run_directory=run_directory,
                progress=progress,
                threads=worker_threads(beam_flags),
                make_handler=make_handler,
            )
            records, counts = _run_job(job, beam_flags)
        check_reject_rate(counts, options.max_reject_rate, read_rejects(records))
        parts = _list_parts(options)
        new = {kind: [part for part in found if part.path not in before[kind]] for kind, found in parts.items()}
        if any(new.values()):
            # A run that encoded nothing does next to nothing.
            parts = _merge_small(options, parts, beam_flags)
        run_records = [record for record in records if record.table in ("items", "rejects")]
        item_files, unread_files = (
            [record.path for record in records if record.table == table] for table in ("items", "defects")
        )
        failures = failed_photos(parts[IMAGES], unread_files)
        defects = write_defects(run_directory, item_files, failures)
        photos = PhotoIds.of_items(item_files, failures)
        gates = check_photos(options, latest, photos, defects)
        manifest = Manifest(
            stage=STAGE,
            run=run_name,
            request=content_request(options, item_files, failures),
            inputs={"catalog": source.fingerprint},
            options=describe_options(options),
            counts=counts,
            gates=[gate.to_json() for gate in gates],
        )
        contracts = {
            c.name: c.fingerprint()
            for c in (
                EMBEDDED_ITEMS,
                REJECTS,
                DEFECTS,
                store_place(options, IMAGES)[1],
                store_place(options, TITLES)[1],
            )
        }
        stored = [
            FileRecord(f"{kind[:-1]}_embeddings", part.path, part.rows, part.bytes, sha256=part.sha256)
            for kind, found in parts.items()
            for part in found
        ]
        add_files(manifest, contracts, [*run_records, *defects, *stored])
        seconds = time.monotonic() - started
        manifest.seconds = seconds
        catalog = counts["catalog"]
        manifest.summary = {
            "rows_in": catalog["in"],
            "rows_out": catalog.get("out", 0),
            "rejected": catalog.get("rejected", 0),
            "duplicates": catalog.get("duplicates", 0),
            "photos_named": photos.named,
            "defects": sum(record.rows for record in defects),
            "encoded_images": sum(part.rows for part in new[IMAGES]),
            "encoded_titles": sum(part.rows for part in new[TITLES]),
            "images_in_store": sum(part.rows for part in parts[IMAGES]),
            "titles_in_store": sum(part.rows for part in parts[TITLES]),
            "image_weights": options.image.describe(),
            "text_encoder": options.text.describe(),
            "kernels": ", ".join(sorted({part.kernels for found in new.values() for part in found})) or None,
            "seconds": round(seconds, 1),
            "rows_per_second": round(catalog["in"] / seconds, 1),
            "run": run_name,
            "out": options.store,
        }
        failed = [gate.words for gate in gates if not gate.passed]
        if failed:
            write_manifest(options.store, manifest)
            raise GatesFailed(
                f"run {run_name} is finished, but {'; '.join(failed)}. The first without: {first_defect(defects)} "
                "The embeddings of before stay published, and what was encoded is kept. "
                f"See whether all of --image_root {options.image_root} is there, and run again; if it is right: "
                f"camenn publish {run_directory} --force --reason TEXT"
            )
        publish(options.store, manifest)
        # What was published may be published again, as far back as `camenn gc` keeps it.
        listed = {
            path
            for manifest in published_manifests(options.store, KEEP)
            for name in ("image_embeddings", "title_embeddings")
            for path in manifest.listed(name)
        }
        for kind in (IMAGES, TITLES):
            # Parts that were written and merged tonight were never listed.
            drop_replaced(store_place(options, kind)[0], listed, unseen={part.name for part in new[kind]})
    return manifest.summary


def plan(options: EmbedOptions, beam_flags: list[str]) -> dict[str, Any]:
    """Report what `run` would have to do.

    Returns the closing table. Photos that are new or changed are read. Nothing is encoded or
    published.
    """
    started = time.monotonic()
    source = Source.find(options.data, CATALOG)
    check_image_root(options, source)
    threads = worker_threads(beam_flags)
    check_output(options.store, "--store", STAGE, {"--data": options.data, "--image_root": options.image_root})
    _, run_directory = new_run(options.store)
    try:
        job = EmbedJob(
            options=options,
            source=source,
            previous=_items_of(read_latest(options.store)),
            run_directory=run_directory,
            progress=None,
            threads=threads,
            plan=True,
        )
        _, counts = _run_job(job, beam_flags)
    finally:
        files.delete_directory(run_directory)
    due = {kind: counts.get(kind, {}).get("due", 0) for kind in (IMAGES, TITLES)}
    summary: dict[str, Any] = {"rows_in": counts["catalog"]["in"], "rejected": counts["catalog"].get("rejected", 0)}
    encode_seconds: float | None = 0.0
    sources = []
    for kind, rows in due.items():
        summary[f"distinct_{kind}"] = counts.get(kind, {}).get("in", 0)
        summary[f"{kind}_to_encode"] = rows
        if not rows:
            continue
        pace, origin = _stored_pace(options, kind), f"{kind}: earlier runs"
        if pace is None and is_local_run(beam_flags):
            pace, origin = measure_pace(job.spec(kind), threads), f"{kind}: a batch encoded just now"
        if pace is None:
            # On other machines, and no run tells how fast they are.
            encode_seconds, origin = None, f"{kind}: nothing yet"
        elif encode_seconds is not None:
            encode_seconds += rows * pace / local_workers(beam_flags)
        sources.append(origin)
    return summary | {
        # Three digits, not tenths: a fast machine's small run is no run of 0 seconds.
        "encode_seconds": None if encode_seconds is None else float(f"{encode_seconds:.3g}"),
        "estimated_from": "; ".join(sources) or None,
        "seconds": round(time.monotonic() - started, 1),
        "out": options.store,
    }


def _stored_pace(options: EmbedOptions, kind: str) -> float | None:
    """Return the seconds one worker took for one content.

    The contents are of this generation. None means that none was encoded.
    """
    parts = [part for part in list_parts(store_place(options, kind)[0]) if part.seconds]
    contents = sum(part.rows + len(part.failures) for part in parts)
    return sum(part.seconds for part in parts) / contents if contents else None
