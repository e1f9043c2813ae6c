"""Other ways of doing the same, for comparison."""
