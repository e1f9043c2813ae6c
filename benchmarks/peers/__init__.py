"""Alternative implementations, for comparison."""
