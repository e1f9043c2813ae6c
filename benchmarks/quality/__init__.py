"""The measured quality of the model.

Seeds, ablations, baselines and controls tell what the model is worth, in cities with known truth
and on a real log. See `python -m benchmarks.quality --help`.
"""
