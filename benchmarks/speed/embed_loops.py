"""One timed way of encoding a catalog, in one process.

    python -m benchmarks.speed.embed_loops JOB

JOB is a JSON job. It runs in a process of its own. The last line of stdout is the result.

There are these ways. `whole` is `camenn embed`. `plain` is a RunInference pipeline as Beam's
documentation would write it, one photo and one title an element, in fp32. `variants` finds the
fastest bare torch loop over patches and token ids in memory.

A shared machine may be three times slower from one minute to the next. Where `whole` and `plain`
are given a bare loop, they regularly stop their clock and let it encode the very same contents, so
that each is compared with it within seconds. Start-up (imports, loading, compiling) is kept apart.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from camenn_model.encoders.spec import ImageSpec, TextSpec
from camenn_model.hashing import normalise_title
from pipelines.embed import stage as embed_stage
from pipelines.embed.handlers import ImageChunk, ImageChunkHandler, TitleChunk, TitleChunkHandler
from pipelines.embed.options import EmbedOptions
from pipelines.inputs.photos import decode_image, grid_patches

PROCESS_STARTED = time.monotonic()


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run of a way."""

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
    single: str = ""
    """A catalog of one listing. The time of `whole` for it is start-up"""
    variants: dict[str, Any] = field(default_factory=dict)
    """The bare loops of `images` and `titles` to compare with ({} = none)"""

    def specs(self, precision: str | None = None) -> tuple[ImageSpec, TextSpec]:
        """Return the specs of both encoders."""
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


def _write(path: str, pair: tuple[float, float] | None, **seconds: float) -> None:
    """Add figures to a handler's file for the submitter.

    They are sums, and pairs of seconds. A file is needed as the runner copies handlers, and returns
    nothing.
    """
    found = json.loads(Path(path).read_text()) if Path(path).exists() else {"pairs": []}
    pairs = found["pairs"] + ([pair] if pair is not None else [])
    sums = {name: found.get(name, 0.0) + value for name, value in seconds.items()}
    Path(path).write_text(json.dumps(sums | {"pairs": pairs}))


