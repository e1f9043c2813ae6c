"""The embedding store.

It has one row per distinct photo or title under one encoder fingerprint, and one row per listing
with the contents that it refers to.
"""

import pyarrow as pa

from schemas.contract import Column, Contract, text_column

SHAPE_KEY = b"camenn.shape"
"""Field metadata of an `embedding` column: the array's shape, comma separated; values are
little-endian float16, row major.
"""
KERNELS_KEY = b"camenn.kernels"
"""Field metadata of an `embedding` column: the kernels that computed it, as in
`eager-bf16-batch64`; other kernels differ in the last bits.
"""

ROW_GROUP_COLUMN = "row_group"


def _embedding_column(shape: tuple[int, int], doc: str) -> Column:
    return Column(
        name="embedding", type=pa.binary(shape[0] * shape[1] * 2), doc=f"{doc}, float16 [{shape[0]}, {shape[1]}]"
    )


def image_embeddings(patches: int, width: int) -> Contract:
    """Make the contract of the photo embeddings.

    They are `patches` rows of `width` float16 each, patches row by row from the top left.
    """
    return Contract(
        name="image_embeddings",
        doc="One row per distinct photo.",
        key=("image_key",),
        columns=(
            text_column("image_key", "content hash of the encoded photo's bytes"),
            _embedding_column((patches, width), "patch features"),
            Column(name="blur", type=pa.float32(), doc="variance of the Laplacian of the grey photo; low = blurred"),
            Column(name="luminance", type=pa.float32(), doc="mean luminance, 0 (black) to 1 (white)"),
            Column(name="width", type=pa.int32(), doc="width of the original, px"),
            Column(name="height", type=pa.int32(), doc="height of the original, px"),
        ),
    )


def title_embeddings(tokens: int, width: int) -> Contract:
    """Make the contract of the title embeddings.

    They are `tokens` rows of `width` float16, zero beyond the title's own tokens.
    """
    return Contract(
        name="title_embeddings",
        doc="One row per distinct title.",
        key=("title_key",),
        columns=(
            text_column("title_key", "content hash of the normalised title"),
            _embedding_column((tokens, width), "last hidden states of the text encoder"),
            Column(name="tokens", type=pa.int32(), doc="tokens in use, special ones such as [CLS] and [SEP] included"),
            Column(
                name="unknown_share", type=pa.float32(), doc="share of words that the vocabulary does not know, 0 to 1"
            ),
        ),
    )


def embedding_keys(embeddings: Contract) -> Contract:
    """Make the contract of the keys files beside the embeddings.

    They hold all of a part's columns but the embedding, so that reading what is stored is cheap.
    """
    group = Column(name=ROW_GROUP_COLUMN, type=pa.int32(), doc="row group of the part that has the row, from 0")
    return Contract(
        name=keys_table(embeddings.name),
        doc=f"`{embeddings.name}` without the embeddings: a small file beside each of its files.",
        key=embeddings.key,
        columns=(*(column for column in embeddings.columns if column.name != "embedding"), group),
    )


def keys_table(embeddings: str) -> str:
    """Return the table of keys files beside `embeddings`."""
    return embeddings.replace("_embeddings", "_keys")


EMBEDDED_ITEMS = Contract(
    name="items",
    doc="One row per listing that was embedded: which photo and which title it has.",
    key=("item_id",),
    columns=(
        text_column("item_id", "listing of the catalog"),
        text_column("title_key", "its title in the title embeddings; null = no title", nullable=True),
        text_column("image_key", "its photo in the image embeddings; null = none that could be read", nullable=True),
        text_column("image_uri", "the photo's address as the catalog has it", nullable=True),
        Column(name="image_size", type=pa.int64(), doc="bytes of the photo when it was read", nullable=True),
        Column(
            name="image_mtime",
            type=pa.float64(),
            doc="modification time of the photo when it was read, s since 1970",
            nullable=True,
        ),
        text_column(
            "image_version",
            "version of the photo's object in its store (ETag or generation) when it was read; null = a local file",
            nullable=True,
            optional=True,
        ),
        text_column("image_defect", "reason why there is no photo, where there should be one", nullable=True),
        text_column("image_defect_detail", "the same for a person", nullable=True),
    ),
)


def embedding_shape(schema: pa.Schema) -> tuple[int, int]:
    """Return the shape of a stored file's `embedding` column.

    It is read from the column's metadata.
    """
    text = (schema.field("embedding").metadata or {})[SHAPE_KEY].decode()
    rows, width = text.split(",")
    return int(rows), int(width)


def stamp_embeddings(table: pa.Table, shape: tuple[int, int], kernels: str) -> pa.Table:
    """Write `shape` and `kernels` into the `embedding` column's metadata."""
    index = table.schema.get_field_index("embedding")
    metadata = {SHAPE_KEY: f"{shape[0]},{shape[1]}".encode(), KERNELS_KEY: kernels.encode()}
    return table.cast(table.schema.set(index, table.schema.field(index).with_metadata(metadata)))
