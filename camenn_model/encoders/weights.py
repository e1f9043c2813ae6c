"""Places and hashes of encoders' weights, without torch.

What cannot be had is an error that names the flag and the remedy.
"""

import hashlib
import json
import mmap
import re
import struct
from pathlib import Path
from typing import Any

from schemas.errors import InputError

IMAGE_FLAG, MODEL_FLAG, TEXT_FLAG = "--image_weights", "--image_model", "--text_encoder"

_IMAGE_FILES = ("config.json", "model.safetensors")
_HUB_TIMEOUT_S = 5


class WeightsError(InputError):
    """An encoder cannot be had as asked.

    The message names the flag and the remedy, and nothing takes its place.
    """


def _safetensors_error(path: Path, flag: str) -> WeightsError:
    return WeightsError(f"{flag}: {path} is not a whole safetensors file. Fetch it again, or name another one.")


def hash_safetensors(path: Path, flag: str) -> str:
    """Hash the tensors of a safetensors file.

    Returns the sha256 (hex) over names, types, shapes and bytes of the tensors, ordered by name.
    The file's layout is no matter.

    Raises:
        WeightsError: the file is cut off or of another format.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
            (length,) = struct.unpack_from("<Q", data)
            header = json.loads(data[8 : 8 + length])
            tensors: dict[str, dict[str, Any]] = {key: value for key, value in header.items() if key != "__metadata__"}
            for key, tensor in sorted(tensors.items()):
                begin, end = (8 + length + offset for offset in tensor["data_offsets"])
                if end > len(data):
                    raise _safetensors_error(path, flag)
                digest.update(f"{key}:{tensor['dtype']}:{tensor['shape']}\n".encode())
                with memoryview(data) as view, view[begin:end] as piece:
                    digest.update(piece)
    except (struct.error, ValueError, KeyError, AttributeError) as error:
        raise _safetensors_error(path, flag) from error
    return digest.hexdigest()


def fetch_from_hub(name: str, files: tuple[str, ...], flag: str) -> Path:
    """Return the directory of a hub model's files.

    They are downloaded or come from the hub's local cache.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError

    try:
        # One listing of the model, not one request per file: without a network this fails at once instead of retrying.
        return Path(snapshot_download(name, allow_patterns=list(files), etag_timeout=_HUB_TIMEOUT_S))
    except (OSError, ValueError, HTTPError) as error:
        raise WeightsError(
            f"{flag} {name}: neither a local path nor to be had from the hub ({type(error).__name__}: "
            f"{str(error).splitlines()[0]}). Fetch it on a machine with a network and give its local path: {flag} PATH."
        ) from error


def file_in(directory: Path, name: str, flag: str) -> Path:
    """Return a file of a model's directory.

    Raises:
        WeightsError: it is not there.
    """
    path = directory / name
    if not path.is_file():
        raise WeightsError(
            f"{flag}: {directory} holds no {name}. Name a directory or hub model that has one (pickled "
            "weights are not read)."
        )
    return path


def random_seed(source: str) -> int | None:
    """Return the SEED of `random:SEED`.

    It is None for any other source.

    Raises:
        WeightsError: the seed is not a whole number of 0 or more.
    """
    if not source.startswith("random:"):
        return None
    seed = source.removeprefix("random:")
    if not re.fullmatch(r"\d{1,9}", seed):
        raise WeightsError(f"{IMAGE_FLAG} {source}: the seed must be a whole number, as in random:7.")
    return int(seed)


def looks_local(source: str) -> bool:
    """Tell whether a source was meant as a path."""
    return source.startswith((".", "/", "~")) or source.endswith(".safetensors") or source.count("/") > 1


def find_image_weights(source: str) -> Path:
    """Find the .safetensors file of an image encoder.

    The source is a hub name, a local file or a local directory with `model.safetensors`.

    Raises:
        WeightsError: nothing of that kind is there, or the hub cannot be reached.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return file_in(path, "model.safetensors", IMAGE_FLAG)
    if path.is_file():
        if path.suffix != ".safetensors":
            raise WeightsError(
                f"{IMAGE_FLAG} {source}: not a .safetensors file (pickled weights are not read). Convert it, "
                "or name another one."
            )
        return path
    if looks_local(source):
        raise WeightsError(
            f"{IMAGE_FLAG} {source}: no such file. Give a .safetensors file, a directory with "
            "model.safetensors, a hub name, or random:SEED."
        )
    name = source if "/" in source else f"timm/{source}"
    return file_in(fetch_from_hub(name, _IMAGE_FILES, IMAGE_FLAG), "model.safetensors", IMAGE_FLAG)


def image_config(source: str, weights: Path | None) -> dict[str, Any]:
    """Read timm's `config.json` beside the weights.

    Directories and hub models may have it. It is {} where there is none, and of a file that is
    named itself: what lies beside it may be of another model.

    Raises:
        WeightsError: it cannot be read.
    """
    if weights is None or Path(source).expanduser().is_file() or not (weights.parent / "config.json").is_file():
        return {}
    return read_config(weights.parent / "config.json", IMAGE_FLAG)


def read_config(file: Path, flag: str) -> dict[str, Any]:
    """Read a model's `config.json`.

    Raises:
        WeightsError: it is no JSON object.
    """
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise WeightsError(f"{flag}: {file} is not JSON ({error}). Fetch it again.") from error
    if not isinstance(config, dict):
        raise WeightsError(f"{flag}: {file} holds no JSON object. Fetch it again.")
    return config
