#!/usr/bin/env bash
# google-cloud-storage's list_blobs: whoever catches an error in the middle of a listing and asks the same iterator again gets no error but the end, as
# if the bucket held no more. Its pages come from a generator, which an exception finishes. The names after the failed page are missing without a word.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/env"
"$here/env/bin/pip" install --quiet --disable-pip-version-check google-cloud-storage==3.17.1
"$here/env/bin/python" - <<'PY'
import http.server
import json
import os
import threading
import urllib.parse

from google.api_core.exceptions import ServiceUnavailable
from google.cloud import storage

asked = []


class Store(http.server.BaseHTTPRequestHandler):
    """Two pages of a listing. The second one is answered by 503 once."""

    def do_GET(self):
        token = urllib.parse.parse_qs(urllib.parse.urlparse(self.path).query).get("pageToken", [""])[0]
        asked.append(token)
        names = {"": ["a", "b"], "2": ["c", "d"]}[token]
        busy = asked.count("2") == 1 and token == "2"
        body = {"items": [{"name": name, "bucket": "shop"} for name in names], **({} if token else {"nextPageToken": "2"})}
        data = json.dumps({"error": {"code": 503, "message": "busy"}} if busy else body).encode()
        self.send_response(503 if busy else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *words):
        pass


server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Store)
threading.Thread(target=server.serve_forever, daemon=True).start()
os.environ["STORAGE_EMULATOR_HOST"] = f"http://127.0.0.1:{server.server_address[1]}"
client = storage.Client.create_anonymous_client()

print("google-cloud-storage", storage.__version__)
blobs = iter(client.list_blobs("shop", retry=None))
found, errors = [], 0
while True:
    try:
        found.append(next(blobs).name)
    except StopIteration:
        break
    except ServiceUnavailable:
        errors += 1  # it may pass: ask again
print("asked again after the error:", found, "errors:", errors)
print("a new listing:", [blob.name for blob in client.list_blobs("shop", retry=None)])
assert errors == 1 and found == ["a", "b"], "this has changed"
assert [blob.name for blob in client.list_blobs("shop", retry=None)] == ["a", "b", "c", "d"], "this has changed"
PY
echo "as found"
