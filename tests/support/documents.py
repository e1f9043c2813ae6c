"""Edit the JSON documents of an output for a test, with a matching checksum."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from camenn_model.integrity import CHECKSUM, dump_document, file_sha256
from pipelines.io import files


def edit_document(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Let `change` edit a document's object in place, and write it with its new checksum."""
    value = dict(files.read_json(str(path)))
    value.pop(CHECKSUM, None)
    change(value)
    path.write_bytes(dump_document(value))


def vouch_for(path: Path) -> None:
    """Update the manifest of a file's run to the file's present content."""
    directory = next(parent for parent in path.parents if (parent / "manifest.json").exists())

    def change(manifest: dict[str, Any]) -> None:
        for table in manifest["tables"].values():
            for entry in table["files"]:
                if Path(entry["path"]).name == path.name:
                    entry.update(bytes=path.stat().st_size, sha256=file_sha256(path))

    edit_document(directory / "manifest.json", change)
