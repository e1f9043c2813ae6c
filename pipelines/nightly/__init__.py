"""Stage `nightly`: run the other stages unattended from one config."""
