"""Find the folder in which a training keeps its checkpoints."""

import shutil
from pathlib import Path


class Checkpoints:
    """The checkpoints of one output, on this machine.

    A subclass keeps further copies elsewhere.

    Args:
        directory: that they are written to. It is made when there is one.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @property
    def path(self) -> Path:
        """Return the path of the latest checkpoint."""
        return self.directory / "main.safetensors"

    def saved(self) -> None:
        """Take note of a checkpoint that was just written."""

    def finished(self) -> None:
        """Take note that the package is written."""
        self.discard()

    def discard(self) -> None:
        """Remove them: nothing will go on from them."""
        shutil.rmtree(self.directory, ignore_errors=True)
