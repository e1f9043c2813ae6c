"""The input tables: catalog, stores, users, logs, photos, stored contents."""
