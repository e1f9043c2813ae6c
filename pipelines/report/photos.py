"""Photos for the report.

They are small JPEGs inside the page, or the reason why there is none.
"""

import base64
import io
from dataclasses import dataclass

from PIL import Image

from pipelines.inputs.photo_files import PhotoFiles
from pipelines.inputs.photos import Defect, decode_image
from pipelines.io.files import is_local

SIDE = 168
"""px of the longer side of a thumbnail: shown at about 120 px, a little more for dense screens."""

_QUALITY = 80


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

    def find(self, uri: str | None) -> Photo:
        """Make the thumbnail of one photo.

        Where it cannot be shown, the reason is given. Only local files are opened.
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

    def _make(self, uri: str) -> Photo:
        if self.files is None:
            return Photo(reason="photo folder not known")
        try:
            path = self.files.resolve(uri)
            if not is_local(path):
                return Photo(reason="photo is not on this machine")
            return Photo(source=thumbnail(self.files.read(path)))
        except FileNotFoundError:
            return Photo(reason="file not found")
        except Defect as defect:
            return Photo(reason=defect.reason.replace("_", " "))
        except OSError as error:
            return Photo(reason=f"cannot be read: {error.strerror}")


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
