"""Run `camenn shards`: build a self-contained training shard set.

It is built from catalog, logs and embeddings.

clicks, orders ──► Clean ──► ByUser: sessions, labels, user and pair features, history
                               │
                               ▼
                            ByItem: listing features ──► ByDay ──► examples/date=.../
published run ──► final days: their files; open days: their features ──┘
store ──► Copy the embeddings in use, once ──► contents/
"""

import time
from dataclasses import asdict
from typing import Any

import numpy as np

from camenn_model.data.shard_set import date_of
from pipelines.features.as_of import FEATURES_VERSION
from pipelines.features.time_index import day_of
from pipelines.inputs.contents import look_at_contents
from pipelines.inputs.items import load_items
from pipelines.io import files
from pipelines.io.files import output_place
from pipelines.io.tables import Source
from pipelines.runner.beam import is_local_run
from pipelines.runner.console import NO_ROWS, watch
from pipelines.runner.machine_needs import threads_of
from pipelines.runs.context import Outcome, Request, RunContext, open_run
from pipelines.runs.manifest import Manifest, read_latest
from pipelines.runs.outputs import check_output
from pipelines.shards.final_days import Kept
from pipelines.shards.inputs import ShardInputs, open_inputs
from pipelines.shards.log_cache import kept_table, remember
from pipelines.shards.needs import worker_needs
from pipelines.shards.options import STAGE, ShardOptions
from pipelines.shards.pipeline import BuildShards
from pipelines.shards.planning import Prepared, look, prepare
from pipelines.shards.splits import split_records
from schemas.errors import InputError
from schemas.rejects import REJECTS
from schemas.training import EXAMPLES, ITEMS

FEW_CLICKS = 100
"""Of fewer clicks since the final days all may be of listings that left the catalog."""
CONTRACTS = {contract.name: contract.fingerprint() for contract in (EXAMPLES, ITEMS, REJECTS)}


def run(options: ShardOptions, beam_flags: list[str], rerun: bool = False, rebuild: bool = False) -> dict[str, Any]:
    """Run the stage and publish.

    Returns the closing table. With `rebuild`, days that were final are built again too.
    """
    started = time.monotonic()
    inputs = open_inputs(options)
    request = Request(
        stage=STAGE,
        out=output_place(options.out, "--out"),
        tables={"--data": options.data},
        outputs={"--store": options.store},
        inputs=inputs.fingerprints,
        fingerprint=inputs.request,
        options=asdict(options),
        max_reject_rate=options.max_reject_rate,
        repeats="builds it again",
    )
    with open_run(request, started=started, rerun=rerun or rebuild) as context:
        if context.unchanged:
            return context.repeat_summary()
        local = is_local_run(beam_flags)
        prepared = prepare(context, options, inputs, rebuild=rebuild, local=local)
        with watch(STAGE, prepared.due, "examples", local) as progress:
            job = BuildShards(prepared.plan, prepared.tables, progress)
            context.run_job(beam_flags, "Shards" >> job, scratch=prepared.plan.scratch)
        check_examples(
            context.rows("examples"), prepared.due, prepared.plan.kept, context.counts, inputs.tables.catalog
        )
        return context.publish(describe_shards(context, inputs, prepared, rebuilt=rebuild))


def plan(options: ShardOptions, beam_flags: list[str], rebuild: bool = False) -> dict[str, Any]:
    """Report what `run` would have to do.

    Returns the closing table. Times of the logs are read. Nothing is built or written.
    """
    started = time.monotonic()
    inputs, out = open_inputs(options), output_place(options.out, "--out")
    check_output(out, "--out", STAGE, {"--data": options.data, "--store": options.store})
    latest = read_latest(out)
    found = look(options, inputs, None if rebuild else latest, out)
    items, rejects, _ = load_items(STAGE, inputs.tables.catalog, inputs.store)
    contents = look_at_contents(inputs.store, items, latest, out)
    needs = {}
    if not (files.is_local(out) and is_local_run(beam_flags)):
        needs = worker_needs(found, contents, threads_of(beam_flags)).lines()
    return {
        **NO_ROWS,
        "rows_in": inputs.tables.clicks.rows,
        "rejected": rejects.num_rows,
        "nothing_to_do": latest is not None and not rebuild and latest.request == inputs.request,
        "clicks_to_build": len(found.built),
        "days_kept": len(found.kept.dates),
        "log_rows_to_read": sum(log.fresh_rows for log in found.logs.values()),
        "log_rows_kept": sum(log.known_rows for log in found.logs.values()),
        "contents_to_copy": sum(piece.keys.num_rows for piece in contents.pieces),
        "contents_kept": sum(record.rows for record in contents.kept),
        "as_of": str(np.datetime64(found.as_of, "us")),
        **needs,
        "seconds": round(time.monotonic() - started, 1),
        "out": out,
    }


