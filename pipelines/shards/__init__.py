"""Stage `shards`: label clicks, add as-of features, write training shards."""
