"""Hold a finished run against thresholds before readers see it."""

from dataclasses import asdict, dataclass
from typing import Any

LEAST_FOUND = 0.9
"""Of what moves more: pairs (listings and audience rows may each lack 2 %, and shops differ in size), photos that are
uploaded again, categories that are renamed, people who come and go."""
NEARLY_NONE = 0.05
LEAST_ROWS = 20
"""Where nothing was published before: of so many rows, so small a share that is found is no ordinary night. Of fewer
rows, chance alone may leave none."""
MOST_PSI = 0.2


@dataclass(frozen=True)
class Gate:
    """One comparison. `words`: what was found, and what was allowed."""

    name: str
    passed: bool
    words: str

    def to_json(self) -> dict[str, Any]:
        """Return the gate as a manifest keeps it."""
        return asdict(self)


def hold_photos(kept: int, had: int) -> Gate:
    """Hold an embedding run's photos against the published one's.

    `kept` of the `had` listings that had a photo and are still there have one now. One that is lost
    is no share that is not mounted, however few there are.
    """
    share = kept / had if had else 1.0
    words = (
        f"{kept:,} of {had:,} listings that had a photo in the run published last have one now, "
        f"{share:.3f} of them; at least {LEAST_FOUND} are due"
    )
    return Gate("photos_kept", share >= LEAST_FOUND or had - kept <= 1, words)
