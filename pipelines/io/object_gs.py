"""Access gs:// through google-cloud-storage.

STORAGE_EMULATOR_HOST names another endpoint, which gets no credentials.
"""

import contextlib
import os
import urllib.parse
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import requests
from google.api_core import exceptions as google
from google.auth import exceptions as google_auth
from google.cloud.storage import Client
from google.cloud.storage.exceptions import DataCorruption, InvalidResponse
from requests.adapters import HTTPAdapter
from urllib3.exceptions import HTTPError

from pipelines.io.object_client import (
    CONNECT_TIMEOUT,
    PART,
    READ_TIMEOUT,
    SOCKETS,
    TRANSIENT,
    WRITE_ID,
    ChangedError,
    Stat,
    TransientError,
    content_type,
    last_attempt,
    missing,
    no_bucket,
    refused,
    whole,
)
from schemas.errors import InputError

NO_KEYS = (
    "Run `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS, or for a public bucket "
    "GS_NO_SIGN_REQUEST=YES."
)
# Failed requests are sent again in one place: pipelines/io/object_client.py.
_ONCE: dict[str, Any] = {"retry": None, "timeout": (CONNECT_TIMEOUT, READ_TIMEOUT)}
_FIELDS = "items(name,size,updated,generation),nextPageToken"
T = TypeVar("T")


class GsClient:
    """Requests to Cloud Storage, or an emulator of it."""

    scheme = "gs"

    def __init__(self) -> None:
        emulator = os.environ.get("STORAGE_EMULATOR_HOST", "")
        anonymous = os.environ.get("GS_NO_SIGN_REQUEST", "").upper() in ("YES", "TRUE", "1")
        self.endpoint = emulator or "https://storage.googleapis.com"
        # Otherwise a thread of the library's looks at the bucket beside the first request, for traces.
        os.environ.setdefault("DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA", "true")
        try:
            # No project is needed, and looking for one may ask a metadata server that is not there.
            self._gs = Client.create_anonymous_client() if emulator or anonymous else Client(project=None)
        except (google_auth.GoogleAuthError, OSError, ValueError) as error:
            raise InputError(f"gs://: no credentials are found ({error}). {NO_KEYS}") from error
        for prefix in ("https://", "http://"):
            self._gs._http.mount(prefix, HTTPAdapter(pool_maxsize=SOCKETS, pool_block=True))
        self._buckets: set[str] = set()

    def stat(self, bucket: str, key: str) -> Stat:
        """Look at one object."""
        blob = self._blob(bucket, key)
        self.call(bucket, key, lambda: blob.reload(**_ONCE))
        return _stat(bucket, blob)

    def page(self, bucket: str, prefix: str, most: int, after: str | None) -> tuple[list[Stat], str | None]:
        """List up to `most` objects below a prefix.

        Returned are they, and where the next page begins.
        """
        found = self._gs.list_blobs(bucket, prefix=prefix, page_size=most, page_token=after, fields=_FIELDS, **_ONCE)
        page = self.call(bucket, None, lambda: [_stat(bucket, blob) for blob in next(found.pages)], prefix)
        return page, found.next_page_token

    def read(self, bucket: str, key: str, start: int, stop: int | None, token: str | None) -> bytes:
        """Read bytes `start` to `stop`.

        They are of the version `token`. None = to the end.
        """
        blob = self._blob(bucket, key)
        chosen = {} if stop is None else {"start": start, "end": stop - 1}
        matching = {"if_generation_match": int(token)} if token else {}
        # Raw: an object with Content-Encoding gzip is what it is, as a local file would be.
        # Whole objects are compared with their checksum, which the store sends along.
        data: bytes = self.call(
            bucket, key, lambda: blob.download_as_bytes(raw_download=True, **chosen, **matching, **_ONCE)
        )
        if token and str(blob.generation) != token:
            # Emulators may let the condition pass.
            raise ChangedError(f"gs://{bucket}/{key}")
        return data if stop is None else whole(f"gs://{bucket}/{key}", data, stop - start)

    def tail(self, bucket: str, key: str, most: int) -> tuple[Stat, bytes]:
        """Read the last `most` bytes, or all.

        The time of the `Stat` is 0.
        """
        name = f"{urllib.parse.quote(bucket, safe='')}/o/{urllib.parse.quote(key, safe='')}"
        url = f"{self.endpoint}/download/storage/v1/b/{name}?alt=media"
        # Accepting gzip: an object with Content-Encoding gzip is what it is.
        headers = {"Range": f"bytes=-{most}", "Accept-Encoding": "gzip"}

        def get() -> tuple[Any, bytes]:
            # The library's own download does not tell an object's size.
            with self._gs._http.get(url, headers=headers, stream=True, timeout=_ONCE["timeout"]) as answer:
                data = answer.raw.read(decode_content=False)
            if answer.status_code >= 400 and answer.status_code != 416:
                answer._content = data
                raise google.from_http_response(answer)  # type: ignore[no-untyped-call]
            return answer, data

        path = f"gs://{bucket}/{key}"
        answer, data = self.call(bucket, key, get)
        if answer.status_code == 416:
            # No range of an empty object can be had.
            return self.stat(bucket, key), b""
        size = int(answer.headers.get("Content-Range", f"/{len(data)}").rpartition("/")[2])
        return Stat(path, size, 0.0, answer.headers["X-Goog-Generation"]), whole(path, data, min(most, size))

    def put(self, bucket: str, key: str, data: bytes, token: str | None, write_id: str) -> str:
        """Write an object.

        `token`: None = whatever is there, '' = nothing, else that version.
        """
        blob = self._blob(bucket, key)
        if write_id:
            blob.metadata = {WRITE_ID: write_id}
        condition = {} if token is None else {"if_generation_match": int(token or 0)}
        kind = content_type(key)
        self.call(bucket, key, lambda: blob.upload_from_string(data, content_type=kind, **condition, **_ONCE))
        return str(blob.generation)

    def delete(self, bucket: str, keys: Sequence[str]) -> None:
        """Remove objects, at most 1,000. Missing ones are no error."""

        def remove(key: str) -> None:
            with contextlib.suppress(FileNotFoundError):
                self.call(bucket, key, lambda: self._blob(bucket, key).delete(**_ONCE))

        # Singly: not every emulator takes batches as this library writes them.
        with ThreadPoolExecutor(SOCKETS) as pool:
            list(pool.map(remove, keys))

    def upload(self, bucket: str, key: str) -> "GsUpload":
        """Begin an upload in parts."""
        return GsUpload(self, bucket, key, self._blob(bucket, key))

    def _blob(self, bucket: str, key: str) -> Any:
        return self._gs.bucket(bucket).blob(key)

    def call(self, bucket: str, key: str | None, request: Callable[[], T], prefix: str = "") -> T:
        """Make a request and translate its errors."""
        path = f"gs://{bucket}/{prefix if key is None else key}"
        try:
            answer = request()
        except google.GoogleAPICallError as error:
            raise self._translate(int(error.code or 0), str(error.message), bucket, key, path) from error
        except InvalidResponse as error:
            raise self._translate(int(error.response.status_code), str(error), bucket, key, path) from error
        except (google.RetryError, requests.RequestException, HTTPError, DataCorruption, ConnectionError) as error:
            raise TransientError(str(error)) from error
        except google_auth.GoogleAuthError as error:
            if getattr(error, "retryable", False):
                raise TransientError(str(error)) from error
            raise InputError(f"{path}: the credentials do not work ({error}). {NO_KEYS}") from error
        self._buckets.add(bucket)
        return answer

    def _translate(self, status: int, words: str, bucket: str, key: str | None, path: str) -> Exception:
        words = " ".join(words.split())[:300]
        if status == 404:
            if key is None or "bucket does not exist" in words:
                return no_bucket("gs", bucket, self.endpoint)
            # Not every store says which of the two is missing.
            if bucket not in self._buckets:
                self.page(bucket, "", 1, None)
            return missing(path)
        if status in (304, 412):
            return ChangedError(path)
        if status in TRANSIENT:
            return TransientError(f"{status} {words}")
        if status in (401, 403):
            return refused(path, f"{status} {words}")
        return InputError(f"{path}: {self.endpoint} refuses it ({status} {words}). Check the name.")