class _Timed:
    """A timing base before a handler of the product.

    With its clock stopped, a bare loop encodes half of each chunk's contents ahead of it and half
    after it.
    """

    record: str
    variant: Sequence[Any] | None
    bare: Any = None

    def make_bare(self, model: Any, variant: tuple[str, int]) -> Any:
        """Make the bare loop."""
        raise NotImplementedError

    def given(self, chunk: Any, model: Any, half: slice) -> Any:
        """Return some contents as the bare loop takes them.

        They are contents of one chunk.
        """
        raise NotImplementedError

    def _bare_seconds(self, batch: Sequence[Any], model: Any, *, ahead: bool) -> float:
        """Time the bare loop over half of the contents."""
        if self.variant is None:
            return 0.0
        mode, size = self.variant
        self.bare = self.bare or self.make_bare(model, (mode, size))
        halves = [slice(None, len(chunk.keys) // 2) if ahead else slice(len(chunk.keys) // 2, None) for chunk in batch]
        return sum(self.bare.seconds(self.given(chunk, model, half)) for chunk, half in zip(batch, halves, strict=True))

    def run_inference(
        self, batch: Sequence[Any], model: Any, inference_args: dict[str, Any] | None = None
    ) -> Iterable[Any]:
        """Run the handler's own inference, timed."""
        handler: Any = super()
        begun = time.monotonic()
        encoder = model.get()
        stopped = time.monotonic()
        loading = stopped - begun
        if self.variant is not None:
            # The previous chunk may still be being written.
            time.sleep(0.2)
        bare = self._bare_seconds(batch, encoder, ahead=True)
        resumed, ready = time.monotonic(), encoder.start_seconds
        found = list(handler.run_inference(batch, model, inference_args))
        ended = time.monotonic()
        compiling = encoder.start_seconds - ready
        own = ended - resumed - compiling
        bare += self._bare_seconds(batch, encoder, ahead=False)
        contents = sum(len(chunk.keys) for chunk in batch) if bare else 0
        # Both are measured within seconds of each other: a machine that lends its cores elsewhere
        # for minutes does not distort the ratio.
        pair = (own, bare) if bare else None
        paused = resumed - stopped + time.monotonic() - ended
        _write(
            self.record,
            pair,
            start=loading + compiling,
            paused=paused,
            bare=bare,
            contents=contents,
            own=own,
        )
        return found


class _TimedImages(_Timed, ImageChunkHandler):
    def make_bare(self, model: Any, variant: tuple[str, int]) -> Any:
        from benchmarks.peers.bare_encoders import BareImages

        return BareImages(model, variant)

    def given(self, chunk: ImageChunk, model: Any, half: slice) -> Any:
        return _load_patches([str(uri) for uri in chunk.uris[half]], model.spec)


class _TimedTitles(_Timed, TitleChunkHandler):
    def make_bare(self, model: Any, variant: tuple[str, int]) -> Any:
        from benchmarks.peers.bare_encoders import BareTitles

        return BareTitles(model, variant)

    def given(self, chunk: TitleChunk, model: Any, half: slice) -> Any:
        from benchmarks.peers.bare_encoders import tokenise

        return tokenise(model, chunk.titles[half])


def _load_patches(paths: list[str], spec: ImageSpec) -> NDArray[np.uint8]:
    """Load the patches of photos, uint8 [n·P, s, s, 3]."""
    with ThreadPoolExecutor(4) as pool:
        photos = pool.map(lambda path: decode_image(Path(path).read_bytes(), spec.side).pixels, paths)
        return np.concatenate([grid_patches(pixels, spec.grid, spec.patch_size) for pixels in photos])


def run_whole(job: Job) -> dict[str, Any]:
    """Time `camenn embed` without its start-up.

    The time goes from its first read of the catalog to its publication, less the time in which its
    clock was stopped, and less start-up.

    Start-up is imports, loading, compiling, and a run over a single listing: building a pipeline,
    starting its steps, publishing.
    """
    imports = time.monotonic() - PROCESS_STARTED
    single = 0.0
    if job.single:
        alone = replace(job, data=job.single, out=f"{job.out}-single", compile="off", variants={})
        single, _, figures = _timed_run(alone)
        single -= sum(value["start"] for value in figures.values())
    seconds, summary, figures = _timed_run(job)
    start, paused = (sum(value[name] for value in figures.values()) for name in ("start", "paused"))
    bare = {
        kind: value["bare"] / value["contents"] * summary[f"encoded_{kind}"]
        for kind, value in figures.items()
        if value["contents"]
    }
    net = seconds - start - paused - single
    inside = sum(value["own"] for value in figures.values())
    by_chunk = {
        kind: statistics.median(own / bare for own, bare in value["pairs"])
        for kind, value in figures.items()
        if value["pairs"]
    }
    return {
        "seconds": net,
        "chunk_over_bare": by_chunk,
        "image_pairs": [[round(value, 2) for value in pair] for pair in figures.get("images", {}).get("pairs", [])],
        "share_in_encoders": inside / net,
        "bare_seconds": sum(bare.values()),
        "bare_by_encoder": bare,
        "start_seconds": imports + start + single,
        "single_listing_seconds": single,
        "images": summary["encoded_images"],
        "titles": summary["encoded_titles"],
        "kernels": summary["kernels"],
    }


def _timed_run(job: Job) -> tuple[float, dict[str, Any], dict[str, Any]]:
    """Run a job and time it.

    Returns (seconds, closing table, the handlers' figures).
    """
    image, text = job.specs()
    out = Path(job.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    records = {kind: f"{out}-{kind}.seconds" for kind in ("images", "titles")}
    options = EmbedOptions(
        data=job.data,
        store=job.out,
        image_root=job.data,
        allow_absolute=False,
        image=image,
        text=text,
        max_reject_rate=0.0,
    )

    def make(spec: ImageSpec | TextSpec, threads: int | None) -> Any:
        handler: _TimedImages | _TimedTitles
        if isinstance(spec, ImageSpec):
            kind, handler = "images", _TimedImages(spec, torch_threads=threads)
        else:
            kind, handler = "titles", _TimedTitles(spec, torch_threads=threads)
        handler.record, handler.variant = records[kind], job.variants.get(kind)
        return handler

    started = time.monotonic()
    summary = embed_stage.run(options, ["--direct_num_workers=1"], make_handler=make)
    seconds = time.monotonic() - started
    return (
        seconds,
        summary,
        {kind: json.loads(Path(path).read_text()) for kind, path in records.items() if Path(path).exists()},
    )


def run_stub(job: Job) -> dict[str, Any]:
    """Run `camenn embed` with stub encoders.

    Their embeddings are small. This is the pipeline alone, for its memory.
    """
    from benchmarks.support.stub_encoders import stub_handler, stub_specs

    image, text = stub_specs((4, 16), (8, 16))
    options = EmbedOptions(
        data=job.data,
        store=job.out,
        image_root=job.data,
        allow_absolute=False,
        image=image,
        text=text,
        max_reject_rate=0.0,
    )
    summary = embed_stage.run(options, ["--direct_num_workers=1"], make_handler=stub_handler)
    return {"images": summary["encoded_images"], "titles": summary["encoded_titles"]}


# --- a bare torch loop


def find_variants(job: Job) -> dict[str, Any]:
    """Find the fastest bare loop for each encoder.

    They are tried on some listings.
    """
    from benchmarks.peers.bare_encoders import IMAGE_VARIANTS, TITLE_VARIANTS, BareImages, BareTitles, fastest, tokenise
    from camenn_model.encoders.bert import BertEncoder
    from camenn_model.encoders.inception_v4 import InceptionV4Encoder

    image, text = job.specs()
    rows = pq.read_table(Path(job.data) / "catalog.parquet", columns=["title", "image_uri"]).to_pylist()[: job.limit]
    images = InceptionV4Encoder(replace(image, compile="off"))
    patches = _load_patches([str(Path(job.data) / row["image_uri"]) for row in rows], image)
    best_images, image_seconds = fastest({v: BareImages(images, v) for v in IMAGE_VARIANTS}, patches)
    titles = BertEncoder(text)
    blocks = tokenise(titles, [normalise_title(row["title"]) for row in rows])
    best_titles, title_seconds = fastest({v: BareTitles(titles, v) for v in TITLE_VARIANTS}, blocks)
    return {
        "variants": {"images": best_images, "titles": best_titles},
        "variant_seconds": {"images": image_seconds, "titles": title_seconds},
    }


# --- RunInference as its documentation has it


def run_plain(job: Job) -> dict[str, Any]:
    """Time photo by photo and title by title.

    It runs in fp32, eager. The pace is the one between the first and the last of them, for each
    encoder.
    """
    from benchmarks.peers.plain_runinference import time_images, time_titles

    rows = pq.read_table(Path(job.data) / "catalog.parquet", columns=["title", "image_uri"]).to_pylist()[: job.limit]
    image, text = job.specs("fp32")
    paths = [str(Path(job.data) / row["image_uri"]) for row in rows]
    fast = replace(job.specs()[0], compile="off")
    image_pace, bare_pace = time_images(image, paths, fast, job.variants["images"])
    title_pace = time_titles(text, [row["title"] for row in rows])
    return {
        "seconds": (image_pace + title_pace) * len(rows),
        "image_seconds": image_pace * len(rows),
        "bare_image_seconds": bare_pace * len(rows),
        "title_seconds": title_pace * len(rows),
        "images": len(rows),
    }


WAYS: dict[str, Callable[[Job], dict[str, Any]]] = {
    "whole": run_whole,
    "variants": find_variants,
    "plain": run_plain,
    "stub": run_stub,
}


def main(argv: list[str] | None = None) -> int:
    """Run the job of the first argument.

    Its result is printed as one JSON line.
    """
    job = Job(**json.loads((sys.argv[1:] if argv is None else argv)[0]))
    print(json.dumps(WAYS[job.way](job)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
