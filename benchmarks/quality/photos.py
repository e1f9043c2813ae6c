"""Retrieval between real photos and descriptions of their classes.

    python -m benchmarks.quality.photos --photos DIR --image_weights FILE --text_encoder DIR

It measures which description fits a photo, and which photo fits a description.

DIR is laid out as the Grocery Store Dataset (Klasson et al., WACV 2019): `train.txt`, `val.txt`,
`classes.csv`. Every photo is a listing whose title is the description of its class. CameNN is
trained on the photos of `train.txt` as `camenn train` does for the listing quality: photos and
titles alone, no clicks.

Then each photo of `val.txt` is a query for its description among those of all classes that
`val.txt` has, and each description a query for a photo. A hit is of the same class. For comparison
there are the best ridge and the best CCA map between mean patch features and mean token states,
fitted on the same listings.

`--check` leaves `val.txt` closed and holds every tenth training photo of a class out instead. The
last line of stdout is one JSON object.
"""

import argparse
import csv
import datetime
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from benchmarks.quality.figures import mean_and_error
from benchmarks.quality.representation import both_ways, frozen_similarities
from benchmarks.quality.worlds import World
from benchmarks.support.command import machine, progress_log, work_directory
from camenn_model.data.alignment_sampler import AlignmentSampler
from camenn_model.data.item_table import Ints
from camenn_model.evaluation.representation import content_vectors
from camenn_model.model.camenn import CameNN
from camenn_model.training.corpus import Corpus, TrainOptions, open_corpus
from camenn_model.training.pretraining import fit_inputs, train_alignment
from schemas.catalog import CATALOG
from schemas.contract import conform
from schemas.events import CLICKS, ORDERS

log = progress_log("photos")

KS = (1, 5)
GRID = 8
"""Patches per side, the default of `camenn embed`"""
EVERY = 10
"""One in so many training photos of a class is held out by --check"""
CLICKS_MADE, SESSION_CLICKS, DAYS = 2_000, 10, 20


def read_catalog(photos: Path) -> tuple[pa.Table, dict[str, bool]]:
    """Return (listings, whether each is of `val.txt`)."""
    with (photos / "classes.csv").open(newline="") as file:
        classes = {
            int(row["Class ID (int)"]): (
                row["Coarse Class Name (str)"],
                row["Class Name (str)"],
                (photos / row["Product Description Path (str)"].lstrip("/")).read_text().strip(),
            )
            for row in csv.DictReader(file)
        }
    listings, of_val = [], {}
    for part in ("train", "val"):
        for line in (photos / f"{part}.txt").read_text().splitlines():
            path, label, _ = (piece.strip() for piece in line.split(","))
            coarse, name, description = classes[int(label)]
            listings.append(
                {
                    "item_id": path,
                    "title": description,
                    "category": coarse,
                    "subcategory": coarse,
                    "image_uri": path,
                    "product_key": name,
                    "store_id": "shop",
                }
            )
            of_val[path] = part == "val"
    return conform(pa.Table.from_pylist(listings, schema=CATALOG.schema), CATALOG, "catalog"), of_val


def write_data(catalog: pa.Table, data: Path) -> None:
    """Write the tables.

    Clicks and orders are random: shards require them, and nothing here uses them.
    """
    data.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    first = datetime.datetime(2026, 1, 1)
    clicks, orders = [], []
    for number in range(CLICKS_MADE):
        session = number // SESSION_CLICKS
        at = first + datetime.timedelta(days=DAYS * number / CLICKS_MADE)
        who = {
            "user_id": f"u{session % 20}",
            "store_id": "shop",
            "item_id": catalog["item_id"][rng.integers(len(catalog))].as_py(),
        }
        clicks.append(
            {"exposure_id": f"e{number}", "session_id": f"s{session}", "clicked_at": at, "position": None, **who}
        )
        if rng.random() < 0.2:
            ordered_at = at + datetime.timedelta(minutes=5)
            orders.append({"order_id": f"o{number}", "ordered_at": ordered_at, "quantity": 1.0, **who})
    pq.write_table(catalog, data / "catalog.parquet")
    for rows, contract in ((clicks, CLICKS), (orders, ORDERS)):
        table = conform(pa.Table.from_pylist(rows, schema=contract.schema), contract, contract.name)
        pq.write_table(table, data / f"{contract.name}.parquet")


