"""What users hand in: catalog, stores, users, logs, photos; and stored contents."""
