#!/usr/bin/env bash
# google-cloud-storage 3.17: beside the first request for an object, a background thread sends GET /b/BUCKET, which nobody asked for: metadata of the
# bucket for traces of OpenTelemetry, also where no tracing is set up. It needs storage.buckets.get, which a role for objects alone lacks, and
# every client pays for it once a bucket. DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA=true leaves it out.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/env"
"$here/env/bin/pip" install --quiet --disable-pip-version-check google-cloud-storage==3.17.1
cat >"$here/look.py" <<'PY'
import http.server
import json
import os
import threading
import time

from google.cloud import storage

asked = []


class Store(http.server.BaseHTTPRequestHandler):
    """A bucket that takes any object."""

    def answer(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        asked.append(f"{self.command} {self.path.partition('?')[0]}")
        data = json.dumps({"name": "a", "bucket": "shop", "generation": "1", "location": "EU", "projectNumber": "1"}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = answer

    def log_message(self, *words):
        pass


server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Store)
threading.Thread(target=server.serve_forever, daemon=True).start()
os.environ["STORAGE_EMULATOR_HOST"] = f"http://127.0.0.1:{server.server_address[1]}"
storage.Client.create_anonymous_client().bucket("shop").blob("a").upload_from_string("text", checksum=None)
time.sleep(2)
print("google-cloud-storage", storage.__version__, sorted(asked))
bucket = [request for request in asked if request.endswith("/b/shop")]
assert len(bucket) == (0 if os.environ.get("DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA") else 1), "this has changed"
PY
"$here/env/bin/python" "$here/look.py"
DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA=true "$here/env/bin/python" "$here/look.py"
echo "as found"
