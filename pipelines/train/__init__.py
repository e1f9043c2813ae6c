"""Stage `train`: train CameNN on a shard set, calibrate it, write a model package."""
