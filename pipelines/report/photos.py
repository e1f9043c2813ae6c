"""Photos for the report.

They are small JPEGs inside the page, or the reason why there is none.
"""

import base64
import io
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from PIL import Image

from pipelines.inputs.photo_files import PhotoFiles
from pipelines.inputs.photos import Defect, decode_image
from pipelines.io.files import is_local
from pipelines.runner.log import stage_logger
from schemas.errors import InputError

SIDE = 168
"""px of the longer side of a thumbnail: shown at about 120 px, a little more for dense screens."""

_QUALITY = 80
_THREADS = 8
"""That read photos of an object store at once"""


@dataclass(frozen=True)
class Photo:
    """A thumbnail as a data URI.

    Where it is '', `reason` gives the cause in a few words.
    """

    source: str = ""
    reason: str = ""


class Photos:
    """A maker of thumbnails of a catalog's photos, each once.

    Args:
        image_root: directory that image_uri is relative to. None where it is not known.
        allow_absolute: whether an image_uri may be an absolute path or leave `image_root`.
    """

    def __init__(self, image_root: str | None, allow_absolute: bool) -> None:
        self.files = None if image_root is None else PhotoFiles(image_root, allow_absolute)
        self.made: dict[str, Photo] = {}
        self.unreachable = False
        """Whether the photos' store failed: it is not asked again, as each time takes long"""

    def read_ahead(self, uris: Iterable[str | None]) -> None:
        """Make thumbnails of photos on object stores, several at once."""
        wanted = sorted({uri for uri in uris if uri is not None and uri.strip()} - set(self.made))
        remote = [uri for uri in wanted if self._is_remote(uri)]
        with ThreadPoolExecutor(_THREADS) as pool:
            self.made.update(zip(remote, pool.map(self._make, remote), strict=True))

    def find(self, uri: str | None) -> Photo:
        """Make the thumbnail of one photo.

        Where it cannot be shown, the reason is given.
        """
        if uri is None or not uri.strip():
            return Photo(reason="no photo")
        if uri not in self.made:
            self.made[uri] = self._make(uri)
        return self.made[uri]

    def shown(self) -> int:
        """Count the distinct photos that could be shown."""
        return sum(bool(photo.source) for photo in self.made.values())

    def failed(self) -> int:
        """Count the distinct photos that could not be shown."""
        return len(self.made) - self.shown()

    def _is_remote(self, uri: str) -> bool:
        try:
            return self.files is not None and not is_local(self.files.resolve(uri))
        except Defect:
            return False

    def _make(self, uri: str) -> Photo:
        if self.files is None:
            return Photo(reason="photo folder not known")
        try:
            path = self.files.resolve(uri)
            if self.unreachable and not is_local(path):
                return Photo(reason="photo store cannot be read")
            return Photo(source=thumbnail(self.files.read(path)))
        except FileNotFoundError:
            return Photo(reason="file not found")
        except Defect as defect:
            return Photo(reason=defect.reason.replace("_", " "))
        except OSError as error:
            return Photo(reason=f"cannot be read: {error.strerror}")
        except InputError as error:
            if not self.unreachable:
                stage_logger("report").warning("photos are not shown: %s", error)
            self.unreachable = True
            return Photo(reason="photo store cannot be read")


def thumbnail(data: bytes) -> str:
    """Convert a photo into a small JPEG data URI.

    It is upright and has its own aspect ratio.

    Raises:
        ImageDefect: the bytes are no photo.
    """
    decoded = decode_image(data, SIDE)
    scale = SIDE / max(decoded.width, decoded.height)
    size = max(1, round(decoded.width * scale)), max(1, round(decoded.height * scale))
    buffer = io.BytesIO()
    Image.fromarray(decoded.pixels).resize(size, Image.Resampling.LANCZOS).save(
        buffer, "JPEG", quality=_QUALITY, optimize=True
    )
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
