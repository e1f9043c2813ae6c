"""Stage `nightly`: run the other stages from one config file, unattended."""
