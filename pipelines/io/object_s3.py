"""Access s3:// through boto3.

Endpoint, region, keys and everything else come from boto3's own environment variables and files.
"""

import contextlib
import datetime
import functools
import os
import threading
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import boto3
from botocore import UNSIGNED
from botocore import exceptions as boto
from botocore.config import Config

from pipelines.io.object_client import (
    CONNECT_TIMEOUT,
    READ_TIMEOUT,
    SOCKETS,
    TRANSIENT,
    WRITE_ID,
    ChangedError,
    Stat,
    TransientError,
    attempt,
    content_type,
    missing,
    no_bucket,
    no_conditions,
    refused,
    whole,
)
from schemas.errors import InputError

NO_KEYS = (
    "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or for a public bucket AWS_NO_SIGN_REQUEST=YES."
)
_PASSING = {
    "ConditionalRequestConflict",
    "InternalError",
    "OperationAborted",
    "RequestTimeout",
    "ServiceUnavailable",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
}
"""Codes of errors after which the same request is sent again"""


class _NoRangeError(Exception):
    """An object is empty, so it has no ranges."""


class S3Client:
    """Requests to one S3 endpoint."""

    scheme = "s3"

    def __init__(self) -> None:
        anonymous = os.environ.get("AWS_NO_SIGN_REQUEST", "").upper() in ("YES", "TRUE", "1")
        config = Config(
            connect_timeout=CONNECT_TIMEOUT,
            read_timeout=READ_TIMEOUT,
            max_pool_connections=SOCKETS,
            # Failed requests are sent again in one place: pipelines/io/object_client.py.
            retries={"total_max_attempts": 1, "mode": "standard"},
            tcp_keepalive=True,
            signature_version=UNSIGNED if anonymous else None,
        )
        try:
            self._s3 = boto3.session.Session().client("s3", config=config)
        except (boto.BotoCoreError, ValueError) as error:
            raise InputError(f"s3://: boto3 cannot be set up ({error}). Check the environment (AWS_...).") from error
        self.endpoint = str(self._s3.meta.endpoint_url)
        self._buckets: set[str] = set()
        # The library makes more connections than it keeps, rather than to wait for one.
        self._slots = threading.BoundedSemaphore(SOCKETS)

    def stat(self, bucket: str, key: str) -> Stat:
        """Look at one object."""
        answer = self.call("head_object", bucket, key)
        return Stat(
            f"s3://{bucket}/{key}",
            answer["ContentLength"],
            _seconds(answer["LastModified"]),
            answer["ETag"],
            answer.get("Metadata", {}).get(WRITE_ID, ""),
        )

    def page(self, bucket: str, prefix: str, most: int, after: str | None) -> tuple[list[Stat], str | None]:
        """List up to `most` objects below a prefix.

        Returned are they, and where the next page begins.
        """
        more = {} if after is None else {"ContinuationToken": after}
        answer = self.call("list_objects_v2", bucket, None, Prefix=prefix, MaxKeys=most, **more)
        found = [
            Stat(f"s3://{bucket}/{one['Key']}", one["Size"], _seconds(one["LastModified"]), one["ETag"])
            for one in answer.get("Contents", [])
        ]
        return found, answer["NextContinuationToken"] if answer.get("IsTruncated") else None

    def read(self, bucket: str, key: str, start: int, stop: int | None, token: str | None) -> bytes:
        """Read bytes `start` to `stop`.

        They are of the version `token`. None = to the end.
        """
        chosen = {} if stop is None else {"Range": f"bytes={start}-{stop - 1}"}
        answer, data = self._get(bucket, key, **chosen, **({"IfMatch": token} if token else {}))
        return whole(f"s3://{bucket}/{key}", data, answer["ContentLength"] if stop is None else stop - start)

    def tail(self, bucket: str, key: str, most: int) -> tuple[Stat, bytes]:
        """Read the last `most` bytes, or all.

        The time of the `Stat` is 0.
        """
        path = f"s3://{bucket}/{key}"
        try:
            answer, data = self._get(bucket, key, Range=f"bytes=-{most}")
        except _NoRangeError:
            # No range of an empty object can be had.
            return self.stat(bucket, key), b""
        size = int(answer.get("ContentRange", f"/{len(data)}").rpartition("/")[2])
        return Stat(path, size, 0.0, answer["ETag"]), whole(path, data, min(most, size))

    def _get(self, bucket: str, key: str, **arguments: Any) -> tuple[Any, bytes]:
        def get() -> tuple[Any, bytes]:
            answer = self._s3.get_object(Bucket=bucket, Key=key, **arguments)
            try:
                return answer, answer["Body"].read()
            except boto.BotoCoreError as error:
                raise TransientError(str(error)) from error

        return self._request(bucket, key, "", get)

    def put(self, bucket: str, key: str, data: bytes, token: str | None, write_id: str) -> str:
        """Write an object.

        `token`: None = whatever is there, '' = nothing, else that version.
        """
        condition: dict[str, Any] = {} if token is None else {"IfMatch": token} if token else {"IfNoneMatch": "*"}
        if write_id:
            condition["Metadata"] = {WRITE_ID: write_id}
        condition["ContentType"] = content_type(key)
        return str(self.call("put_object", bucket, key, Body=data, **condition)["ETag"])

    def delete(self, bucket: str, keys: Sequence[str]) -> None:
        """Remove objects, at most 1,000. Missing ones are no error."""
        wanted = {"Objects": [{"Key": key} for key in keys], "Quiet": True}
        for fault in self.call("delete_objects", bucket, None, Delete=wanted).get("Errors", []):
            path = f"s3://{bucket}/{fault.get('Key', '')}"
            if fault.get("Code") in _PASSING:
                raise TransientError(fault["Code"])
            if fault.get("Code") not in ("NoSuchKey", "404"):
                raise refused(path, f"{fault.get('Code')}: {fault.get('Message')}")

    def upload(self, bucket: str, key: str) -> "S3Upload":
        """Begin an upload in parts."""
        return S3Upload(self, bucket, key)

    def call(self, operation: str, bucket: str, key: str | None, **arguments: Any) -> Any:
        """Make a request and translate its errors."""
        if key is not None:
            arguments["Key"] = key
        send = functools.partial(getattr(self._s3, operation), Bucket=bucket, **arguments)
        return self._request(bucket, key, arguments.get("Prefix", ""), send)

    def _request(self, bucket: str, key: str | None, prefix: str, send: Callable[[], Any]) -> Any:
        path = f"s3://{bucket}/{key or prefix}"
        try:
            with self._slots:
                answer = send()
        except boto.ClientError as error:
            raise self._translate(error, bucket, key, path) from error
        except (boto.NoCredentialsError, boto.PartialCredentialsError, boto.ProfileNotFound) as error:
            raise InputError(f"{path}: {error}. {NO_KEYS}") from error
        except (boto.HTTPClientError, boto.ConnectionError) as error:
            raise TransientError(str(error)) from error
        except (boto.BotoCoreError, ValueError) as error:
            raise InputError(f"{path}: boto3 refuses it ({error}). Check the name, and the environment.") from error
        self._buckets.add(bucket)
        return answer

    def _translate(self, error: boto.ClientError, bucket: str, key: str | None, path: str) -> Exception:
        code = str(error.response.get("Error", {}).get("Code", ""))
        status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        if code == "NoSuchBucket" or (status == 404 and key is None):
            return no_bucket("s3", bucket, self.endpoint)
        if status == 404:
            # The answer to HEAD has no body that could say which of the two is missing.
            if code not in ("NoSuchKey", "NoSuchUpload") and bucket not in self._buckets:
                self.page(bucket, "", 1, None)
            return missing(path)
        if status == 412:
            return ChangedError(path)
        if status == 416:
            return _NoRangeError(path)
        if status == 501:
            return no_conditions(path)
        if status in TRANSIENT or code in _PASSING:
            return TransientError(f"{status} {code}".strip())
        why = f"{status} {code}: {error.response.get('Error', {}).get('Message', '')}".strip(": ")
        if status in (401, 403):
            return refused(path, why)
        return InputError(f"{path}: {self.endpoint} refuses it ({why}). Check the name, and the environment (AWS_...).")


