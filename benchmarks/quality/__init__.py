"""The measured quality of the model.

Seeds, ablations, baselines and controls measure the model, in cities with known truth and on a real
log. See `python -m benchmarks.quality --help`.
"""
