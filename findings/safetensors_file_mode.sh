#!/usr/bin/env bash
# safetensors writes files that only their owner can read, whatever the umask: a model that one user trains cannot be opened by another,
# while the tables beside it can. numpy, pyarrow and torch.save follow the umask.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/env"
"$here/env/bin/pip" install --quiet --disable-pip-version-check safetensors==0.8.0 numpy==2.4.6
umask 022
"$here/env/bin/python" - "$here" <<'PY'
import os, stat, sys
import numpy as np, safetensors
from safetensors.numpy import save, save_file

where = sys.argv[1]
array = np.arange(6, dtype=np.float32)
save_file({"a": array}, f"{where}/by_save_file.safetensors")
with open(f"{where}/by_hand.safetensors", "wb") as handle:
    handle.write(save({"a": array}))
np.save(f"{where}/by_numpy.npy", array)
modes = {name: oct(stat.S_IMODE(os.stat(f"{where}/{name}").st_mode)) for name in sorted(os.listdir(where)) if name.startswith("by_")}
print("safetensors", safetensors.__version__, "umask 022:", modes)
assert modes == {"by_hand.safetensors": "0o644", "by_numpy.npy": "0o644", "by_save_file.safetensors": "0o600"}, "this has changed"
PY
echo "as found"
