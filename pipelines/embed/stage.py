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

import time
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from camenn_model.hashing import stable_hash
from camenn_model.integrity import DamagedError
from pipelines.embed.coverage import PhotoIds, check_image_root, check_photos, first_defect, read_items
from pipelines.embed.defects import failed_photos, write_defects
from pipelines.embed.encode import ENCODED
from pipelines.embed.generations import KINDS, Generations, Parts, part_records
from pipelines.embed.handlers import MakeHandler, chunk_handler, measure_pace
from pipelines.embed.needs import worker_needs
from pipelines.embed.options import STAGE, EmbedJob, EmbedOptions
from pipelines.embed.pipeline import EmbedCatalog
from pipelines.embed.resolve import HASHED
from pipelines.inputs.photo_listing import list_photos
from pipelines.io import files
from pipelines.io.tables import Source
from pipelines.runner.beam import is_local_run, local_workers, worker_threads
from pipelines.runner.console import watch
from pipelines.runner.log import stage_logger
from pipelines.runner.machine_needs import threads_of
from pipelines.runs.context import Outcome, Request, RunContext, execute, open_run
from pipelines.runs.manifest import Manifest, new_run, read_latest, request_fingerprint
from pipelines.runs.outputs import check_output
from pipelines.runs.store import IMAGES, TITLES
from schemas.catalog import CATALOG
from schemas.embeddings import EMBEDDED_ITEMS
from schemas.rejects import DEFECTS, REJECTS

_LOG = stage_logger(STAGE)
CONTRACTS = {contract.name: contract.fingerprint() for contract in (EMBEDDED_ITEMS, REJECTS, DEFECTS)}
"""Of the run's own tables. Those of the embeddings depend on the encoders."""


def run(options: EmbedOptions, beam_flags: list[str], make_handler: MakeHandler = chunk_handler) -> dict[str, Any]:
    """Run the stage and publish.

    Returns the closing table.
    """
    started = time.monotonic()
    source = Source.find(options.data, CATALOG)
    check_image_root(options, source)
    generations = Generations.of(options)
    request = Request(
        stage=STAGE,
        out=options.store,
        flag="--store",
        tables={"--data": options.data, "--image_root": options.image_root},
        inputs={"catalog": source.fingerprint},
        options=describe_options(options),
        max_reject_rate=options.max_reject_rate,
    )
    with open_run(request, started=started) as context:
        parts = generations.open()
        before = {part.path for found in parts.values() for part in found}
        listing = list_photos(options.image_root, source.rows, context.directory)
        with watch(STAGE, None, "contents", is_local_run(beam_flags)) as progress:
            job = EmbedJob(
                options=options,
                source=source,
                previous=_items_of(context.latest),
                stored=parts,
                photo_listing=listing,
                run_directory=context.directory,
                progress=progress,
                threads=worker_threads(beam_flags),
                make_handler=make_handler,
            )
            context.run_job(beam_flags, "Embed" >> EmbedCatalog(job))
        if listing is not None:
            files.delete([listing])
        if any(context.paths(table) for table in ("image_embeddings", "title_embeddings")):
            parts = generations.list_parts()
        new = {kind: [part for part in found if part.path not in before] for kind, found in parts.items()}
        if any(new.values()):
            # A run that encoded nothing does next to nothing.
            parts = generations.merge_small(parts, beam_flags)
        summary = context.publish(describe_run(options, generations.contracts, context, parts, new))
        generations.drop_replaced(new, context.writer)
    return summary