def _seconds(time: datetime.datetime) -> float:
    """Return a time as seconds since 1970, whole: only listings know fractions."""
    return float(int(time.timestamp()))


class S3Upload:
    """An upload in parts, which nobody sees before it is finished."""

    threads = 2

    def __init__(self, client: S3Client, bucket: str, key: str) -> None:
        self._client, self._bucket, self._key = client, bucket, key
        self._path = f"s3://{bucket}/{key}"
        self._parts: dict[int, dict[str, Any]] = {}
        self._write_id = uuid.uuid4().hex
        begin = functools.partial(
            client.call,
            "create_multipart_upload",
            bucket,
            key,
            Metadata={WRITE_ID: self._write_id},
            ContentType=content_type(key),
        )
        self._id = str(attempt(self._path, begin)["UploadId"])

    def add(self, number: int, part: bytes) -> None:
        """Send one part."""
        answer = attempt(self._path, lambda: self._call("upload_part", PartNumber=number, Body=part))
        sums = {name: value for name, value in answer.items() if name.startswith("Checksum") and name != "ChecksumType"}
        self._parts[number] = {"PartNumber": number, "ETag": answer["ETag"], **sums}

    def finish(self) -> None:
        """Publish what was sent."""
        attempt(self._path, self._complete, again=self._complete_again)

    def _complete(self) -> None:
        parts = [self._parts[number] for number in sorted(self._parts)]
        self._call("complete_multipart_upload", MultipartUpload={"Parts": parts})

    def _complete_again(self) -> None:
        try:
            self._complete()
        except FileNotFoundError:
            # The upload is gone: the request before this one may have finished it.
            if self._client.stat(self._bucket, self._key).write_id != self._write_id:
                raise

    def abort(self) -> None:
        """Drop what was sent."""
        with contextlib.suppress(FileNotFoundError):
            attempt(self._path, lambda: self._call("abort_multipart_upload"))

    def _call(self, operation: str, **arguments: Any) -> Any:
        return self._client.call(operation, self._bucket, self._key, UploadId=self._id, **arguments)
