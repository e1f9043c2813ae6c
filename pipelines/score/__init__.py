"""Stage `score`: score the catalog for an audience."""
