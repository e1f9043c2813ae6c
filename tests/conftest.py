"""Hypothesis: CI repeats the same cases, so that a change is judged by the change; everyone else's runs draw new ones."""

import os

from hypothesis import settings

settings.register_profile("ci", derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")
