"""What the model is worth: seeds, ablations, baselines and controls, in cities with known truth and on a real log. See `python -m benchmarks.quality --help`."""