class GsUpload:
    """A resumable upload, which nobody sees before it is finished."""

    threads = 1
    """Parts go one after another"""

    def __init__(self, client: GsClient, bucket: str, key: str, blob: Any) -> None:
        self._client, self._bucket, self._key = client, bucket, key
        # It sends a failed part again itself: only it knows how much of it arrived.
        self._writer = blob.open("wb", chunk_size=PART, ignore_flush=True, content_type=content_type(key))

    def add(self, number: int, part: bytes) -> None:
        """Send one part."""
        self._call(lambda: self._writer.write(part))

    def finish(self) -> None:
        """Publish what was sent."""
        self._call(self._writer.close)

    def abort(self) -> None:
        """Drop what was sent."""
        try:
            with contextlib.suppress(FileNotFoundError):
                self._call(self._writer.terminate)
        finally:
            # Otherwise the collected writer would close itself, and so publish what had been sent.
            self._writer._buffer.close()

    def _call(self, request: Callable[[], Any]) -> None:
        with last_attempt(f"gs://{self._bucket}/{self._key}"):
            self._client.call(self._bucket, self._key, request)


def _stat(bucket: str, blob: Any) -> Stat:
    return Stat(
        f"gs://{bucket}/{blob.name}",
        int(blob.size),
        blob.updated.timestamp(),
        str(blob.generation),
        (blob.metadata or {}).get(WRITE_ID, ""),
    )
