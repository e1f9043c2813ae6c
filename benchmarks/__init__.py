"""One script per headline claim.

Each prints one JSON line.
"""
