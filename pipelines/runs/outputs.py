"""Check who owns an output.

It says what camenn may write into, and which names in it are its own.

An output (a store, a shard set, models or scores) is a directory of its own. `.camenn` in it, in
each run and in each generation of embeddings says that camenn made the directory: `camenn gc`
removes nothing from any other.
"""

import contextlib
import os
import re
from collections.abc import Iterator, Mapping

from camenn_model.integrity import DamagedError
from pipelines.io import files
from pipelines.io.lease import Writer
from pipelines.runs.manifest import CONTENTS, read_pointer
from pipelines.runs.store import IMAGES, TITLES
from schemas.errors import InputError
from schemas.manifest import LATEST, PUBLISHED, RUNS

CHECKPOINTS = "checkpoints"
GENERATION = re.compile(r"[0-9a-f]{16}")
"""An encoder's fingerprint: folder of `images` and `titles`"""

_ENTRIES = {RUNS, IMAGES, TITLES, CONTENTS, PUBLISHED, CHECKPOINTS, LATEST}
_LEFT_BEHIND = re.compile(r"nan-step-\d+-\d+\.json|.*\.damaged|latest\.json\.[0-9a-f]{32}\.tmp")
"""What a stopped training, a repair and a killed publication leave there"""


@contextlib.contextmanager
def hold_output(root: str, flag: str, stage: str, inputs: Mapping[str, str | None]) -> Iterator[Writer]:
    """Hold an output for one run of a stage.

    It is held for as long as the block takes. What is yielded is to be checked before anything is
    removed or published.

    Args:
        root: of the output.
        flag: that names it, for messages.
        stage: that writes there.
        inputs: flag -> what the stage reads. None of them may be the output.

    Raises:
        InputError: the directory is one of the inputs, holds files that are not camenn's, or is
            another stage's.
        InUseError: another process writes there.
    """
    check_output(root, flag, stage, inputs)
    with files.single_writer(root) as writer:
        files.mark_own(root)
        yield writer


def check_output(root: str, flag: str, stage: str, inputs: Mapping[str, str | None]) -> None:
    """Check that a stage may write into a directory.

    See `hold_output`.
    """
    for name, path in inputs.items():
        if path is not None and _same(root, path):
            raise InputError(
                f"{flag} {root}: is also {name}. An output needs a directory of its own, such "
                f"as {files.join(root, stage)}."
            )
    foreign = find_foreign(root)
    if foreign:
        more = f" and {len(foreign) - 1:,} more" if len(foreign) > 1 else ""
        raise InputError(
            f"{flag} {root}: holds {foreign[0]}{more}, which camenn did not write. An output "
            "needs a directory of its own: "
            f"give another one, such as {files.join(root, stage)}, or move these away."
        )
    try:
        pointer = read_pointer(root)
    except DamagedError:
        # The stage itself reports it, with what to do.
        return
    if pointer is not None and pointer["stage"] != stage:
        raise InputError(
            f"{flag} {root}: holds the output of `camenn {pointer['stage']}`, not of `camenn "
            f"{stage}`. Give another directory."
        )


def _same(one: str, other: str) -> bool:
    if files.is_local(one) and files.is_local(other):
        return os.path.realpath(one) == os.path.realpath(other)
    return one.rstrip("/") == other.rstrip("/")


def find_foreign(root: str) -> list[str]:
    """List what in an output is not camenn's.

    Paths are relative, in order. Hidden files do not count.

    Of an object store nothing is listed: its folders are only beginnings of names.
    """
    if not files.is_local(root) or not os.path.isdir(root):
        return []
    found = []
    for name in _visible(root):
        if name not in _ENTRIES and not _LEFT_BEHIND.fullmatch(name):
            found.append(name)
        elif name in (IMAGES, TITLES):
            # A data directory may have folders of these names: photos lie in them, or in folders below.
            for inner in _visible(os.path.join(root, name)):
                folder = os.path.join(root, name, inner)
                if not os.path.isdir(folder) or not (GENERATION.fullmatch(inner) or files.is_own(folder)):
                    found.append(f"{name}/{inner}")
    return found


def _visible(directory: str) -> list[str]:
    if not os.path.isdir(directory):
        return []
    return sorted(name for name in os.listdir(directory) if not name.startswith("."))
