"""The whole way with other encoders than InceptionV4 and BERT, of other widths, by the same flags.

The city is tiny, a ResNet and an XLM-RoBERTa of two layers with random weights are written as a hub would have them.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.data import create_transform
from tokenizers import Tokenizer
from transformers import AutoModel

from camenn_model.package import open_package
from pipelines import cli
from pipelines.inputs.photos import decode_image
from pipelines.runs.manifest import Manifest, read_latest
from schemas.embeddings import embedding_shape
from tests.support.tiny_encoders import write_text_model, write_timm_model

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
GRID, PATCH, TOKENS = 2, 75, 16
WIDTHS = {"image": 512, "title": 48}


class Work:
    """A working directory, with the real commands run in this process."""

    def __init__(self, root: Path, capfd: pytest.CaptureFixture[str]) -> None:
        self.root, self.capfd = root, capfd

    def run(self, command: str, *flags: object) -> dict[str, Any]:
        assert cli.main([command, *map(str, flags), "--json"]) == 0
        return json.loads(self.capfd.readouterr().out.strip().splitlines()[-1])

    def embed(self, image: object, text: object, *flags: str) -> dict[str, Any]:
        data, store = self.root / "data", self.root / "store"
        places = ("--data", data, "--store", store, "--grid", GRID, "--max_tokens", TOKENS, "--precision", "fp32")
        return self.run("embed", *places, "--image_weights", image, "--text_encoder", text, *flags)

    def latest(self, name: str) -> Manifest:
        manifest = read_latest(str(self.root / name))
        assert manifest is not None
        return manifest

    def stored(self, kind: str) -> dict[str, np.ndarray]:
        """{content key: embedding} of the published run, float16 [rows, width]."""
        manifest, found = self.latest("store"), {}
        for path in manifest.paths(f"{kind}_embeddings"):
            table = pq.ParquetFile(path).read()
            shape = embedding_shape(table.schema)
            assert shape[1] == WIDTHS[kind]
            for key, value in zip(table[f"{kind}_key"].to_pylist(), table["embedding"].to_pylist(), strict=True):
                found[key] = np.frombuffer(value, dtype="<f2").reshape(shape)
        return found

    def generations(self) -> list[int]:
        return [len(list((self.root / "store" / kind).iterdir())) for kind in ("images", "titles")]


def plain_image_features(directory: Path, photo: Path) -> np.ndarray:
    """What timm alone makes of a photo's patches, float32 [P, width]."""
    model = timm.create_model("resnet18", num_classes=0).eval()
    model.load_state_dict(load_file(directory / "model.safetensors"), strict=False)
    transform = create_transform((3, PATCH, PATCH), mean=MEAN, std=STD, crop_pct=1.0)
    pixels = Image.fromarray(decode_image(photo.read_bytes(), GRID * PATCH).pixels)
    corners = [(column * PATCH, row * PATCH) for row in range(GRID) for column in range(GRID)]
    patches = [pixels.crop((left, top, left + PATCH, top + PATCH)) for left, top in corners]
    with torch.inference_mode():
        return model(torch.stack([transform(patch) for patch in patches])).numpy()


def plain_title_states(directory: Path, title: str) -> np.ndarray:
    """What transformers alone makes of a title's tokens, float32 [tokens, width]."""
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.enable_truncation(TOKENS)
    model = AutoModel.from_pretrained(directory).eval()
    with torch.inference_mode():
        return model(input_ids=torch.tensor([tokenizer.encode(title).ids])).last_hidden_state[0].numpy()


@pytest.mark.slow
def test_whole_way_with_encoders_of_other_widths(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    work = Work(tmp_path, capfd)
    work.run("simulate", "--out", tmp_path / "data", "--preset", "tiny")
    resnet = write_timm_model(tmp_path / "resnet", "resnet18", mean=MEAN, std=STD)
    xlm = write_text_model(tmp_path / "xlm", "xlm-roberta")

    first = work.embed(resnet, xlm)
    assert first["encoded_images"] > 0 and first["encoded_titles"] > 0
    again = work.embed(resnet, xlm)
    assert again["encoded_images"] == again["encoded_titles"] == 0

    items = pq.ParquetFile(work.latest("store").paths("items")[0]).read().to_pylist()
    titles = {row["item_id"]: row["title"] for row in pq.read_table(tmp_path / "data" / "catalog.parquet").to_pylist()}
    photos, states = work.stored("image"), work.stored("title")
    for row in items[::12]:
        expected = plain_image_features(resnet, tmp_path / "data" / row["image_uri"])
        found = photos[row["image_key"]].astype(np.float32)
        np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-3 * np.abs(expected).max())
        expected = plain_title_states(xlm, titles[row["item_id"]])
        found = states[row["title_key"]].astype(np.float32)
        np.testing.assert_allclose(found[: len(expected)], expected, rtol=2e-3, atol=2e-3)
        assert not found[len(expected) :].any()

    places = {name: tmp_path / name for name in ("data", "store", "shards", "model", "scores")}
    work.run("shards", "--data", places["data"], "--store", places["store"], "--out", places["shards"])
    for kind, width in WIDTHS.items():
        with pa.memory_map(work.latest("shards").paths(f"contents_{kind}s")[0]) as mapped:
            assert embedding_shape(pa.ipc.open_file(mapped).schema)[1] == width
    work.run("train", "--shards", places["shards"], "--out", places["model"], "--batch_size", "128", "--epochs", "1")
    config = open_package(str(places["model"])).config
    assert (config.image_width, config.text_width) == tuple(WIDTHS.values())
    score = ["--data", places["data"], "--store", places["store"], "--model", places["model"], "--top_k", "0"]
    scored = work.run("score", *score, "--out", places["scores"])
    assert scored["rows_out"] == scored["pairs"] > 0
    scores = pq.read_table(scored["scores"]).to_pandas()
    assert len(scores) == scored["pairs"] and scores["cvr"].between(0, 1).all() and scores["cvr"].nunique() > 10

    # Other encoders are another generation beside the first; back with the first ones, nothing is encoded.
    other = write_text_model(tmp_path / "distilbert", "distilbert")
    changed = work.embed("random:1", other, "--image_model", "test_convnext")
    assert changed["encoded_images"] == first["encoded_images"] and changed["encoded_titles"] == first["encoded_titles"]
    assert "test_convnext" in changed["image_weights"] and work.generations() == [2, 2]
    assert cli.main(["score", *map(str, score), "--out", str(tmp_path / "never")]) == 2
    assert "was trained on embeddings of resnet18" in capfd.readouterr().err
    back = work.embed(resnet, xlm)
    assert back["encoded_images"] == back["encoded_titles"] == 0 and work.generations() == [2, 2]
