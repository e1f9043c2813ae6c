"""Row counts that the shards stage keeps together.

They are looked up as `sizes.NAME`, so that tests can set them.
"""

from camenn_model.data.shard_set import BLOCK_ROWS

ROWS_PER_BUCKET = 262_144
"""Approximate number of clicks of a bucket of users, or of listings, which a worker holds at a time"""

ROWS_PER_FILE = BLOCK_ROWS
"""Number of examples of a file: one block of training"""
