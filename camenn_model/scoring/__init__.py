"""Score many pairs with cached states."""
