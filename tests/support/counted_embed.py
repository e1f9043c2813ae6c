"""`camenn embed` in a process that may be killed.

It has the real encoders, small chunks, and a line in a file for each chunk that is begun.
"""

import os
from collections.abc import Iterable, Sequence
from typing import Any

from camenn_model.encoders.spec import ImageSpec, TextSpec
from pipelines.embed import encode
from pipelines.embed import stage as embed_stage
from pipelines.embed.handlers import (
    EncodedImages,
    EncodedTitles,
    ImageChunk,
    ImageChunkHandler,
    TitleChunk,
    TitleChunkHandler,
)
from pipelines.embed.options import EmbedOptions
from tests.support.encoder_sources import minilm

LOG = ""


def note(kind: str, contents: int) -> None:
    """One line, in one write: a process that is killed leaves it or not."""
    handle = os.open(LOG, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(handle, f"{kind} {contents}\n".encode())
    os.close(handle)


class CountedImages(ImageChunkHandler):
    """The real handler."""

    def run_inference(
        self, batch: Sequence[ImageChunk], model: Any, inference_args: dict[str, Any] | None = None
    ) -> Iterable[EncodedImages]:
        for chunk in batch:
            note("images", len(chunk.keys))
        return super().run_inference(batch, model, inference_args)


class CountedTitles(TitleChunkHandler):
    """The real handler."""

    def run_inference(
        self, batch: Sequence[TitleChunk], model: Any, inference_args: dict[str, Any] | None = None
    ) -> Iterable[EncodedTitles]:
        for chunk in batch:
            note("titles", len(chunk.keys))
        return super().run_inference(batch, model, inference_args)


def make_counted(spec: ImageSpec | TextSpec, threads: int | None) -> Any:
    """In the place of `chunk_handler`."""
    if isinstance(spec, ImageSpec):
        return CountedImages(spec, torch_threads=threads)
    return CountedTitles(spec, torch_threads=threads)


def main(data: str, store: str, log: str, chunk: str, weights: str) -> None:
    """Run to the end, or until somebody kills it. All paths; `chunk` is a number."""
    global LOG
    LOG = log
    encode.CHUNK = int(chunk)
    image = ImageSpec.resolve(weights, grid=1, patch_size=75, device="cpu", precision="auto", compile="off")
    text = TextSpec.resolve(minilm(), max_tokens=8, device="cpu")
    options = EmbedOptions(
        data=data, store=store, image_root=data, allow_absolute=False, image=image, text=text, max_reject_rate=0.0
    )
    embed_stage.run(options, ["--direct_num_workers=1"], make_handler=make_counted)


def run_quietly(errors: str, *arguments: str) -> None:
    """`main`, with its output in a file."""
    said = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)
    main(*arguments)
