"""Run commands and pipelines: flags, runners, workers, exit codes, progress."""
