"""Read and write files and tables, without stages or runs."""
