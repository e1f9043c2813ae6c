"""Shared by the tests: small cities, references, clusters."""
