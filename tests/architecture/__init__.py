"""Rules of the project: imports, docs, dependencies."""
