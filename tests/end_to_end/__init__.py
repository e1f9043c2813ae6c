"""The whole way, by the commands."""
