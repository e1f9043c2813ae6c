#!/usr/bin/env bash
# Beam's FileSystems.match leaves out what lies behind a symbolic link to a directory, without a word, where its pattern has `**`: a table whose partitions
# are linked together from several disks is read in part. pyarrow and glob follow such links.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/env"
"$here/env/bin/pip" install --quiet --disable-pip-version-check apache-beam==2.77.0 pyarrow==25.0.1
"$here/env/bin/python" - "$here/data" <<'PY'
import glob, os, sys
import apache_beam, pyarrow as pa, pyarrow.parquet as pq
from apache_beam.io.filesystems import FileSystems

root = sys.argv[1]
for day in ("clicks/day=1", "elsewhere"):
    os.makedirs(f"{root}/{day}")
    pq.write_table(pa.table({"a": [1]}), f"{root}/{day}/part-0.parquet")
os.symlink(f"{root}/elsewhere", f"{root}/clicks/day=2")
seen = len(FileSystems.match([f"{root}/clicks/**.parquet"])[0].metadata_list)
others = pq.read_table(f"{root}/clicks").num_rows, len(glob.glob(f"{root}/clicks/*/*.parquet"))
print(f"apache-beam {apache_beam.__version__}: {seen} of 2 partitions; pyarrow {pa.__version__} and glob: {others}")
assert seen == 1 and others == (2, 2), "this has changed"
PY
echo "as found"
