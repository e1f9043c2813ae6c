"""Shared by the benchmarks: commands, processes, cities, stubs."""
