"""Reasons of rejects and defects.

They are the values of the column `reason`, and stable between versions: alerts and dashboards filter
by them. docs/reference/reasons.md is generated from here.
"""

from enum import StrEnum
from typing import Self


class Reason(StrEnum):
    """A reason why a row was dropped or is degraded.

    `table`: `rejects` (the row was dropped) or `defects` (it was kept, without its photo).
    """

    table: str
    meaning: str
    remedy: str

    def __new__(cls, value: str, table: str, meaning: str, remedy: str) -> Self:
        """Make a reason with its sentences."""
        reason = str.__new__(cls, value)
        reason._value_ = value
        reason.table, reason.meaning, reason.remedy = table, meaning, remedy
        return reason

    NULL_ITEM_ID = "null_item_id", "rejects", "`item_id` is null or blank.", "Give it a value."
    NULL_EXPOSURE_ID = "null_exposure_id", "rejects", "`exposure_id` is null or blank.", "Give it a value."
    NULL_SESSION_ID = "null_session_id", "rejects", "`session_id` is null or blank.", "Give it a value."
    NULL_ORDER_ID = "null_order_id", "rejects", "`order_id` is null or blank.", "Give it a value."
    NULL_USER_ID = "null_user_id", "rejects", "`user_id` is null or blank.", "Give it a value."
    NULL_STORE_ID = "null_store_id", "rejects", "`store_id` of an event is null or blank.", "Give it a value."
    NULL_CLICKED_AT = "null_clicked_at", "rejects", "`clicked_at` is null.", "Give the time of the click."
    NULL_ORDERED_AT = "null_ordered_at", "rejects", "`ordered_at` is null.", "Give the time of the order."
    NULL_QUANTITY = "null_quantity", "rejects", "`quantity` is null.", "Give the quantity. Returns are negative."
    NOT_UTF8 = (
        "not_utf8",
        "rejects",
        "A text of the row is not UTF-8.",
        "Write the table's texts as UTF-8. The detail shows the bytes.",
    )
    IMPOSSIBLE_TIME = (
        "impossible_time",
        "rejects",
        "The event's time is before 2000 or more than a day from now.",
        "Write times in microseconds, UTC.",
    )
    DUPLICATE_ITEM_ID = (
        "duplicate_item_id",
        "rejects",
        "Rows that differ have one `item_id`.",
        "Give each listing its own id. Exact copies are counted as `duplicates` instead.",
    )
    DUPLICATE_EXPOSURE_ID = (
        "duplicate_exposure_id",
        "rejects",
        "Two clicks of a user that differ have one `exposure_id`. The later one is dropped.",
        "Give each exposure its own id.",
    )
    MISSING_IMAGE = "missing_image", "defects", "There is no file at `image_uri`.", "Upload it, or correct the address."
    UNREADABLE_IMAGE = (
        "unreadable_image",
        "defects",
        "The file at `image_uri` cannot be opened.",
        "Give the user who runs camenn the right to read it.",
    )
    CHANGED_IMAGE = (
        "changed_image",
        "defects",
        "The file changed while the run was reading it.",
        "Nothing: the next run reads it again.",
    )
    NOT_A_FILE = "not_a_file", "defects", "`image_uri` names a directory, a pipe or a device.", "Name the photo."
    MALFORMED_URI = "malformed_uri", "defects", "`image_uri` is no path.", "Leave it null, or give a path."
    OUTSIDE_ROOT = (
        "outside_root",
        "defects",
        "`image_uri` leads out of `--image_root`.",
        "Give a path below it, or `--allow_absolute`.",
    )
    UNSUPPORTED_SCHEME = (
        "unsupported_scheme",
        "defects",
        "`image_uri` has a scheme that is not read here.",
        "Install the scheme's library, or give a path.",
    )
    EMPTY_IMAGE = "empty_image", "defects", "The photo has no bytes.", "Upload it again."
    TOO_MANY_BYTES = "too_many_bytes", "defects", "The photo has more than 32 MiB.", "Upload a smaller one."
    TOO_MANY_PIXELS = "too_many_pixels", "defects", "The photo has more than 64 megapixels.", "Upload a smaller one."
    NOT_AN_IMAGE = "not_an_image", "defects", "The bytes are of no format that is read.", "Upload the photo itself."
    TRUNCATED_IMAGE = "truncated_image", "defects", "The photo is cut off.", "Upload it again."
    CORRUPT_IMAGE = "corrupt_image", "defects", "The photo cannot be decoded.", "Upload it again."
    UNSUPPORTED_MODE = (
        "unsupported_mode",
        "defects",
        "The photo's pixels have no known range or colours.",
        "Save it as RGB.",
    )

    @classmethod
    def null(cls, column: str) -> "Reason":
        """Return the reason of a required column without a value.

        Raises:
            KeyError: there is none for this column.
        """
        return cls[f"NULL_{column.upper()}"]
