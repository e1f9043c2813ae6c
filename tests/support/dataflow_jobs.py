"""The commands of docs/guides/dataflow.md, and a small city to run them on."""

import json
import re
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from camenn_model.calibration import PlattScaling
from camenn_model.data.shard_set import ShardSet
from camenn_model.integrity import file_sha256
from camenn_model.training.corpus import TrainOptions, open_corpus
from pipelines.embed import command as embed_command
from pipelines.io.tables import FileRecord
from pipelines.runs.manifest import Manifest, add_files
from pipelines.runs.publication import publish
from pipelines.score import command as score_command
from pipelines.shards import command as shards_command
from tests.support.small_city import catalog_table, random_city, write_data, write_store

PROJECT = Path(__file__).parents[2]
DOCUMENT = (PROJECT / "docs" / "guides" / "dataflow.md").read_text()
MAINS: dict[str, Callable[[list[str]], int]] = {
    "embed": embed_command.main,
    "shards": shards_command.main,
    "score": score_command.main,
}


def write_bert(directory: Path) -> None:
    """The files of a BERT that submission reads, without layers."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"model_type": "bert", "hidden_size": 4}))
    (directory / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n")
    save_file({"embeddings": np.zeros((4, 4), dtype=np.float32)}, directory / "model.safetensors")


def write_model(root: Path, shards: str) -> None:
    """A model package that was never trained."""
    from camenn_model.model.camenn import CameNN
    from camenn_model.tensors import save_tensors

    corpus = open_corpus(TrainOptions(shards=shards, out=str(root)))
    run = root / "runs" / "20240101T000000-bbbbbb"
    run.mkdir(parents=True)
    options = ShardSet(shards).manifest["options"]
    meta = {"model": json.loads(corpus.config.to_json())}
    meta |= {name: options[name] for name in ("encoders", "attribution_hours")}
    (run / "config.json").write_text(json.dumps(meta))
    corpus.space.write(run)
    (run / "calibration.json").write_text(PlattScaling(slope=1.0, intercept=0.0).to_json())
    (run / "metrics.json").write_text("{}")
    save_tensors(run / "model.safetensors", CameNN(corpus.config).state_dict())
    records = [
        FileRecord(path.name, str(path), 0, path.stat().st_size, sha256=file_sha256(path))
        for path in sorted(run.iterdir())
    ]
    manifest = Manifest(stage="train", run=run.name)
    add_files(manifest, {record.table: "" for record in records}, records)
    publish(str(root), manifest)


def write_city(root: Path, bert: Path) -> None:
    """The inputs of the three stages: data, store, shards, model, and a text encoder."""
    clicks, orders = random_city(7, 900, 500)
    write_data(root / "data", clicks, orders)
    write_store(root / "store", catalog_table())
    write_bert(bert)
    flags = ["--data", str(root / "data"), "--store", str(root / "store"), "--out", str(root / "shards")]
    assert shards_command.main([*flags, "--max_reject_rate=1", "--attribution_hours=6"]) == 0
    write_model(root / "model", str(root / "shards"))


def documented_command(stage: str, places: Mapping[str, Any], bert: Path, output: Any) -> list[str]:
    """The command of the guide as a shell would pass it on, with other places and encoders.

    `output`: where it writes instead.
    """
    variables = {name: value.strip('"') for name, value in re.findall(r'([A-Z_]+)=("[^"]*"|\S+)', DOCUMENT)}
    assert set(places) <= set(variables)
    variables |= {name: str(place) for name, place in places.items()}
    variables |= {"IMAGE_WEIGHTS": "random:0", "TEXT_ENCODER": str(bert)}
    variables["DATAFLOW"] = Template(variables["DATAFLOW"]).substitute(variables)
    found = re.search(rf"^camenn {stage} ((?:.*\\\n)*.*)$", DOCUMENT, re.MULTILINE)
    assert found is not None
    flags = shlex.split(Template(found[1].replace("\\\n", " ")).substitute(variables))
    place = flags.index("--store" if stage == "embed" else "--out") + 1
    return [*flags[:place], str(output), *flags[place + 1 :], "--dry_run=True"]
