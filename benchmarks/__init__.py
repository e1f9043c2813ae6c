"""One script per headline claim; each prints one JSON line."""
