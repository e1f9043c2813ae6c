"""The load that `camenn embed` puts on one GPU.

    python -m benchmarks.speed.embed_gpu --photos DIR --image_weights FILE --text_encoder DIR

It measures images a second, utilisation, and the share of the bf16 matrix ceiling measured in the
same run.

Where there is no CUDA device, it reports so and measures nothing.
"""

import argparse
import json
import platform
import shutil
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.speed.embed_loops import Job, run_whole
from benchmarks.support.gpu import matrix_ceiling, watch_utilisation
from benchmarks.support.listings import make_listings
from camenn_model.encoders.inception_v4 import InceptionV4Encoder
from camenn_model.encoders.spec import ImageSpec


def patch_flops(encoder: InceptionV4Encoder) -> int:
    """Count the floating-point operations of one patch.

    They are counted in a forward pass.
    """
    size = encoder.spec.patch_size
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        encoder.model(torch.zeros(2, 3, size, size, device=encoder.spec.device))
    return counter.get_total_flops() // 2


def bare_pace(encoder: InceptionV4Encoder, photos: int) -> float:
    """Return photos a second of the encoder alone.

    It runs over patches in memory.
    """
    spec = encoder.spec
    patches = torch.randint(
        0, 255, (spec.batch_size * 8, spec.patch_size, spec.patch_size, 3), dtype=torch.uint8
    ).numpy()
    encoder.encode(patches)
    rounds = max(1, photos * spec.shape[0] // len(patches))
    started = time.monotonic()
    for _ in range(rounds):
        encoder.encode(patches)
    return rounds * len(patches) / spec.shape[0] / (time.monotonic() - started)


def measure(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Measure one run of the whole stage, and the ceilings."""
    data = work / f"listings-{arguments.items}"
    make_listings(data, arguments.items, arguments.photos)
    job = Job(
        way="whole",
        data=str(data),
        out=str(work / "measured" / "store"),
        image_weights=arguments.image_weights,
        text_encoder=arguments.text_encoder,
        device="cuda",
        compile="off",
    )
    spec: ImageSpec = job.specs()[0]
    encoder = InceptionV4Encoder(spec)
    ceiling, flops, bare = matrix_ceiling(), patch_flops(encoder), bare_pace(encoder, arguments.items)
    del encoder
    shutil.rmtree(work / "measured", ignore_errors=True)
    samples: list[float] = []
    with watch_utilisation(samples):
        result = run_whole(job)
    pace = result["images"] / result["seconds"]
    busy = [percent for percent in samples if percent]
    return {
        "vs_bare_gpu": round(pace / bare, 4),
        "images_per_second": round(pace, 1),
        "bare_images_per_second": round(bare, 1),
        "share_of_matrix_ceiling": round(pace * spec.shape[0] * flops / ceiling, 4),
        "bare_share_of_matrix_ceiling": round(bare * spec.shape[0] * flops / ceiling, 4),
        "utilisation": round(statistics.mean(busy) / 100, 3) if busy else None,
        "matrix_tflops": round(ceiling / 1e12, 1),
        "gflop_per_patch": round(flops / 1e9, 3),
        "start_seconds": round(result["start_seconds"], 1),
        "kernels": result["kernels"],
        "device": torch.cuda.get_device_name(),
    }


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the flags."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed.embed_gpu", description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("--photos", type=Path, help="folder of real JPEGs (default: the simulator draws some)")
    parser.add_argument("--image_weights", default="random:0", help="as for camenn embed (default %(default)s)")
    parser.add_argument("--text_encoder", required=True, help="BERT, as for camenn embed")
    parser.add_argument("--items", type=int, default=20_480, help="listings (default %(default)s)")
    parser.add_argument("--work", type=Path, help="directory kept for the next time (default: a temporary one)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Measure, and print one JSON line."""
    arguments = build_parser().parse_args(argv)
    if not torch.cuda.is_available():
        print("embed_gpu: no CUDA device here: nothing was measured. Run it on a machine with one.", file=sys.stderr)
        print(json.dumps({"device": None, "platform": platform.platform()}), flush=True)
        return 0
    with ExitStack() as stack:
        work = arguments.work or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="camenn-gpu-")))
        print(json.dumps(measure(arguments, work.absolute())), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
