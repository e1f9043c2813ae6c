"""Runs and what is published: manifests, accounting, gates, garbage, the embedding store."""
