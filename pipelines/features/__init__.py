"""Attribution and as-of features, as pure functions of arrays."""
