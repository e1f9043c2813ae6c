"""Named arrays in one safetensors file.

A package holds them beside the model's weights.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from schemas.errors import InputError


def write_arrays(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write all of them, in C order."""
    save_file({name: np.ascontiguousarray(value) for name, value in arrays.items()}, path)


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Read what `write_arrays` wrote.

    Raises:
        InputError: the file is missing or damaged.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{path}: cannot be read as safetensors ({error}): an earlier version of camenn "
            "trained this model, or the file is damaged. Run `camenn train` again."
        ) from error
