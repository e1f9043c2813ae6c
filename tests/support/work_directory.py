"""A small working directory with every output that the report reads, made without running a stage."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image, ImageDraw

from pipelines.io.files import write_parquet
from pipelines.io.tables import FileRecord
from pipelines.runs.manifest import Manifest, add_files
from pipelines.runs.night_record import StageRecord, new_night
from pipelines.runs.publication import publish
from schemas.audience import AUDIENCE
from schemas.contract import Contract, check_output
from schemas.rejects import DEFECTS, REJECTS
from schemas.scores import LISTING_QUALITY, SCORES
from schemas.training import ITEMS

EVIL_TITLE = "<script>document.title = 'owned'</script> & \"bananas\""
LONG_TITLE = (
    "organic fair trade bananas from the hills, ripened on the way, six in a net, best before the end of the week, " * 3
)
KINDS = ("banana", "apple", "milk", "pear", "carrot", "orange juice")
EXPERTS = 4


def draw_photos(directory: Path, count: int) -> list[str]:
    """A few simple photos; returns their addresses."""
    directory.mkdir(parents=True)
    names = []
    for number in range(count):
        rng = np.random.default_rng(number)
        background, front = (tuple(int(value) for value in rng.integers(60, 256, 3)) for _ in range(2))
        image = Image.new("RGB", (160, 120 + 10 * (number % 3)), background)
        ImageDraw.Draw(image).ellipse((30, 20, 110 + 5 * (number % 6), 100), fill=front)
        names.append(f"{directory.name}/{number}.jpg")
        image.save(directory / f"{number}.jpg")
    return names


def _write(root: Path, run: str, contract: Contract, table: pa.Table, folder: str | None = None) -> FileRecord:
    path = root / "runs" / run / (folder or contract.name) / "part-0.parquet"
    checked = check_output(table, contract)
    return FileRecord.of(contract.name, str(path), table.num_rows, write_parquet(str(path), checked))


def _publish(root: Path, manifest: Manifest, records: list[FileRecord]) -> None:
    add_files(manifest, {record.table: "" for record in records}, records)
    publish(str(root), manifest)


def make_items(uris: list[str | None], items: int, stores: int) -> pa.Table:
    """Make listings, some odd.

    The first has a hostile title, the second a very long one, the third none. Every fifth lacks a
    photo.
    """
    rng = np.random.default_rng(0)
    titles: list[str | None] = [f"{KINDS[n % len(KINDS)]} no. {n}" for n in range(items)]
    titles[:3] = [EVIL_TITLE, LONG_TITLE, None]
    columns: dict[str, object] = {
        "item_id": [f"i{n:06d}" for n in range(items)],
        "title": titles,
        "subcategory": [KINDS[n % len(KINDS)] for n in range(items)],
        "product_key": [f"p{n // 3}" for n in range(items)],
        "store_id": [f"s{n % stores:03d}" for n in range(items)],
        "image_uri": [None if n % 5 == 4 else uris[n % len(uris)] for n in range(items)],
        "price": pa.array(rng.uniform(0.5, 20, items), pa.float32()),
    }
    return pa.table(
        {
            name: pa.array(columns[name], ITEMS.schema.field(name).type)
            if name in columns
            else pa.nulls(items, ITEMS.schema.field(name).type)
            for name in ITEMS.names
        }
    )


def write_scores(root: Path, run: str, items: pa.Table, stores: int, seed: int) -> None:
    """One night of scores: two audience rows per store, each meeting its own store's listings."""
    rng = np.random.default_rng(seed)
    audience = pa.table(
        {
            "audience_id": [f"s{store:03d}@{hour}" for store in range(stores) for hour in (9, 18)],
            "user_id": pa.nulls(2 * stores, pa.string()),
            "store_id": [f"s{store:03d}" for store in range(stores) for _ in range(2)],
            "hour": pa.array([9, 18] * stores, pa.int64()),
        }
    )
    owner = np.array(items["store_id"].to_pylist())
    names = np.array(items["item_id"].to_pylist())
    appeal = np.random.default_rng(5).normal(-1.8, 0.8, len(names))
    pieces = []
    for audience_id, store in zip(audience["audience_id"].to_pylist(), audience["store_id"].to_pylist(), strict=True):
        mine = np.flatnonzero(owner == store)
        cvr = 1 / (1 + np.exp(-(appeal[mine] + rng.normal(0.02 * seed, 0.15, len(mine)))))
        order = np.argsort(-cvr, kind="stable")
        count = len(mine)
        pieces.append(
            pa.table(
                {
                    "audience_id": [audience_id] * count,
                    "item_id": names[mine][order],
                    "cvr": pa.array(cvr[order], pa.float32()),
                    "rank": pa.array(np.arange(1, count + 1), pa.int32()),
                    "model_version": ["m1"] * count,
                }
            )
        )
    scores = pa.concat_tables(pieces)
    n = len(names)
    ita, tia = rng.uniform(0.05, 1, (2, n))
    mismatch = 1 - (ita + tia) / 2
    quality = pa.table(
        {
            "item_id": names,
            "ita": pa.array(ita, pa.float32()),
            "tia": pa.array(tia, pa.float32()),
            "cosine": pa.array(2 * ita - 1, pa.float32()),
            "mismatch": pa.array(mismatch, pa.float32()),
            "mismatch_percentile": pa.array(np.argsort(np.argsort(mismatch)) / n, pa.float32()),
            "flags": pa.array(
                [
                    (["mismatch"] if m > 0.75 or k < 2 else []) + (["no_image"] if k % 5 == 4 else [])
                    for k, m in enumerate(mismatch)
                ],
                pa.list_(pa.string()),
            ),
            "clicks": np.arange(n, dtype=np.int64),
            "orders": np.zeros(n, dtype=np.int64),
            "lost_orders": pa.array(np.arange(n) % 7, pa.float32()),
            "model_version": ["m1"] * n,
        }
    )
    night = "score_date=2024-03-12"
    records = [
        _write(root, run, SCORES, scores, f"scores/{night}"),
        _write(root, run, LISTING_QUALITY, quality, f"listing_quality/{night}"),
        _write(root, run, AUDIENCE, audience),
        _write(root, run, ITEMS, items),
    ]
    counts = {"audience": {"in": 2 * stores, "out": 2 * stores}, "catalog": {"in": n, "out": n}}
    day = f"2024-03-1{2 + seed}"
    summary = {
        "rows_in": 2 * stores,
        "rows_out": scores.num_rows,
        "pairs": scores.num_rows,
        "seconds": 31.5,
        "mean_cvr": float(scores["cvr"].to_numpy().mean()),
        "score_date": day,
        "listings": n,
        "model_version": f"m{seed // 2}",
        "flagged_mismatch": 12 + seed,
        "calibration": {"pcoc": 1.0 + 0.04 * seed},
    }
    _publish(
        root,
        Manifest(
            stage="score",
            run=run,
            counts=counts,
            summary=summary,
            seconds=31.5,
            options={"top_k": 100, "score_date": "2024-03-12"},
        ),
        records,
    )


