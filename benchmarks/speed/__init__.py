"""Speed and memory: ratios in one run, in turns."""
