"""A simulated city with known truth.

It serves the demo, the tests and the benchmarks. Imports schemas only.
"""