def write_model(root: Path, run: str, names: list[str]) -> None:
    """A model's run: curves and retrieval examples."""
    directory = root / "runs" / run
    directory.mkdir(parents=True)
    rng = np.random.default_rng(3)
    lines = [
        "step,examples,lr,total,cvr,ita,tia,contrastive,balance,z,early_stop_log_loss,"
        + ",".join(f"expert_{e}" for e in range(EXPERTS))
    ]
    for step in range(10, 1210, 10):
        fade = np.exp(-step / 300)
        noise = rng.normal(0, 0.015, 6)
        cvr = 0.43 + 0.22 * fade + noise[0]
        ita, tia = 0.46 + 0.24 * fade + noise[1], 0.44 + 0.25 * fade + noise[2]
        contrastive = 1.9 + 2.2 * fade + noise[3]
        stop = f"{0.436 + 0.18 * fade:.5f}" if step % 100 == 0 else ""
        shares = rng.dirichlet(np.array([8.0, 6, 4, 2]) * 20)
        values = [
            step,
            step * 64,
            3e-4,
            cvr + 0.25 * (ita + tia) + 0.1 * contrastive,
            cvr,
            ita,
            tia,
            contrastive,
            0.021 + 0.004 * fade,
            0.002 * fade + 0.0004,
        ]
        lines.append(",".join([*(f"{value:.6g}" for value in values), stop, *(f"{share:.4f}" for share in shares)]))
    (directory / "curves.csv").write_text("\n".join(lines) + "\n")
    queries = []
    for number in range(8):
        results = [
            {
                "item_id": names[(number * 7 + k * k) % len(names)],
                "cosine": 0.71 - 0.07 * k,
                "same_product": k in (0, number % 4),
            }
            for k in range(5)
        ]
        queries.append(
            {"direction": ("image_to_text", "text_to_image")[number % 2], "item_id": names[number], "results": results}
        )
    (directory / "retrieval.json").write_text(json.dumps({"queries": queries}))
    summary = {"rows_in": 77_000, "steps": 1200, "epochs": 1, "seconds": 640.0}
    _publish(
        root,
        Manifest(
            stage="train",
            run=run,
            summary=summary,
            seconds=640.0,
            options={
                "shards": "work/shards",
                "profile": "small",
                "seed": 1,
                "alignment": True,
                "optimizer": {"learning_rate": 0.001},
                "loss": {"weighting": "fixed"},
            },
        ),
        [],
    )


