"""Read shard sets into batches."""
