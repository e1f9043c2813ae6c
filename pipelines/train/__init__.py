"""Stage `train`: train CameNN, calibrate it, write a model package."""
