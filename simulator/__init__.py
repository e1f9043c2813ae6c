"""A simulated city with known truth, for the demo, the tests and the benchmarks. Imports schemas only."""
