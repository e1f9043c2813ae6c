"""The options of one run of `camenn embed`."""

from dataclasses import dataclass

from camenn_model.encoders.spec import ImageSpec, TextSpec
from pipelines.embed.handlers import MakeHandler, chunk_handler
from pipelines.io.tables import Source
from pipelines.runs.store import IMAGES, Part, generation
from schemas.contract import Contract
from schemas.embeddings import image_embeddings, title_embeddings

STAGE = "embed"
ROWS_PER_BUCKET = 16_384


@dataclass(frozen=True, kw_only=True)
class EmbedOptions:
    """One embed run, resolved."""

    data: str
    store: str
    image_root: str
    allow_absolute: bool
    image: ImageSpec
    text: TextSpec
    max_reject_rate: float
    accelerator: str | None = None
    """Dataflow's accelerator for the encoder steps. It changes no row"""


def store_place(options: EmbedOptions, kind: str) -> tuple[str, Contract]:
    """Return one kind's directory and contract in the store.

    They are those of the kind's generation.
    """
    spec = options.image if kind == IMAGES else options.text
    contract = image_embeddings(*spec.shape) if kind == IMAGES else title_embeddings(*spec.shape)
    return generation(options.store, kind, spec.fingerprint), contract


@dataclass(frozen=True, kw_only=True)
class EmbedJob:
    """One job of the stage.

    With `plan` it ends where encoding would begin.
    """

    options: EmbedOptions
    source: Source
    previous: Source | None
    stored: dict[str, list[Part]]
    """Kind -> the store's committed parts"""
    photo_listing: str | None
    """File of `list_photos`, if the image root was listed"""
    run_directory: str
    progress: str | None
    threads: int | None
    make_handler: MakeHandler = chunk_handler
    plan: bool = False

    @property
    def run(self) -> str:
        """Return the name of the run."""
        return self.run_directory.rsplit("/", 1)[-1]

    @property
    def buckets(self) -> int:
        """Return the buckets for contents and listings.

        Contents and listings are shuffled into them.
        """
        return max(1, -(-self.source.rows // ROWS_PER_BUCKET))

    def spec(self, kind: str) -> ImageSpec | TextSpec:
        """Return the spec of one kind's encoder."""
        return self.options.image if kind == IMAGES else self.options.text
