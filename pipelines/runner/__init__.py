"""Run commands and Beam pipelines: flags, runners, workers, exit codes, progress."""
