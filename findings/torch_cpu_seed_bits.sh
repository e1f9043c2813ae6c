#!/usr/bin/env bash
# torch's CPU generator takes the low 32 bits of a seed alone, though torch.manual_seed takes 64 and initial_seed() gives all of them back: seeds that are
# spaced by shifts beyond bit 32 (rank << 40, say) draw the same numbers on every rank. numpy's generators use all bits.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/env"
"$here/env/bin/pip" install --quiet --disable-pip-version-check torch==2.15.0 numpy==2.4.6
"$here/env/bin/python" - <<'PY'
import numpy as np
import torch


def draws(seed: int) -> tuple[float, ...]:
    torch.manual_seed(seed)
    assert torch.initial_seed() == seed
    return tuple(torch.rand(4).tolist())


same = {bit: draws(5) == draws(5 + (1 << bit)) for bit in (20, 31, 32, 40, 62)}
numpys = {bit: float(np.random.default_rng(5).random()) == float(np.random.default_rng(5 + (1 << bit)).random()) for bit in (31, 32, 40)}
print("torch", torch.__version__, "the same draws although this bit of the seed differs:", same)
print("numpy", np.__version__, numpys)
assert same == {20: False, 31: False, 32: True, 40: True, 62: True} and not any(numpys.values()), "this has changed"
PY
echo "as found"
