"""Speed and memory: ratios from alternating measurements of one run."""
