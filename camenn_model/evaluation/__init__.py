"""Metrics and comparisons of models."""