def hold_out(corpus: Corpus, of_val: dict[str, bool], *, check: bool) -> None:
    """Make the held-out listings those of `val.txt`.

    With `check` they are some of `train.txt`, and the others are left without a photo.
    """
    table = corpus.table
    held = np.array([of_val[item] for item in table.ids.to_pylist()])
    if check:
        table.image_row = np.where(held, -1, table.image_row)
        number = pd.DataFrame({"product": table.product, "val": held}).groupby(["product", "val"]).cumcount()
        held = ~held & (number.to_numpy() % EVERY == 0)
    table.held_out = held


def recalls(similarities: NDArray[np.float32], classes: Ints) -> dict[str, dict[str, float]]:
    """Return R@k both ways from similarities.

    The similarities are [photos, titles] of the same listings. Each description is included once,
    whatever the number of its photos.
    """
    named, once = np.unique(classes, return_index=True)
    found = both_ways(similarities[:, once], classes, named, KS)
    return dict(zip(("photo_to_description", "description_to_photo"), found, strict=True))


def train_aligner(corpus: Corpus, options: TrainOptions) -> CameNN:
    """Train a model of photos and titles alone.

    It has not seen the held-out listings.
    """
    torch.manual_seed(options.seed)
    model = CameNN(corpus.config)
    # Restrict to the listings that are not held out here: the corpus was opened before those were chosen.
    fit_inputs(model, corpus.table, options.seed, penalty=corpus.table.fit_agreement().penalty)
    train_alignment(model, AlignmentSampler(corpus.table), options, sys.maxsize)
    return model.eval()


def measure(corpus: Corpus, options: TrainOptions) -> dict[str, dict[str, dict[str, float]]]:
    """Return recalls of CameNN and of both frozen maps."""
    table = corpus.table
    rows = np.flatnonzero(table.with_content())
    held, train = rows[table.held_out[rows]], rows[~table.held_out[rows]]
    _, classes = np.unique(table.product, return_inverse=True)
    model = train_aligner(corpus, options)
    image, text = content_vectors(model, table, held)
    frozen = frozen_similarities(table, train, classes[train], held, options.seed)
    ways = {"camenn": (image @ text.T).numpy()} | frozen
    return {name: recalls(similarities, classes[held]) for name, similarities in ways.items()}


def over_seeds(found: Sequence[dict[str, dict[str, dict[str, float]]]]) -> dict[str, Any]:
    """Return each recall's mean over the seeds, and its error."""

    def summary(values: list[float]) -> dict[str, float | None]:
        mean, error = mean_and_error(values)
        return {"mean": mean, "error": error if len(values) > 1 else None}

    return {
        name: {
            way: {k: summary([each[name][way][k] for each in found]) for k in recall} for way, recall in ways.items()
        }
        for name, ways in found[0].items()
    }


def main(argv: list[str] | None = None) -> int:
    """Embed, train, measure, and print one JSON line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality.photos", description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("--photos", type=Path, required=True, help="directory with train.txt, val.txt and classes.csv")
    parser.add_argument("--image_weights", required=True, help="InceptionV4, as for camenn embed")
    parser.add_argument("--text_encoder", required=True, help="BERT, as for camenn embed")
    parser.add_argument("--max_tokens", type=int, default=64, help="tokens of a description (default %(default)s)")
    parser.add_argument(
        "--alignment_epochs",
        type=int,
        default=TrainOptions.alignment_passes,
        help="epochs over the photos (default %(default)s)",
    )
    parser.add_argument("--seeds", type=int, default=5, help="models trained (default %(default)s)")
    parser.add_argument("--check", action="store_true", help="leave val.txt closed, hold out a part of train.txt")
    parser.add_argument("--work", type=Path, help="directory kept for the next time (default: a temporary one)")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    catalog, of_val = read_catalog(arguments.photos)
    with work_directory(arguments.work, "photos") as work:
        world = World(
            name="photos",
            work=str(work),
            data_directory=str(work / "data"),
            image_root=str(arguments.photos),
            image_weights=arguments.image_weights,
            text_encoder=arguments.text_encoder,
            flags={"embed": ["--grid", str(GRID), "--max_tokens", str(arguments.max_tokens)]},
        )
        write_data(catalog, world.data)
        world.prepare()
        options = [
            TrainOptions(shards=world.shards, out="", seed=seed, alignment_passes=arguments.alignment_epochs)
            for seed in range(arguments.seeds)
        ]
        corpus = open_corpus(options[0])
        hold_out(corpus, of_val, check=arguments.check)
        found = []
        for number, each in enumerate(options, start=1):
            found.append(measure(corpus, each))
            log(f"{number}/{len(options)}: {found[-1]}")
    print(
        json.dumps(
            {
                "recall": over_seeds(found),
                "held_out": int(corpus.table.held_out.sum()),
                "seeds": arguments.seeds,
                **machine(),
            }
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
