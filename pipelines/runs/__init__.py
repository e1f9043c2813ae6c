"""Runs: manifests, publication, accounting, gates, garbage, the embedding store."""
