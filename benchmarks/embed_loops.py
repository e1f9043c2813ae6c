"""One timed way of encoding a catalog, in a process of its own: `python -m benchmarks.embed_loops JOB` with a JSON job; the last line of stdout is the result.

Ways: `whole` is `camenn embed`; `bare` a torch loop over patches and token ids that lie in memory, with the fastest kernels known; `plain` a RunInference
pipeline as Beam's documentation would write it, one photo and one title an element, in fp32. Of each, start-up (imports, loading, compiling) is kept apart.
"""

import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from camenn_model.encoder_spec import ImageSpec, TextSpec, normalise_title
from pipelines import embed_catalog
from pipelines.inference import (
    EncodedImages,
    EncodedTitles,
    ImageChunk,
    ImageChunkHandler,
    MakeHandler,
    TitleChunk,
    TitleChunkHandler,
)

PROCESS_STARTED = time.monotonic()


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run."""

    way: str
    data: str
    out: str
    image_weights: str
    text_encoder: str
    grid: int = 4
    max_tokens: int = 32
    device: str = "cpu"
    precision: str = "auto"
    compile: str = "on"
    limit: int | None = None
    """Listings, for the ways that need no whole catalog"""
    variants: dict[str, Any] = field(default_factory=dict)
    """Of `bare`: the variant to run for `images` and `titles`; those missing are looked for"""

    def specs(self, precision: str | None = None) -> tuple[ImageSpec, TextSpec]:
        """Both encoders."""
        precision = precision or self.precision
        image = ImageSpec.resolve(
            self.image_weights,
            grid=self.grid,
            patch_size=75,
            device=self.device,
            precision=precision,
            compile=self.compile,
        )
        text = TextSpec.resolve(self.text_encoder, max_tokens=self.max_tokens, device=self.device, precision=precision)
        return image, text


# --- camenn embed


class _TimedImages(ImageChunkHandler):
    """The product's handler; writes down what loading and compiling took."""

    def __init__(self, spec: ImageSpec, threads: int | None, record: str) -> None:
        super().__init__(spec, torch_threads=threads)
        self.record = record

    def run_inference(
        self, batch: Sequence[ImageChunk], model: Any, inference_args: dict[str, Any] | None = None
    ) -> Iterable[EncodedImages]:
        found = super().run_inference(batch, model, inference_args)
        Path(self.record).write_text(str(model.start_seconds))
        return found


class _TimedTitles(TitleChunkHandler):
    """The same for titles."""

    def __init__(self, spec: TextSpec, threads: int | None, record: str) -> None:
        super().__init__(spec, torch_threads=threads)
        self.record = record

    def run_inference(
        self, batch: Sequence[TitleChunk], model: Any, inference_args: dict[str, Any] | None = None
    ) -> Iterable[EncodedTitles]:
        found = super().run_inference(batch, model, inference_args)
        Path(self.record).write_text(str(model.start_seconds))
        return found


def _timed(directory: Path) -> MakeHandler:
    def make(spec: ImageSpec | TextSpec, threads: int | None) -> Any:
        if isinstance(spec, ImageSpec):
            return _TimedImages(spec, threads, str(directory / "images.start"))
        return _TimedTitles(spec, threads, str(directory / "titles.start"))

    return make


def run_whole(job: Job) -> dict[str, Any]:
    """`camenn embed`, from its first look at the catalog to its publication."""
    image, text = job.specs()
    out = Path(job.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    options = embed_catalog.EmbedOptions(
        data=job.data,
        store=job.out,
        image_root=job.data,
        allow_absolute=False,
        image=image,
        text=text,
        max_reject_rate=0.0,
    )
    imports = time.monotonic() - PROCESS_STARTED
    started = time.monotonic()
    summary = embed_catalog.run(options, ["--direct_num_workers=1"], make_handler=_timed(out.parent))
    seconds = time.monotonic() - started
    starts = [float(path.read_text()) for path in sorted(out.parent.glob("*.start"))]
    return {
        "seconds": seconds - sum(starts),
        "start_seconds": imports + sum(starts),
        "images": summary["encoded_images"],
        "titles": summary["encoded_titles"],
        "kernels": summary["kernels"],
    }


def run_stub(job: Job) -> dict[str, Any]:
    """`camenn embed` with stub encoders of small embeddings: the plant alone, for its memory."""
    from benchmarks.stub_encoders import stub_handler, stub_specs

    image, text = stub_specs((4, 16), (8, 16))
    options = embed_catalog.EmbedOptions(
        data=job.data,
        store=job.out,
        image_root=job.data,
        allow_absolute=False,
        image=image,
        text=text,
        max_reject_rate=0.0,
    )
    summary = embed_catalog.run(options, ["--direct_num_workers=1"], make_handler=stub_handler)
    return {"images": summary["encoded_images"], "titles": summary["encoded_titles"]}


# --- a bare torch loop


def run_bare(job: Job) -> dict[str, Any]:
    """The encoders alone: everything that can be done before is done before."""
    from benchmarks.bare_encoders import best_images, best_titles

    image, text = job.specs()
    rows = pq.read_table(Path(job.data) / "catalog.parquet", columns=["title", "image_uri"]).to_pylist()[: job.limit]
    with ThreadPoolExecutor(4) as pool:
        patches = list(pool.map(lambda row: _patches(Path(job.data) / row["image_uri"], image), rows))
    pixels = np.concatenate(patches)
    titles = [normalise_title(row["title"]) for row in rows]
    image_seconds, image_variant, image_start = best_images(image, pixels, job.variants.get("images"))
    title_seconds, title_variant, title_start = best_titles(text, titles, job.variants.get("titles"))
    return {
        "seconds": image_seconds + title_seconds,
        "image_seconds": image_seconds,
        "title_seconds": title_seconds,
        "start_seconds": image_start + title_start,
        "images": len(rows),
        "variants": {"images": image_variant, "titles": title_variant},
    }


def _patches(path: Path, spec: ImageSpec) -> np.ndarray:
    from pipelines.patches import decode_image, grid_patches

    return grid_patches(decode_image(path.read_bytes(), spec.side).pixels, spec.grid, spec.patch_size)


# --- RunInference as its documentation has it


def run_plain(job: Job) -> dict[str, Any]:
    """Photo by photo and title by title, in fp32, eager: the pace between the first and the last one, for each encoder."""
    rows = pq.read_table(Path(job.data) / "catalog.parquet", columns=["title", "image_uri"]).to_pylist()[: job.limit]
    image, text = job.specs("fp32")
    from benchmarks.plain_runinference import time_images, time_titles

    image_pace = time_images(image, [str(Path(job.data) / row["image_uri"]) for row in rows])
    title_pace = time_titles(text, [row["title"] for row in rows])
    return {
        "seconds": (image_pace + title_pace) * len(rows),
        "image_seconds": image_pace * len(rows),
        "title_seconds": title_pace * len(rows),
        "images": len(rows),
    }


WAYS: dict[str, Callable[[Job], dict[str, Any]]] = {
    "whole": run_whole,
    "bare": run_bare,
    "plain": run_plain,
    "stub": run_stub,
}


def main(argv: list[str] | None = None) -> int:
    """Run the job of the first argument; print its result as one JSON line."""
    job = Job(**json.loads((sys.argv[1:] if argv is None else argv)[0]))
    print(json.dumps(WAYS[job.way](job)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
