"""Read and write files and tables; no stage, no run."""