def describe_run(
    options: EmbedOptions, contracts: dict[str, str], context: RunContext, parts: Parts, new: Parts
) -> Outcome:
    """Check the photos, and describe the run.

    They are compared with those of the published run.

    `parts`: all of the store's generations. `new`: those that this run encoded.
    """
    items = context.paths("items")
    failures = failed_photos(parts[IMAGES], context.paths("defects"))
    defects = write_defects(context.directory, items, failures)
    photos = PhotoIds.of_items(items, failures)
    gates = check_photos(options, context.latest, photos, defects)

    def summarise(manifest: Manifest) -> dict[str, Any]:
        catalog = manifest.counts["catalog"]
        return {
            "rows_in": catalog["in"],
            "rows_out": catalog.get("out", 0),
            "rejected": catalog.get("rejected", 0),
            "duplicates": catalog.get("duplicates", 0),
            "photos_named": photos.named,
            "defects": manifest.rows("defects"),
            "encoded_images": sum(part.rows for part in new[IMAGES]),
            "encoded_titles": sum(part.rows for part in new[TITLES]),
            "images_in_store": sum(part.rows for part in parts[IMAGES]),
            "titles_in_store": sum(part.rows for part in parts[TITLES]),
            "image_weights": options.image.describe(),
            "text_encoder": options.text.describe(),
            "kernels": ", ".join(sorted({part.kernels for found in new.values() for part in found})) or None,
            "seconds": round(manifest.seconds, 1),
            "rows_per_second": round(catalog["in"] / manifest.seconds, 1),
            "run": manifest.run,
            "out": options.store,
        }

    own = [record for record in context.records if record.table in ("items", "rejects")]
    return Outcome(
        records=[*own, *defects, *part_records(parts)],
        contracts=CONTRACTS | contracts,
        summarise=summarise,
        gates=gates,
        advice=f"What was encoded is kept. The first listing without a photo: {first_defect(defects)} "
        f"See whether all of --image_root {options.image_root} is there, and run again",
        fingerprint=content_request(options, items, failures),
    )


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
        _LOG.warning("%s Until then every photo counts as new.", error)
        return None
    if not latest or not paths:
        return None
    return Source(contract=EMBEDDED_ITEMS, files=tuple(paths), rows=latest.rows("items"), fingerprint="")


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
    generations = Generations.of(options)
    _, run_directory = new_run(options.store)
    try:
        job = EmbedJob(
            options=options,
            source=source,
            previous=_items_of(read_latest(options.store)),
            stored=generations.list_parts(),
            photo_listing=list_photos(options.image_root, source.rows, run_directory),
            run_directory=run_directory,
            progress=None,
            threads=threads,
            plan=True,
        )
        _, counts = execute(beam_flags, "Embed" >> EmbedCatalog(job), run_directory)
    finally:
        files.delete_directory(run_directory)
    due = {kind: counts.get(kind, {}).get("due", 0) for kind in KINDS}
    summary: dict[str, Any] = {"rows_in": counts["catalog"]["in"], "rejected": counts["catalog"].get("rejected", 0)}
    encode_seconds: float | None = 0.0
    sources = []
    for kind, rows in due.items():
        summary[f"distinct_{kind}"] = counts.get(kind, {}).get("in", 0)
        summary[f"{kind}_to_encode"] = rows
        if not rows:
            continue
        pace, origin = generations.seconds_each(kind), f"{kind}: earlier runs"
        if pace is None and is_local_run(beam_flags):
            pace, origin = measure_pace(job.spec(kind), threads), f"{kind}: a batch encoded just now"
        if pace is None:
            # On other machines, and no run says how fast they are.
            encode_seconds, origin = None, f"{kind}: nothing yet"
        elif encode_seconds is not None:
            encode_seconds += rows * pace / local_workers(beam_flags)
        sources.append(origin)
    if not (files.is_local(options.store) and is_local_run(beam_flags)):
        photos = {name: counts.get(name, {}).get("in", 0) for name in (HASHED, ENCODED)}
        summary |= worker_needs(options, photos, threads_of(beam_flags)).lines()
    return summary | {
        # Three digits, not tenths: a fast machine's small run is no run of 0 seconds.
        "encode_seconds": None if encode_seconds is None else float(f"{encode_seconds:.3g}"),
        "estimated_from": "; ".join(sources) or None,
        "seconds": round(time.monotonic() - started, 1),
        "out": options.store,
    }
