"""Rules of the house: imports, docs, dependencies."""
