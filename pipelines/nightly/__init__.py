"""Command `nightly`: run the five stages unattended from one config."""
