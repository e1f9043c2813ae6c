#!/usr/bin/env bash
# numpy 2.4: np.unique of two million distinct int64 keys takes some 15 times as long as sorting them and dropping repeats, which gives the same.
# Since 2.3 it fills a hash set and sorts what is in it. That pays where few values are distinct (half the time for a thousand), and not where most
# are: ids, hashes, times. sorted=False, which skips the sort, hardly helps. CPU seconds, one thread, medians of three.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/env"
"$here/env/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6
"$here/env/bin/python" - <<'PY'
import statistics
import time

import numpy as np


def by_sort(keys):
    ordered = np.sort(keys)
    return ordered[np.append(True, ordered[1:] != ordered[:-1])]


def seconds(work, keys):
    found = []
    for _ in range(3):
        started = time.process_time()
        work(keys)
        found.append(time.process_time() - started)
    return statistics.median(found)


distinct = np.random.default_rng(0).integers(0, 10**12, 2_000_000)
few = distinct % 1_000
for keys in (distinct, few):
    assert np.array_equal(np.unique(keys), by_sort(keys))
ratios = [seconds(np.unique, keys) / seconds(by_sort, keys) for keys in (distinct, few)]
print("numpy", np.__version__, "| np.unique over sorting: most distinct %.1f, a thousand values %.2f" % tuple(ratios))
assert ratios[0] > 3 and ratios[1] < 1, "this has changed"
PY
echo "as found"
