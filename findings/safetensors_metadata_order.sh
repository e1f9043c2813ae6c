#!/usr/bin/env bash
# safetensors writes the entries of `metadata` in an order of its own, another one at each call: with two entries or more the same tensors
# and metadata give other bytes each time, so a file's hash cannot tell whether two models are equal. With one entry the bytes are always the same.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/env"
"$here/env/bin/pip" install --quiet --disable-pip-version-check safetensors==0.8.0 numpy==2.4.6
"$here/env/bin/python" - <<'PY'
import hashlib
import numpy as np, safetensors
from safetensors.numpy import save

tensors = {"a": np.arange(6, dtype=np.float32)}


def distinct(entries: int) -> int:
    metadata = {f"key{n}": "value" for n in range(entries)}
    return len({hashlib.sha256(save(tensors, metadata=metadata)).hexdigest() for _ in range(200)})


found = {entries: distinct(entries) for entries in (0, 1, 2, 4)}
print("safetensors", safetensors.__version__, "distinct files of 200, by entries of metadata:", found)
assert found[0] == found[1] == 1 and found[2] == 2 and found[4] > 10, "this has changed"
PY
echo "as found"
