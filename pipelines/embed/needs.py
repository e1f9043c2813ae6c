"""Compute the needs of a worker of `camenn embed`.

They are what it downloads, keeps on disk and holds in memory.
"""

from collections.abc import Mapping
from pathlib import Path

from camenn_model.encoders.spec import EncoderSpec
from pipelines.embed.encode import CHUNK
from pipelines.embed.options import STAGE, EmbedOptions
from pipelines.runner.machine_needs import MachineNeeds


def worker_needs(options: EmbedOptions, photos: Mapping[str, int], threads: int) -> MachineNeeds:
    """Compute the needs of the workers.

    They are those of all together, and of a process with so many threads.

    `photos`: bytes of those that are read to know them, and of those that are read again to be
    encoded.
    """
    weights = sum(map(weights_bytes, (options.image, options.text)))
    # A chunk's embeddings, float16, and their Arrow table.
    chunk = max(2 * 2 * CHUNK * spec.shape[0] * spec.shape[1] for spec in (options.image, options.text))
    return MachineNeeds(
        stage=STAGE,
        threads=threads,
        together=photos,
        in_image=weights,
        held={"weights": weights},
        each_thread={"chunk": chunk},
        lacks="activations",
    )


def weights_bytes(spec: EncoderSpec) -> int:
    """Return the bytes of an encoder's weights.

    They are 0 where they are drawn at random.
    """
    if not spec.path:
        return 0
    path = Path(spec.path)
    return sum(each.stat().st_size for each in (path.glob("*.safetensors") if path.is_dir() else [path]))