def make_metrics() -> dict[str, object]:
    """The content of metrics.json."""
    edges = np.linspace(0.02, 0.44, 15)
    reliability = [
        {"predicted": float(p), "observed": float(p * 0.97 + 0.004 * (-1) ** k), "rows": 2100 + k}
        for k, p in enumerate(edges)
    ]
    model = {
        "auc": 0.6712,
        "gauc": 0.6554,
        "session_auc": 0.6602,
        "ndcg_at_10": 0.6011,
        "hr_at_10": 0.913,
        "log_loss": 0.4298,
        "ne": 0.9141,
        "pcoc": 1.012,
        "ece": 0.0061,
    }
    lightgbm = {
        "auc": 0.6604,
        "gauc": 0.6561,
        "session_auc": 0.6533,
        "ndcg_at_10": 0.5952,
        "hr_at_10": 0.909,
        "log_loss": 0.4331,
        "ne": 0.9212,
        "pcoc": 0.994,
        "ece": 0.0072,
    }
    popularity = {
        "auc": 0.5713,
        "gauc": 0.5602,
        "session_auc": 0.5651,
        "ndcg_at_10": 0.5328,
        "hr_at_10": 0.88,
        "log_loss": 0.4652,
        "ne": 0.9897,
        "pcoc": 1.002,
        "ece": 0.0049,
    }
    recall = {"r_at_1": 0.213, "r_at_5": 0.487, "r_at_10": 0.61}
    return {
        "test": {**model, "rows": 31_593, "positives": 5_655, "base_rate": 0.179},
        "baselines": {"popularity": popularity, "lightgbm": lightgbm},
        "reliability": reliability,
        "representation": {
            "listings": 150,
            "image_to_text": recall,
            "text_to_image": {**recall, "r_at_1": 0.19},
            "mismatch_auc": 0.842,
        },
        "train": {"examples": 76_800, "examples_per_second": 121.4, "seconds": 640.0, "steps": 1200, "epochs": 1},
    }


def make_work(
    root: Path,
    *,
    items: int = 90,
    stores: int = 6,
    photos: list[str] | None = None,
    image_root: Path | None = None,
    nights: int = 2,
) -> Path:
    """Write the whole working directory and return it; the store's photos lie beside it."""
    work = root / "work"
    image_root = image_root or root / "data"
    uris: list[str | None] = list(photos or draw_photos(image_root / "photos", 12))
    uris.append("photos/gone.jpg")
    table = make_items(uris, items, stores)
    defects = pa.table(
        {
            "stage": ["embed"],
            "key": ["catalog:i000012"],
            "reason": ["missing_image"],
            "detail": [
                "item_id 'i000012': column 'image_uri': 'photos/gone.jpg' is not a file. "
                "Upload the photo, or fix the address."
            ],
        },
        schema=DEFECTS.schema,
    )
    rejects = pa.table(
        {
            "stage": ["shards"] * 4,
            "key": [f"clicks:row {n}" for n in range(4)],
            "reason": ["null_user_id"] * 4,
            "detail": ["clicks.parquet: column 'user_id' is null. <b>Give</b> it a value."] * 4,
        },
        schema=REJECTS.schema,
    )
    encoder = {"fingerprint": "5dba25d93f920903", "precision": "bf16", "device": "cpu"}
    options = {
        "data": str(image_root),
        "store": str(work / "store"),
        "image_root": str(image_root),
        "allow_absolute": False,
        "max_reject_rate": 0.01,
        "image": {
            **encoder,
            "source": "random:7",
            "description": "random:7 (bf16, weights 0011aabbccdd, untrained weights)",
            "grid": 4,
            "patch_size": 75,
        },
        "text": {
            **encoder,
            "source": "models/bert",
            "description": "models/bert (bf16, weights a866600dd792)",
            "max_tokens": 16,
        },
    }
    summary = {
        "rows_in": items + 1,
        "rows_out": items,
        "encoded_images": 12,
        "encoded_titles": items - 1,
        "images_in_store": 12,
        "image_weights": "random:7",
        "seconds": 13.4,
    }
    counts = {"catalog": {"in": items + 1, "out": items, "rejected": 0, "duplicates": 1}}
    run = "20240311T010000-aaaaaa"
    store = Manifest(stage="embed", run=run, options=options, counts=counts, summary=summary, seconds=13.4)
    _publish(work / "store", store, [_write(work / "store", run, DEFECTS, defects)])
    clicks = {
        "in": 100_000,
        "out": 77_000,
        "rejected": 4,
        "duplicates": 996,
        "unknown_item": 2_000,
        "open_window": 15_000,
        "repeated_clicks": 5_000,
    }
    orders = {"in": 28_873, "out": 28_800, "returns": 73}
    shards_summary = {
        "rows_in": 100_000,
        "rows_out": 77_000,
        "as_of": "2024-03-11T15:29:04.749977",
        "examples": {"train": 50_000, "gap": 6_000, "early_stop": 4_000, "calibration": 4_000, "test": 13_000},
    }
    shards = Manifest(
        stage="shards",
        run=run,
        counts={"clicks": clicks, "orders": orders},
        summary=shards_summary,
        seconds=44.0,
        options={"data": "city", "attribution_hours": 24.0},
    )
    _publish(work / "shards", shards, [_write(work / "shards", run, REJECTS, rejects)])
    write_model(work / "model", run, table["item_id"].to_pylist())
    for night in range(nights):
        write_scores(work / "scores", f"2024031{night + 1}T020000-bbbbbb", table, stores, night)
        record, _ = new_night(str(work), {})
        record.stages.append(StageRecord("score", "done" if night else "failed", seconds=31.5))
        record.exit_code, record.message = (0, "") if night else (2, "shards: table 'orders' is missing. Put it there.")
        record.write()
    (work / "metrics.json").write_text(json.dumps(make_metrics()))
    return work