def check_examples(built: int, due: int, kept: Kept, counts: dict[str, dict[str, int]], catalog: Source) -> None:
    """Check that closed clicks became examples.

    Days without examples would be final some nights later, and what was clicked on them would never
    be learned.

    Args:
        built: examples of this run.
        due: clicks whose window is closed, of the days that are not final.
        kept: what stays of the published run.
        counts: this run's counts, of which a message names those of clicks.
        catalog: the catalog, which a message names.

    Raises:
        InputError: of so many clicks some should have become examples.
    """
    if built or (kept.records and due < FEW_CLICKS):
        return
    clicks = {name: rows for name, rows in counts["clicks"].items() if name not in ("in", "out")}
    raise InputError(
        f"{catalog.files[0]}: none of {due:,} clicks whose attribution window is closed became an example "
        f"({', '.join(f'{name} {rows:,}' for name, rows in clicks.items())}). "
        "Nothing was published. Give a table 'catalog' that has the listings that were clicked, under the same item_id."
    )


def describe_shards(context: RunContext, inputs: ShardInputs, prepared: Prepared, *, rebuilt: bool) -> Outcome:
    """Describe the shard set for its manifest.

    It has new files, final days, and what the next run must know.
    """
    plan, tables = prepared.plan, prepared.tables
    kept_dates = plan.kept.dates
    log, log_files = remember(plan.logs, plan.user_buckets)
    days = split_records(plan.kept.records, plan.splits, files.join(context.directory, "examples"))
    encoders = {
        kind: {name: inputs.store.options[kind][name] for name in ("fingerprint", "description")}
        for kind in ("image", "text")
    }
    samples = {date: sample for date, sample in plan.kept.samples.items() if date in kept_dates} | prepared.samples
    others = ("users", "contents_images", "contents_titles", *(kept_table(log.contract) for log in plan.logs.values()))
    return Outcome(
        records=[*context.records, *days, *tables.kept, *log_files],
        contracts=CONTRACTS | dict.fromkeys(others, ""),
        options={
            "encoders": encoders,
            "log": log,
            "days": {
                "as_of": plan.as_of,
                "features": FEATURES_VERSION,
                "final_before": day_of(plan.kept.frozen_before) if plan.kept.records else None,
                "rebuilt": rebuilt,
                "samples": samples,
            },
        },
        summarise=lambda manifest: summarise(manifest, context, prepared),
    )


def summarise(manifest: Manifest, context: RunContext, prepared: Prepared) -> dict[str, Any]:
    """Return the closing table."""
    clicks, orders = manifest.counts["clicks"], manifest.counts["orders"]
    logs = prepared.plan.logs.values()
    splits: dict[str, int] = {}
    for record in sorted(manifest.records("examples"), key=lambda record: date_of(record.path)):
        splits[record.split] = splits.get(record.split, 0) + record.rows
    size = sum(entry["bytes"] for table in manifest.tables.values() for entry in table["files"])
    return {
        "rows_in": clicks["in"],
        "rows_out": clicks.get("out", 0),
        "rejected": sum(row.get("rejected", 0) for row in manifest.counts.values()),
        **{f"clicks_{name}": rows for name, rows in clicks.items() if name not in ("in", "out", "rejected") and rows},
        **{f"orders_{name}": rows for name, rows in orders.items() if name not in ("in", "rejected") and rows},
        "examples": splits,
        "examples_built": context.rows("examples"),
        "days_built": len({date_of(path) for path in context.paths("examples")}),
        "days_kept": len(prepared.plan.kept.dates),
        "log_rows_read": sum(log.fresh_rows for log in logs),
        "log_rows_kept": sum(log.known_rows for log in logs),
        "encoded_images": 0,
        "encoded_titles": 0,
        "contents_copied": sum(record.rows for record in context.records if record.table.startswith("contents_")),
        "contents_kept": sum(record.rows for record in prepared.tables.kept),
        "as_of": str(np.datetime64(prepared.plan.as_of, "us")),
        "megabytes": round(size / 1e6, 1),
        "seconds": round(manifest.seconds, 1),
        "clicks_per_second": round(clicks["in"] / manifest.seconds),
        "run": manifest.run,
        "out": context.request.out,
    }
